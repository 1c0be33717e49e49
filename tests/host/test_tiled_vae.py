"""VAE Decode and Encode Tiled: the same pixels and latents as whole, in the host, with what it has to say about it."""

from __future__ import annotations

import sys

import comfy.model_management
import comfy.ops
import comfy.utils
import pytest
import small_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from comfy.model_patcher import ModelPatcher
from hosted import NODES, engine, execute, method
from loading import ROOT

sys.path.insert(0, str(ROOT / "training"))

from scenes import draw, render
from tiling import decibel, seam_energy

DECODE, ENCODE = "SlipstreamVAEDecodeTiled", "SlipstreamVAEEncodeTiled"
every_statistics = pytest.mark.parametrize("statistics", ["exact", "estimated"])


def decode(vae, latent, **settings):
    return execute(DECODE, samples={"samples": latent}, vae=vae, **settings).result[0]


def encode(vae, pixels, **settings):
    return execute(ENCODE, pixels=pixels, vae=vae, **settings).result[0]["samples"]


def latent(height=16, width=16, batch=1, channels=4):
    values = torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))
    # No two tiles have the same statistics.
    return values + torch.linspace(-2, 2, width)


def pixels(height=128, width=128, batch=1, channels=3):
    values = torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(2))
    return values * torch.linspace(0.2, 1, width)[:, None]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def kl():
    return small_models.kl_vae()


@pytest.fixture(scope="module")
def trained():
    return small_models.trained_vae()


@pytest.fixture(scope="module")
def landscape(trained):
    """A picture of 512x384 with sky, land and a house, its latent, and how it is decoded whole."""
    with torch.inference_mode():
        picture = render(draw([7_000_011]), 512)[:, :, 64:448].movedim(1, -1)
        encoded = trained.encode(picture)
        return picture, encoded, trained.decode(encoded)


# The same as whole


@pytest.mark.parametrize("tile_size", [64, 72, 128, 1024])
@pytest.mark.parametrize(("height", "width", "batch"), [(16, 16, 1), (17, 25, 1), (20, 9, 2)])
def test_exact_decodes_what_the_host_decodes(kl, tile_size, height, width, batch):
    samples = latent(height, width, batch)
    result = decode(kl, samples, tile_size=tile_size)
    expected = kl.decode(samples)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert decibel(result, expected) > 100


@pytest.mark.parametrize("tile_size", [64, 72, 1024])
@pytest.mark.parametrize(("height", "width", "batch"), [(128, 128, 1), (136, 203, 1), (150, 77, 2)])
def test_exact_encodes_what_the_host_encodes(kl, tile_size, height, width, batch):
    """Cropped as the host crops, too."""
    image = pixels(height, width, batch, channels=4)
    result = encode(kl, image, tile_size=tile_size)
    expected = kl.encode(image)
    assert (result.shape, result.dtype, result.device) == (expected.shape, expected.dtype, expected.device)
    assert decibel(result, expected) > 100


@every_statistics
def test_the_full_architecture(statistics):
    vae = small_models.full_vae()
    samples, image = latent(13, 17), pixels(104, 136)
    bound = {"exact": 100, "estimated": 35}[statistics]
    settings = {"tile_size": 64, "statistics": statistics}
    assert decibel(decode(vae, samples, **settings), vae.decode(samples)) > bound
    assert decibel(encode(vae, image, **settings), vae.encode(image)) > bound


@pytest.mark.parametrize("tile_size", [128, pytest.param(200, marks=pytest.mark.long)])
def test_pictures_by_tiles(trained, landscape, tile_size, last_lines):
    """The bounds on weights that were trained, whose statistics differ from place to place: no seam either."""
    picture, encoded, whole = landscape
    assert decibel(whole, picture) > 25
    exact = decode(trained, encoded, tile_size=tile_size)
    assert last_lines("7")[-1][1].startswith("exact: ")
    estimated = decode(trained, encoded, tile_size=tile_size, statistics="estimated")
    text = last_lines("7")[-1][1]
    assert text.startswith("estimated: ")
    assert "within 56 more pixels on each side, norms as of a quarter of the pixels" in text
    assert decibel(exact, whole) > 100
    assert decibel(estimated, whole) > 40
    for result, rel in ((exact, 1e-3), (estimated, 0.05)):
        assert seam_energy(result, tile_size) == pytest.approx(seam_energy(whole, tile_size), rel=rel)
    hosts = trained.decode_tiled(encoded, tile_x=tile_size // 8, tile_y=tile_size // 8, overlap=4)
    assert decibel(hosts, whole) < decibel(estimated, whole)


@pytest.mark.parametrize("tile_size", [128, 256])
def test_latents_by_tiles(trained, landscape, tile_size):
    picture, encoded, _ = landscape
    assert decibel(encode(trained, picture, tile_size=tile_size), encoded) > 100
    assert decibel(encode(trained, picture, tile_size=tile_size, statistics="estimated"), encoded) > 45


def test_the_shift_of_colours_is_the_stated_one(trained, landscape):
    """Over the whole picture, in each channel."""
    _, encoded, whole = landscape
    estimated = decode(trained, encoded, tile_size=256, statistics="estimated")
    assert (estimated - whole).mean((0, 1, 2)).abs().max() < 0.01


@every_statistics
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_precisions(kl, statistics, dtype):
    """As near to float32 as the host's own decoding in that type."""
    vae = small_models.kl_vae()
    vae.first_stage_model.to(dtype)
    vae.vae_dtype = dtype
    samples = latent(12, 16)
    expected = kl.decode(samples)
    own = decibel(decode(vae, samples, tile_size=64, statistics=statistics), expected)
    assert own > decibel(vae.decode(samples), expected) - 3


@every_statistics
def test_weights_that_the_host_casts_as_they_are_used(kl, statistics, monkeypatch):
    """As with DynamicVRAM, or when a model is loaded in part."""
    expected = decode(kl, latent(), tile_size=64, statistics=statistics)
    vae = small_models.kl_vae()
    # Loading takes such functions off.
    decode(vae, latent(), tile_size=64)
    for layer in vae.first_stage_model.modules():
        if isinstance(layer, comfy.ops.CastWeightBiasOp):
            layer.comfy_cast_weights = True
            layer.weight_function = [lambda weight: weight * 2]
            layer.weight.data /= 2
    assert decibel(decode(vae, latent(), tile_size=64, statistics=statistics), expected) > 100


# Other autoencoders


def engine_vae():
    """As SD 3's and Flux's: without the convolutions at the latent."""
    part = "comfy.ldm.modules.diffusionmodules.model"
    module = AutoencodingEngine(
        encoder_config={"target": f"{part}.Encoder", "params": small_models.KL},
        decoder_config={"target": f"{part}.Decoder", "params": small_models.KL},
        regularizer_config={"target": "comfy.ldm.models.autoencoder.DiagonalGaussianRegularizer"},
    )
    return module


def normed_vae():
    """As Flux 2's: pixels of the latent are channels, and normed."""
    return AutoencoderKL(ddconfig={**small_models.KL, "batch_norm_latent": True}, embed_dim=4)


@pytest.mark.parametrize(("make", "channels", "ratio"), [(engine_vae, 4, 8), (normed_vae, 16, 16)])
def test_autoencoders_with_other_ends(kl, make, channels, ratio):
    module = make().eval()
    small_models.initialize(module, 3)
    vae = small_models.kl_vae()
    vae.first_stage_model, vae.patcher = module, ModelPatcher(module, small_models.CPU, small_models.CPU)
    vae.latent_channels, vae.downscale_ratio, vae.upscale_ratio = channels, ratio, ratio
    samples = latent(128 // ratio, 192 // ratio, channels=channels)
    assert decibel(decode(vae, samples, tile_size=64), vae.decode(samples)) > 100
    assert decibel(encode(vae, pixels(), tile_size=64), vae.encode(pixels())) > 100


def test_a_tiny_vae_is_left_to_the_host(last_lines):
    vae = small_models.vae()
    samples = latent(72, 32)
    expected = vae.decode_tiled(samples, tile_x=64, tile_y=64, overlap=8)
    assert torch.equal(decode(vae, samples), expected)
    ((state, text),) = last_lines("7")
    assert state == "inert"
    assert text.startswith("left to ComfyUI's own tiling, which averages overlapping tiles: this VAE (TAESD)")
    assert torch.equal(encode(vae, pixels()), vae.encode_tiled(pixels(), tile_x=512, tile_y=512, overlap=64))


def test_a_vae_of_video_is_left_to_the_host(monkeypatch, last_lines):
    vae = small_models.kl_vae()
    vae.latent_dim = 3
    vae.upscale_ratio = (lambda frames: frames * 4 - 3, 8, 8)
    vae.upscale_index_formula = (4, 8, 8)
    called = {}

    def decode_tiled(samples, **arguments):
        called.update(arguments)
        return torch.zeros(1, 5, 64, 64, 3)

    monkeypatch.setattr(vae, "decode_tiled", decode_tiled)
    assert decode(vae, latent()[:, :, None], tile_size=256).shape == (5, 64, 64, 3)
    assert called == {"tile_x": 32, "tile_y": 32, "overlap": 8, "tile_t": 16, "overlap_t": 2}
    assert "this VAE is for video or sound" in last_lines("7")[0][1]


def test_an_image_too_small_to_estimate_from_is_exact_and_says_so(kl, last_lines):
    samples = latent(15, 40)
    result = decode(kl, samples, tile_size=64, statistics="estimated")
    assert decibel(result, kl.decode(samples)) > 100
    text = last_lines("7")[-1][1]
    assert text.startswith("exact: 10 tiles of 64x60, as if decoded whole, since the image is too small for estimated")


def test_memory_that_runs_out_beside_the_tiles_makes_no_tiles_of_tiles(kl, last_lines):
    """The host would catch it, and decode tiles of its own by ours."""
    vae = small_models.kl_vae()

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = vae.first_stage_model.post_quant_conv.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"VAE Decode Tiled: out of memory beside the tiles\. Free some, make the"):
        decode(vae, latent(), tile_size=64)
    handle.remove()
    assert last_lines("7")[-1][0] == "failed"
    assert decibel(decode(vae, latent(), tile_size=64), kl.decode(latent())) > 100


def test_where_the_host_does_not_trust_torchs_attention(kl, monkeypatch):
    part = engine("vae.tiled_vae")
    monkeypatch.setattr(comfy.model_management, "pytorch_attention_enabled_vae", lambda: False)
    monkeypatch.setattr(comfy.model_management, "xformers_enabled_vae", lambda: False)
    called = []
    monkeypatch.setattr(part, "attend_in_slices", lambda *_: called.append(1) or torch.zeros(1))
    part._attend_on(torch.device("cuda"))(kl.first_stage_model.decoder.mid.attn_1, *torch.zeros(3, 1, 2, 4))
    assert called


@pytest.mark.parametrize("change", ["code", "attention", "tanh"])
def test_a_network_that_is_not_the_hosts_is_left_to_the_host(change, last_lines):
    vae = small_models.kl_vae(**({"attn_resolutions": [32]} if change == "attention" else {}))
    decoder = vae.first_stage_model.decoder
    if change == "code":
        decoder.forward = decoder.forward
    if change == "tanh":
        decoder.tanh_out = True
    assert torch.equal(decode(vae, latent()), vae.decode_tiled(latent(), tile_x=64, tile_y=64, overlap=8))
    assert last_lines("7")[0][0] == "inert"


def test_a_compiled_vae(kl, last_lines):
    compiled = execute("SlipstreamCompileVAE", "3", vae=small_models.kl_vae(), backend={"backend": "eager"}).result[0]
    assert decibel(decode(compiled, latent(), tile_size=64), kl.decode(latent())) > 100
    assert "Compile VAE (node 3) is not used: layers are called one by one" in last_lines("7")[0][1]


# What comes in


@every_statistics
def test_the_vae_that_came_in_is_untouched(statistics):
    vae = small_models.kl_vae()
    before = dict(vae.__dict__)
    weights = {name: value.clone() for name, value in vae.get_sd().items()}
    modules = list(vae.first_stage_model.named_modules())
    samples = latent()
    kept = samples.clone()
    decode(vae, samples, tile_size=64, statistics=statistics)
    encode(vae, pixels(), tile_size=64, statistics=statistics)
    assert vae.__dict__ == before
    assert list(vae.first_stage_model.named_modules()) == modules
    assert all(torch.equal(value, weights[name]) for name, value in vae.get_sd().items())
    assert torch.equal(samples, kept)


def test_batches(kl, last_lines):
    samples, image = latent(12, 16, 3), pixels(96, 128, 3)
    for slicing, told in ((True, "3 images, one at a time: "), (False, "3 images, together: ")):
        settings = {"tile_size": 64, "batch_slicing": slicing}
        assert decibel(decode(kl, samples, **settings), kl.decode(samples)) > 100
        assert last_lines("7")[0][1].startswith(told)
        assert decibel(encode(kl, image, **settings), kl.encode(image)) > 100


def test_latents_with_a_time_axis_and_nested_ones(kl):
    expected = kl.decode(latent())
    assert decibel(decode(kl, latent()[:, :, None], tile_size=64), expected) > 100

    class Nested:
        is_nested = True

        def unbind(self):
            return latent(), torch.zeros(1)

    assert decibel(decode(kl, Nested(), tile_size=64), expected) > 100


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        (latent(channels=16), {}, "decodes latents of 4 channels, but this one has 16. Load the VAE that belongs"),
        (latent() * float("nan"), {}, "the latent has NaN or infinite values"),
        (latent(), {"tile_size": 32}, "tile_size should be 0, or a multiple of 8 from 64 up, but is 32"),
        (latent(), {"tile_size": 100}, "tile_size should be 0, or a multiple of 8 from 64 up, but is 100"),
    ],
)
def test_what_cannot_be_decoded_is_refused_and_the_next_one_runs(kl, last_lines, samples, settings, message):
    with pytest.raises(ValueError, match=message):
        decode(kl, samples, **settings)
    ((state, text),) = last_lines("7")
    assert state == "failed"
    assert message in text
    decode(kl, latent())
    assert last_lines("7")[-1][0] == "active"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (pixels(channels=1), "three channels and at least 8x8 pixels, but one of 1 and 128x128"),
        (pixels(4, 100), "three channels and at least 8x8 pixels, but one of 3 and 100x4"),
        (pixels() / 0, "the picture has NaN or infinite values"),
    ],
)
def test_what_cannot_be_encoded_is_refused(kl, image, message):
    with pytest.raises(ValueError, match=message):
        encode(kl, image)


def test_a_latent_that_overflows_is_an_error_and_no_black_image(last_lines):
    vae = small_models.kl_vae()
    vae.first_stage_model.to(torch.float16)
    vae.vae_dtype = torch.float16
    vae.first_stage_model.decoder.conv_in.weight.data *= 1e5
    with pytest.raises(RuntimeError, match=r"this VAE gives them in float16\. Put an FP16-Fix VAE before it"):
        decode(vae, latent(8, 8))
    assert last_lines("7")[0][0] == "failed"


# What it tells


def test_the_verdict(kl, last_lines):
    decode(kl, latent(16, 20), tile_size=64)
    ((state, text),) = last_lines("7")
    assert state == "active"
    assert text.startswith("exact: 6 tiles of 54x64, as if decoded whole; ")
    decode(kl, latent(16, 20), tile_size=512)
    assert last_lines("7")[-1][1].startswith("exact: 1 tile of 160x128, since the image is no larger; ")
    encode(kl, pixels(128, 160), tile_size=64)
    assert last_lines("7")[-1][1].startswith("exact: 6 tiles of 54x64, as if encoded whole; ")


def test_the_bar_fills(kl):
    told = []
    comfy.utils.set_progress_bar_global_hook(lambda value, total, *_, **__: told.append((value, total)))
    try:
        decode(kl, latent(16, 20, 2), tile_size=64)
        encode(kl, pixels(), tile_size=64, statistics="estimated")
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    for expected in (2000, 1000):
        # The host leaves out what comes too fast.
        values = [value for value, total in told if total == expected]
        assert values == sorted(values)
        assert len(values) > 1
        assert values[-1] == expected


@every_statistics
def test_it_can_be_interrupted(kl, statistics, last_lines):
    def interrupt(value, total, *_, **__):
        if value > total / 2:
            comfy.model_management.interrupt_current_processing()

    comfy.utils.set_progress_bar_global_hook(interrupt)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            decode(kl, latent(16, 20), tile_size=64, statistics=statistics)
    finally:
        comfy.utils.set_progress_bar_global_hook(None)
    assert last_lines("7")[0][0] == "interrupted"
    decode(kl, latent(), tile_size=64)
    assert last_lines("7")[-1][0] == "active"


# Memory


@pytest.fixture
def little_memory(monkeypatch):
    """A device on which tiles of more than 100 pixels do not fit."""
    tiler = method("tiled_vae").Tiler
    exact = tiler.exact

    def limited(self, values):
        if self._side > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return exact(self, values)

    monkeypatch.setattr(tiler, "exact", limited)
    return monkeypatch


def test_out_of_memory_makes_tiles_smaller(kl, little_memory, last_lines):
    assert decibel(decode(kl, latent(32, 32), tile_size=256), kl.decode(latent(32, 32))) > 100
    ((state, text),) = last_lines("7")
    assert state == "active"
    assert text.startswith("exact: 16 tiles of 64x64")
    assert "out of memory with tiles of 256 and of 128, so they were made smaller" in text


def test_out_of_memory_with_the_smallest_tiles_is_an_error(kl, little_memory, last_lines):
    def fail(self, values):
        raise RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")

    with little_memory.context() as patch:
        patch.setattr(method("tiled_vae").Tiler, "exact", fail)
        with pytest.raises(RuntimeError, match=r"out of memory even with tiles of 64x64 pixels\. Set statistics to"):
            decode(kl, latent(), tile_size=256)
    assert last_lines("7")[0][0] == "failed"
    decode(kl, latent(), tile_size=64)
    assert last_lines("7")[-1][0] == "active"


def test_other_errors_are_no_lack_of_memory(kl, monkeypatch):
    def fail(self, values):
        raise RuntimeError("broken")

    monkeypatch.setattr(method("tiled_vae").Tiler, "exact", fail)
    with pytest.raises(RuntimeError, match=r"^broken$"):
        decode(kl, latent())


@pytest.mark.parametrize(("suffices_for", "side"), [(1024, 1024), (768, 768), (512, 512), (256, 256), (64, 256)])
def test_tiles_are_what_fits_the_free_memory(kl, monkeypatch, last_lines, suffices_for, side):
    part, tiler = engine("vae.tiled_vae"), method("tiled_vae").Tiler
    network = method("tiled_vae").decoder_network(kl.first_stage_model.decoder)
    needed = part.MARGIN * 4 * network.on_device(method("tiled_vae").Region(0, 0, 1024, 1024), suffices_for, "exact")
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, **__: needed / part.SHARE * 1.01)
    seen = []
    monkeypatch.setattr(tiler, "exact", lambda self, values: seen.append(self._side) or torch.zeros(1, 3, 1024, 1024))
    decode(kl, latent(128, 128))
    assert seen == [side]


def test_the_host_is_asked_for_what_tiles_need(kl, monkeypatch):
    """And not for what the whole would, for which it would take the diffusion model off the device."""
    asked = []
    load = comfy.model_management.load_models_gpu
    monkeypatch.setattr(
        comfy.model_management,
        "load_models_gpu",
        lambda models, memory_required=0, **options: asked.append(memory_required) or load(models, **options),
    )
    decode(kl, latent(48, 48), tile_size=64)
    kl.decode(latent(48, 48))
    *tiled, whole = asked
    assert max(tiled) < whole / 20


def test_ram_that_does_not_suffice_is_told_before_it_is_taken(kl, monkeypatch):
    memory = engine("vae.tiled_vae").psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(engine("vae.tiled_vae").psutil, "virtual_memory", lambda: memory)
    with pytest.raises(RuntimeError, match=r"feature maps of \d+ MiB wait in RAM, of which 1 MiB are free. Set stat"):
        decode(kl, latent(32, 32), tile_size=64)


def test_the_schema_is_the_same_in_both_directions():
    decode_inputs, encode_inputs = (
        [entry.id for entry in NODES[name].define_schema().inputs] for name in (DECODE, ENCODE)
    )
    assert decode_inputs[1:] == encode_inputs[1:] == ["vae", "tile_size", "statistics", "batch_slicing"]
