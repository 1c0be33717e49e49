"""Tiny VAE: the right file for a model, the same pixels as elsewhere, an honest estimate, and clear errors."""

from __future__ import annotations

from types import SimpleNamespace

import comfy.model_management as management
import comfy.sd
import folder_paths
import hosted
import pytest
import small_models
import torch
from comfy import latent_formats
from comfy.taesd.taehv import TAEHV
from comfy.taesd.taesd import TAESD
from diffusers import AutoencoderTiny
from hosted import execute
from safetensors.torch import save_file
from test_compile_vae import compile_vae
from tiling import Accounting

stages = hosted.engine("vae.stages")

has_flux2 = pytest.mark.skipif(
    not hasattr(comfy.taesd.taesd, "DecoderFlux2"), reason="this host has no tiny VAE for Flux 2"
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """models/vae_approx, empty."""
    _, endings = folder_paths.folder_names_and_paths["vae_approx"]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "vae_approx", ([str(tmp_path)], endings))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def taesd(channels=4, seed=1):
    with torch.no_grad():
        model = TAESD(latent_channels=channels)
        small_models.initialize(model, seed)
        return model


def parts(model):
    """The state dicts of the encoder's file and the decoder's."""
    return model.taesd_encoder.state_dict(), model.taesd_decoder.state_dict()


def put(folder, name="taesd", model=None, encoder=True, ending="safetensors"):
    """A tiny VAE's files, as they are published."""
    model = model or taesd()
    for kind, weights in zip(("encoder", "decoder"), parts(model), strict=True):
        if encoder or kind == "decoder":
            save(weights, folder / f"{name}_{kind}.{ending}")
    return model


def save(weights, path):
    with torch.inference_mode(False):
        weights = {name: value.clone() for name, value in weights.items()}
    path.parent.mkdir(exist_ok=True)
    torch.save(weights, path) if path.suffix == ".pth" else save_file(weights, path)


def of_format(form):
    """As much of a MODEL as the node looks at."""
    return SimpleNamespace(model=SimpleNamespace(latent_format=form))


SD15 = of_format(latent_formats.SD15())


def load(model=SD15, name="auto", node_id="7"):
    return execute("SlipstreamTinyVAE", node_id, model=model, name=name).result[0]


def latent(channels=4, size=8, batch=1):
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


def pixels(size=64):
    return torch.rand(1, size, size, 3, generator=torch.Generator().manual_seed(2))


# Which file


@pytest.mark.parametrize(
    ("model", "name"),
    [("SD15", "taesd"), ("SD20", "taesd"), ("SDXL", "taesdxl"), ("SSD1B", "taesdxl"), ("SDXLRefiner", "taesdxl")],
)
def test_a_models_own_file_is_found(folder, model, name):
    for seed, other in enumerate(("taesd", "taesdxl", "taesd3", "taef1")):
        put(folder, other, taesd(16 if other in ("taesd3", "taef1") else 4, seed))
    vae = load(hosted.model(model))
    assert stages.of(vae)[0].settings.file == f"{name}_decoder.safetensors"


@pytest.mark.parametrize(
    ("form", "name", "scale", "shift"),
    [
        ("SD15", "taesd", 0.18215, 0.0),
        ("SDXL", "taesdxl", 0.13025, 0.0),
        ("SDXL_Playground_2_5", "taesdxl", 0.13025, 0.0),
        ("SD3", "taesd3", 1.5305, 0.0609),
        ("Flux", "taef1", 0.3611, 0.1159),
    ],
)
def test_its_latents_are_scaled_as_it_was_trained(folder, form, name, scale, shift):
    form = getattr(latent_formats, form)()
    model = put(folder, name, taesd(form.latent_channels))
    vae = load(of_format(form))
    samples = latent(form.latent_channels)
    expected = model.taesd_decoder((samples - shift) * scale).clamp(0, 1).movedim(1, -1)
    assert torch.allclose(vae.decode(samples), expected, atol=1e-5)
    encoded = model.taesd_encoder(pixels().movedim(-1, 1)) / scale + shift
    assert torch.allclose(vae.encode(pixels()), encoded, rtol=1e-4, atol=1e-4)


@has_flux2
def test_flux_2_packs_its_latents(folder):
    put(folder, "taef2", taesd(128))
    vae = load(of_format(latent_formats.Flux2()))
    assert vae.decode(latent(128, 3)).shape == (1, 48, 48, 3)
    assert vae.encode(pixels(72)).shape == (1, 128, 4, 4)


# Newer hosts: 64 channels, each with a scale of its own, 16 pixels to one, and transparency


class Wide(torch.nn.Module):
    """What TAESD is there for such latents, as far as the node looks at it: shapes, names and scales."""

    def __init__(self, latent_channels=64):
        super().__init__()
        conv = torch.nn.Conv2d
        self.taesd_encoder = torch.nn.Sequential(conv(4, 8, 1), torch.nn.PixelUnshuffle(16), conv(8 * 256, 64, 1))
        self.taesd_decoder = torch.nn.Sequential(
            torch.nn.Tanh(), conv(latent_channels, 256, 3, padding=1), conv(256, 4 * 256, 1), torch.nn.PixelShuffle(16)
        )
        self.vae_scale = torch.nn.Parameter(torch.ones(64, 1, 1))
        self.vae_shift = torch.nn.Parameter(torch.zeros(64, 1, 1))

    def decode(self, x):
        return self.taesd_decoder((x - self.vae_shift) * self.vae_scale).sub(0.5).mul(2)

    def encode(self, x):
        return self.taesd_encoder(x * 0.5 + 0.5) / self.vae_scale + self.vae_shift


class Qwen(latent_formats.LatentFormat):
    latent_channels = 64
    spacial_downscale_ratio = 16
    taesd_decoder_name = "taeqi2_1_decoder"

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.latents_mean = torch.randn(1, 64, 1, 1, generator=generator)
        self.latents_std = torch.rand(1, 64, 1, 1, generator=generator) + 0.5

    def process_in(self, latent):
        return (latent - self.latents_mean) / self.latents_std


@pytest.fixture
def newer(monkeypatch):
    own = comfy.taesd.taesd.TAESD
    make = lambda latent_channels=4: Wide() if latent_channels == 64 else own(latent_channels=latent_channels)  # noqa: E731
    monkeypatch.setattr(comfy.taesd.taesd, "TAESD", make)
    monkeypatch.setattr(comfy.taesd.taesd, "DecoderF16", Wide, raising=False)
    monkeypatch.setattr(latent_formats, "QwenImage21", Qwen, raising=False)


def wide():
    with torch.no_grad():
        module = Wide()
        small_models.initialize(module, 1)
        return module


@pytest.mark.parametrize("name", ["auto", "taeqi2_1_decoder.safetensors"])
def test_64_channels_with_scales_of_their_own_and_transparency(name, folder, newer, last_lines):
    module = put(folder, "taeqi2_1", wide())
    vae = load(of_format(Qwen()), name)
    samples = latent(64, 3)
    expected = module.taesd_decoder(Qwen().process_in(samples)).clamp(0, 1).movedim(1, -1)
    decoded = vae.decode(samples)
    assert decoded.shape == (1, 48, 48, 4)
    assert torch.allclose(decoded, expected, atol=1e-4)
    opaque = torch.cat([pixels(32), torch.ones(1, 32, 32, 1)], -1)
    assert torch.equal(vae.encode(pixels(32)), vae.encode(opaque))
    expected = module.taesd_encoder(opaque.movedim(-1, 1)) * Qwen().latents_std + Qwen().latents_mean
    assert torch.allclose(vae.encode(pixels(32)), expected, rtol=1e-3, atol=1e-3)
    assert last_lines("7")[-1][0] == "active"


def test_64_channels_of_another_ratio_are_refused(folder, newer):
    put(folder, "taeqi2_1", wide())
    with pytest.raises(ValueError, match=r"\(HunyuanImage21\) is 32 pixels wide, but taeqi2_1_decoder\.saf.* makes 16"):
        load(of_format(latent_formats.HunyuanImage21()), "taeqi2_1_decoder.safetensors")


@pytest.mark.skipif(hasattr(comfy.taesd.taesd, "DecoderF16"), reason="this host has them")
def test_on_a_host_that_has_none_they_are_refused_by_name(folder):
    put(folder, "taeqi2_1", wide())
    with pytest.raises(
        RuntimeError, match=r"taeqi2_1_decoder\.safetensors .*those of Qwen-Image 2\.1 need ComfyUI 0\.37"
    ):
        load(of_format(Qwen()))


def test_safetensors_are_preferred_and_folders_looked_into(folder):
    put(folder, ending="pth")
    assert stages.of(load())[0].settings.file == "taesd_decoder.pth"
    put(folder / "tiny", ending="safetensors")
    vae = load()
    assert stages.of(vae)[0].settings.file.endswith("taesd_decoder.safetensors")
    assert load(name="taesd_decoder.pth").decode(latent()).shape == (1, 64, 64, 3)


def test_decoders_are_offered_and_encoders_are_not(folder):
    put(folder)
    save({"a": torch.zeros(1)}, folder / "taehv.safetensors")
    (name,) = (entry for entry in hosted.NODES["SlipstreamTinyVAE"].define_schema().inputs if entry.id == "name")
    assert name.options == ["auto", "taehv.safetensors", "taesd_decoder.safetensors"]


def test_both_in_one_file_as_the_host_saves_a_vae(folder):
    model = taesd()
    save(model.state_dict(), folder / "mine.safetensors")
    assert torch.equal(load(name="mine.safetensors").decode(latent()), reference(model).decode(latent()))


def reference(model, scale=0.18215):
    """The host's own VAE of it."""
    return comfy.sd.VAE(sd={**model.state_dict(), "vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(0.0)})


def test_a_decoder_alone_that_the_host_saved(folder):
    """Its encoder was made up, and is not saved."""
    put(folder, encoder=False)
    saved = load().get_sd()
    assert not any("encoder" in name for name in saved)
    save(saved, folder / "mine.safetensors")
    vae = load(name="mine.safetensors")
    assert torch.equal(vae.decode(latent()), load(name="taesd_decoder.safetensors").decode(latent()))
    with pytest.raises(RuntimeError, match=r"To encode it needs mine_encoder\.safetensors"):
        vae.encode(pixels())


# What it does


def test_it_is_the_hosts_own(folder, last_lines):
    model = put(folder)
    vae, host = load(), reference(model)
    assert torch.equal(vae.decode(latent()), host.decode(latent()))
    assert torch.equal(vae.encode(pixels()), host.encode(pixels()))
    tiles = {"tile_x": 12, "tile_y": 12, "overlap": 4}
    assert torch.equal(vae.decode_tiled(latent(size=20), **tiles), host.decode_tiled(latent(size=20), **tiles))
    assert last_lines("7")[-1][0] == "active"


def test_diffusers_autoencoder_tiny_agrees(folder):
    """An independent implementation, with the same weights."""
    with torch.inference_mode(False):
        torch.manual_seed(0)
        other = AutoencoderTiny().requires_grad_(False)
    files = {kind: {} for kind in ("encoder", "decoder")}
    for name, value in other.state_dict().items():
        kind, _, number, rest = name.split(".", 3)
        # Ours counts the decoder's clamp as a layer.
        files[kind][f"{int(number) + (kind == 'decoder')}.{rest}"] = value
    for kind, weights in files.items():
        save(weights, folder / f"taesd_{kind}.safetensors")
    vae = load()
    image = vae.first_stage_model.decode(latent() * 3 / 0.18215)
    assert float((image - other.decode(latent() * 3).sample).abs().max()) < 1e-5
    picture = pixels().movedim(-1, 1) * 2 - 1
    encoded = vae.first_stage_model.encode(picture) * 0.18215
    assert float((encoded - other.encode(picture).latents).abs().max()) < 1e-5


def test_a_decoder_alone_decodes(folder, last_lines):
    model = put(folder, encoder=False)
    vae = load()
    assert torch.equal(vae.decode(latent()), reference(model).decode(latent()))
    assert "decodes only" in last_lines("7")[-1][1]
    with pytest.raises(RuntimeError, match=r"Tiny VAE \(node 7\): .* To encode it needs taesd_encoder\.safetensors or"):
        vae.encode(pixels())
    assert last_lines("7")[-1][0] == "failed"
    assert vae.decode(latent()).isfinite().all()


def test_the_missing_encoder_is_told_by_no_warning_of_the_hosts(folder, caplog):
    put(folder, encoder=False)
    load()
    assert "Missing VAE keys" not in caplog.text


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_the_memory_estimate_is_what_it_takes(folder, direction):
    put(folder)
    vae = load()
    values = latent(size=32) if direction == "decode" else pixels(256).movedim(-1, 1)
    vae.decode(latent())  # loads it
    with Accounting() as accounting:
        getattr(vae.first_stage_model, direction)(values)
    estimate = getattr(vae, f"memory_used_{direction}")(values.shape, torch.float32)
    assert accounting.peak < estimate < 1.5 * accounting.peak
    assert getattr(reference(taesd()), f"memory_used_{direction}")(values.shape, torch.float32) > 5 * estimate


def test_it_leaves_the_unet_where_it_is(folder):
    """The host makes room for the estimate before it decodes."""
    put(folder)
    vae, shape = load(), (1, 4, 128, 128)
    assert vae.memory_used_decode(shape, torch.float16) < 700 * 2**20
    assert small_models.kl_vae().memory_used_decode(shape, torch.float16) > 4 * 2**30


@pytest.mark.parametrize(("has_fp16", "dtype"), [(True, torch.float16), (False, torch.float32)])
def test_float16_where_it_is_fast(folder, monkeypatch, last_lines, has_fp16, dtype):
    put(folder)
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: has_fp16)
    vae = load()
    assert vae.vae_dtype == dtype
    assert all(weight.dtype == dtype for weight in vae.patcher.model.parameters())
    assert f"taesd_decoder.safetensors in {'float16' if has_fp16 else 'float32'}, " in last_lines("7")[0][1]


def test_it_tells_what_it_is_and_did(folder, last_lines):
    put(folder)
    vae = load()
    ((state, text),) = last_lines("7")
    assert state == "inert"
    assert text.endswith("nothing was decoded or encoded with it in this prompt")
    vae.decode(latent(batch=2))
    state, text = last_lines("7")[-1]
    assert state == "active"
    assert text.startswith("taesd_decoder.safetensors in float32, 9 MiB; 1024x1024 decoded in about ")
    assert text.endswith("; decoded 2 images")


def test_it_can_be_compiled(folder):
    put(folder)
    vae = load()
    compiled = compile_vae(vae, "8")
    assert [type(stage).__name__ for stage in stages.of(compiled)] == ["TinyStage", "CompiledStage"]
    assert torch.allclose(compiled.decode(latent()), vae.decode(latent()), atol=1e-5)
    assert compiled.memory_used_decode is vae.memory_used_decode


def test_the_model_is_only_looked_at(folder, model):
    put(folder)
    before = dict(vars(model))
    load(model).decode(latent())
    assert vars(model) == before


# Video


def video(channels=16, seed=1):
    with torch.no_grad():
        module = TAEHV(latent_channels=channels)
        small_models.initialize(module, seed)
        return module.state_dict()


def test_a_video_models_file_is_found_and_decodes_as_the_hosts(folder):
    weights = video()
    save(weights, folder / "lighttaew2_1.safetensors")
    vae = load(of_format(latent_formats.Wan21()))
    samples = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    expected = comfy.sd.VAE(sd=weights, dtype=torch.float32).decode(samples)
    assert expected.shape == (1, 5, 32, 32, 3)
    assert torch.equal(vae.decode(samples), expected)


def test_a_video_decoder_alone_decodes(folder):
    save({name: value for name, value in video().items() if name.startswith("decoder.")}, folder / "taehv.pth")
    vae = load(of_format(latent_formats.HunyuanVideo()))
    assert vae.decode(torch.zeros(1, 16, 1, 4, 4)).isfinite().all()
    with pytest.raises(RuntimeError, match=r"Tiny VAE \(node 7\): taehv\.pth only decodes"):
        vae.encode(torch.rand(5, 32, 32, 3))


@pytest.mark.parametrize(("name", "scaled"), [("taehv", True), ("lighttaew2_1", False)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_latents_are_scaled_by_the_file_and_not_by_the_type_of_its_weights(folder, name, scaled, dtype):
    """The host tells the two apart by that."""
    weights = {key: value.to(dtype) for key, value in video().items()}
    save(weights, folder / f"{name}.safetensors")
    form = latent_formats.HunyuanVideo if scaled else latent_formats.Wan21
    module = TAEHV(latent_channels=16, latent_format=latent_formats.HunyuanVideo if scaled else None)
    module.load_state_dict({key: value.float() for key, value in weights.items()}, strict=False)
    samples = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    decoded = load(of_format(form())).first_stage_model.decode(samples)
    assert torch.allclose(decoded.float(), module.decode(samples), atol=1e-4)


@pytest.mark.parametrize(("form", "name"), [("Wan21", "taehv"), ("HunyuanVideo", "lighttaew2_1"), ("Flux", "mine")])
def test_a_video_file_of_another_model_is_refused(folder, form, name):
    save(video(), folder / f"{name}.safetensors")
    with pytest.raises(ValueError, match=rf"{name}\.safetensors decodes the latents of a video model, other than this"):
        load(of_format(getattr(latent_formats, form)()), f"{name}.safetensors")


def test_a_video_file_that_lacks_layers_is_refused(folder):
    weights = video()
    del weights["decoder.1.bias"]
    save(weights, folder / "taehv.safetensors")
    with pytest.raises(RuntimeError, match=r"some of its layers are missing \(decoder\.1\.bias\)"):
        load(of_format(latent_formats.HunyuanVideo()))


# Errors


@pytest.mark.parametrize(
    ("form", "wanted", "source"),
    [
        ("SDXL", "taesdxl_decoder", "https://github.com/madebyollin/taesd"),
        ("HunyuanVideo", "taehv", "https://github.com/madebyollin/taehv"),
        ("Wan21", "lighttaew2_1", "https://huggingface.co/lightx2v/Autoencoders"),
    ],
)
def test_a_missing_file_is_named_with_its_folder_and_where_to_get_it(folder, last_lines, form, wanted, source):
    with pytest.raises(RuntimeError) as raised:
        load(of_format(getattr(latent_formats, form)()))
    text = str(raised.value)
    assert text.startswith(f"Tiny VAE: expected {wanted}.safetensors or {wanted}.pth for this model")
    assert f"{folder}. Download it from {source} into that folder." in text
    assert last_lines("7") == [("failed", text)]


def test_a_model_without_a_known_tiny_vae(folder):
    put(folder)
    with pytest.raises(RuntimeError, match=r"no tiny VAE is known for the latents of this model \(SC_B\)"):
        load(of_format(latent_formats.SC_B()))
    assert load(of_format(latent_formats.SC_B()), "taesd_decoder.safetensors").decode(latent()).isfinite().all()
    with pytest.raises(RuntimeError, match="expected a diffusion model"):
        load(SimpleNamespace(model=SimpleNamespace()))


@pytest.mark.parametrize("ending", ["safetensors", "pth"])
@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_a_truncated_file(folder, ending, kind, last_lines):
    put(folder, ending=ending)
    path = folder / f"taesd_{kind}.{ending}"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(RuntimeError, match=rf"Tiny VAE: taesd_{kind}\.{ending} is damaged or incomplete .*Download it"):
        load()
    assert last_lines("7")[0][0] == "failed"
    put(folder, ending=ending)
    assert load().decode(latent()).isfinite().all()


@pytest.mark.parametrize(
    "weights",
    [
        {"conv_in.weight": torch.zeros(4, 4)},
        {"1.weight": torch.zeros(64, 4)},
        {name: value for name, value in parts(TAESD())[1].items() if not name.startswith("3.")},
        {**parts(TAESD())[1], "19.weight": torch.zeros(3)},
        {**parts(TAESD())[1], "1.weight": torch.zeros(32, 4, 3, 3)},
        {"decoder.22.bias": torch.zeros(3), "decoder.1.weight": torch.zeros(8, 16, 3, 3)},
    ],
)
def test_a_wrong_architecture(folder, weights, last_lines):
    save(weights, folder / "taesd_decoder.safetensors")
    with pytest.raises(RuntimeError, match=r"Tiny VAE: expected taesd_decoder\.safetensors to be TAESD's decoder"):
        load()
    assert last_lines("7")[0][0] == "failed"


def test_a_file_that_is_gone(folder):
    with pytest.raises(RuntimeError, match=r"taesd_decoder\.pth is no longer in models/vae_approx"):
        load(name="taesd_decoder.pth")


def test_a_file_for_other_latents(folder):
    put(folder, "taesd3", taesd(16))
    put(folder, "taesdxl")
    with pytest.raises(ValueError, match=r"latents \(SD15\) have 4 channels, but taesd3_decoder\.safetensors decodes"):
        load(name="taesd3_decoder.safetensors")
    with pytest.raises(ValueError, match=r"taesdxl_decoder\.safetensors is made for other latents than this model's"):
        load(name="taesdxl_decoder.safetensors")


@pytest.mark.parametrize(
    ("samples", "why"),
    [
        (latent(16), r"expected latents of 4 channels, but got 16\. Are they from another model"),
        (latent() * float("nan"), r"expected a latent of finite values to decode, but it holds NaN"),
    ],
)
def test_latents_that_can_not_be_decoded(folder, last_lines, samples, why):
    put(folder)
    vae = load()
    with pytest.raises(RuntimeError, match=rf"Tiny VAE \(node 7\): {why}"):
        vae.decode(samples)
    assert last_lines("7")[-1][0] == "failed"
    assert vae.decode(latent()).isfinite().all()


def test_a_file_that_holds_nan(folder):
    model = taesd()
    model.taesd_decoder[1].weight.fill_(float("nan"))
    put(folder, model=model)
    with pytest.raises(RuntimeError, match=r"taesd_decoder\.safetensors gave NaN or infinity"):
        load().decode(latent())
