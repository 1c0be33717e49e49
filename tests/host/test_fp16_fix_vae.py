"""FP16-Fix VAE: the real architecture with activations beyond float16's range, and what the host makes of it."""

from __future__ import annotations

import os

import comfy.model_management as management
import comfy.sd
import hosted
import pytest
import small_models
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL, AutoencodingEngine
from hosted import execute
from test_compile_vae import compile_vae

import nodes as host_nodes

FULL = {**small_models.KL, "resolution": 256, "ch": 128, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
"""SD's and SDXL's."""

engine = hosted.engine("vae.fp16_fix_vae")
stages = hosted.engine("vae.stages")


def fix(vae, node_id="7", precision="fp16", method="rescale"):
    return execute("SlipstreamFP16FixVAE", node_id, vae=vae, precision=precision, method=method).result[0]


def enlarge(module, by=2.0**16):
    """Activations `by` times as large, the picture the same but for epsilons."""
    for name, part in module.named_modules():
        if name.endswith(("coder.conv_in", "conv2", "proj_out")):
            part.weight.mul_(by)
            part.bias.mul_(by)
        elif name.endswith(("nin_shortcut", "sample.conv")):
            part.bias.mul_(by)
    # What only a norm reads.
    module.decoder.up[3].block[0].conv1.weight.mul_(by)
    return module


def make(config=small_models.KL, is_large=False, seed=1):
    with torch.no_grad():
        params = {"ddconfig": config, "embed_dim": 4}
        autoencoder = AutoencoderKL(**params)
        small_models.initialize(autoencoder, seed)
        if is_large:
            enlarge(autoencoder)
        return comfy.sd.VAE(sd=autoencoder.state_dict(), config={"params": params})


@pytest.fixture(scope="module")
def full():
    """The real architecture, with activations beyond the range."""
    return make(FULL, is_large=True)


@pytest.fixture
def large():
    return make(is_large=True)


@pytest.fixture
def ordinary():
    return make()


@pytest.fixture
def sensitive(ordinary):
    """One whose first values overflow float16 with latents a thousand times as large as they should be."""
    with torch.no_grad():
        stages.module_of(ordinary).decoder.conv_in.weight.mul_(64)
    return ordinary


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def summing_in_float32(monkeypatch):
    """Convolutions of float16 values as GPUs compute them: sums in float32, results rounded. A CPU does the same, as
    `test_a_cpu_computes_float16_as_that` says, but a hundred times slower: with `--slow` it does."""
    if os.environ.get("SLIPSTREAM_SLOW"):
        return
    exact = torch.nn.functional.conv2d

    def conv2d(values, weight, bias=None, *args, **kwargs):
        if values.dtype != torch.float16:
            return exact(values, weight, bias, *args, **kwargs)
        return exact(values.float(), weight.float(), None if bias is None else bias.float(), *args, **kwargs).half()

    monkeypatch.setattr(torch.nn.functional, "conv2d", conv2d)


def latent(size=8, batch=1, seed=1):
    return torch.randn(batch, 4, size, size, generator=torch.Generator().manual_seed(seed)) / 0.13025


def pixels(size=64, batch=1):
    return torch.rand(batch, size, size, 3, generator=torch.Generator().manual_seed(2))


def decibels(value, expected):
    return float(10 * torch.log10((expected.max() - expected.min()) ** 2 / (value - expected).square().mean()))


def stage_of(vae):
    return vae.first_stage_model


# The real architecture


def test_rescaled_weights_give_the_same_in_float32(full):
    module = stages.module_of(full)
    copy = engine._copied(full)
    scalings = engine._scalings(full, copy)
    assert scalings["decoder"].peak > 65504
    assert scalings["encoder"].peak > 65504
    for name, scaling in scalings.items():
        coder = copy.get_submodule(name)
        engine.rescale_(coder, engine.layout(coder), scaling)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert decibels(copy.decode(latent()), module.decode(latent())) > 100
    assert decibels(copy.encode(image), module.encode(image)) > 100


def test_float16_overflows_without_and_is_right_with_rescaling(full, summing_in_float32):
    image, encoded = full.decode(latent()), full.encode(pixels())
    raw = engine._copied(full).half()
    assert not raw.decode(latent().half()).isfinite().all()
    assert not raw.encode(pixels().movedim(-1, 1).half() * 2 - 1).isfinite().all()
    fixed = fix(full)
    assert fixed.vae_dtype == torch.float16
    assert decibels(fixed.decode(latent()), image) > 45
    assert decibels(fixed.encode(pixels()), encoded) > 45
    assert not stage_of(fixed)._calls._again.total()


def test_a_cpu_computes_float16_as_that(large, monkeypatch, summing_in_float32):
    fixed = fix(large)
    expected = fixed.decode(latent(4))
    monkeypatch.undo()
    assert decibels(fixed.decode(latent(4)), expected) > 55


def test_an_ordinary_autoencoder_is_left_as_it_is(ordinary, last_lines):
    fixed = fix(ordinary)
    module, original = stages.module_of(fixed), stages.module_of(ordinary)
    for (name, weight), expected in zip(module.named_parameters(), original.parameters(), strict=True):
        assert torch.equal(weight, expected.half()), name
    ((_, text),) = last_lines("7")
    assert text.startswith("fp16, weights as they are: no activation is larger than ")


def test_flux_and_sd3_have_no_quantization_convolutions(summing_in_float32):
    config = {**small_models.KL, "z_channels": 16}
    paths = ("comfy.ldm.models.autoencoder", "comfy.ldm.modules.diffusionmodules.model")
    module = AutoencodingEngine(
        regularizer_config={"target": f"{paths[0]}.DiagonalGaussianRegularizer"},
        encoder_config={"target": f"{paths[1]}.Encoder", "params": config},
        decoder_config={"target": f"{paths[1]}.Decoder", "params": config},
    )
    small_models.initialize(module, 3)
    vae = make()
    vae.latent_channels = 16
    vae.first_stage_model = enlarge(module).eval()
    stages.give_patcher(vae, vae.first_stage_model)
    samples = torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)) / 0.3611
    assert decibels(fix(vae).decode(samples), vae.decode(samples)) > 45


# What the host sees


def test_the_vae_that_came_in_is_untouched_and_the_new_one_is_half_as_large(large, summing_in_float32):
    before = {name: value.clone() for name, value in large.get_sd().items()}
    state = dict(vars(large))
    fixed = fix(large)
    fixed.decode(latent())
    assert vars(large) == state
    assert all(torch.equal(value, before[name]) for name, value in large.get_sd().items())
    assert fixed.patcher is not large.patcher
    assert fixed.patcher.model is stages.module_of(fixed)
    assert all(weight.dtype == torch.float16 for weight in fixed.patcher.model.parameters())
    assert fixed.patcher.model_size() == fixed.model_size() == large.model_size() / 2
    shape = (1, 4, 128, 128)
    used = [vae.memory_used_decode(shape, vae.vae_dtype) for vae in (large, fixed)]
    assert used[1] == used[0] / 2


def test_it_is_unloaded_and_loaded_again(large, summing_in_float32):
    large.decode(latent())
    fixed = fix(large)
    expected = fixed.decode(latent())
    management.unload_all_models()
    assert torch.equal(fixed.decode(latent()), expected)
    dtype = getattr(fixed.patcher.model.decoder.conv_in, "weight_comfy_model_dtype", torch.float16)
    assert dtype == torch.float16


def test_tiles_are_not_told_as_images():
    calls = stages.Calls()
    calls.add("decode", 2, 1)
    assert calls.told("in fp32") == ["decoded 2 images, 1 of them again in fp32"]
    for _ in range(18):
        calls.add("decode", 1)
    calls.add("encode", 1)
    assert calls.told("in fp32") == ["decoded in 19 calls, 1 of them again in fp32", "encoded 1 image"]


def test_the_hosts_nodes_take_it(large, summing_in_float32):
    fixed = fix(large)
    (image,) = host_nodes.VAEDecode().decode(fixed, {"samples": latent()})
    (encoded,) = host_nodes.VAEEncode().encode(fixed, pixels())
    (tiled,) = host_nodes.VAEDecodeTiled().decode(fixed, {"samples": latent(16)}, 64, 32)
    assert image.shape == (1, 64, 64, 3)
    assert encoded["samples"].shape == (1, 4, 8, 8)
    assert tiled.shape == (1, 128, 128, 3)


def test_saving_it_saves_what_came_in(large):
    """A file keeps no epsilons."""
    saved = fix(large).get_sd()
    assert all(torch.equal(value, saved[name]) for name, value in large.get_sd().items())


def test_dynamic_vram_is_left_by_loading_the_weights_as_a_whole(full, summing_in_float32):
    """A stand-in for the host's class, which needs an NVIDIA GPU."""
    kind = type(full.patcher)
    full.patcher.__class__ = type("Dynamic", (kind,), {"is_dynamic": lambda self: True})
    try:
        fixed = fix(full)
    finally:
        full.patcher.__class__ = kind
    assert type(fixed.patcher) is engine.stages.ModelPatcher
    assert decibels(fixed.decode(latent(4)), full.decode(latent(4))) > 45


def test_measuring_is_remembered_by_weights(large, monkeypatch):
    engine._measured.clear()
    fix(large)
    monkeypatch.setattr(engine, "_peaks", lambda *_: pytest.fail("measured again"))
    fix(large)
    stages.module_of(large).decoder.conv_in.weight.mul_(2)
    with pytest.raises(pytest.fail.Exception, match="measured again"):
        fix(large)


# Precisions


def test_auto_changes_nothing_where_nothing_is_faster(large, last_lines):
    assert fix(large, precision="auto") is large
    expected = "changed nothing: it is in fp32 already, and this device has nothing faster"
    assert last_lines("7") == [("inert", expected)]


@pytest.mark.parametrize(
    ("has_fp16", "has_bf16", "came", "dtype", "told"),
    [
        (True, True, torch.float32, torch.float16, "weights 2 MiB instead of 5; 1024x1024 decoded in about 4.3 GiB"),
        (False, True, torch.float32, torch.bfloat16, "bf16, whose range needs no rescaling; weights 2 MiB instead"),
        (True, True, torch.bfloat16, torch.float16, "no gain in speed, this device computes bf16 as fast: a gain in"),
        (True, False, torch.float32, torch.float16, "weights 2 MiB instead of 5"),
        (True, False, torch.bfloat16, torch.float16, "faster than bf16, which this device does not compute fast"),
    ],
)
def test_auto_takes_what_the_device_computes_fast(
    large, monkeypatch, last_lines, has_fp16, has_bf16, came, dtype, told
):
    monkeypatch.setattr(management, "should_use_fp16", lambda *_, **__: has_fp16)
    monkeypatch.setattr(management, "should_use_bf16", lambda *_, **__: has_bf16)
    if came != torch.float32:
        large = fix(large, "1", "bf16")
        large.first_stage_model = stages.module_of(large)
    fixed = fix(large, precision="auto")
    assert fixed.vae_dtype == dtype
    assert told in last_lines("7")[0][1]


def test_slow_types_are_told(large, last_lines, summing_in_float32):
    fix(large).decode(latent())
    ((state, text),) = last_lines("7")
    assert state == "active"
    assert text.startswith("fp16, rescaled exactly: decoder by 1/")
    assert "this device does not compute fp16 fast" in text
    assert text.endswith("decoded 1 image")


def test_bf16_and_fp32_change_only_the_type(ordinary):
    half = fix(ordinary, precision="bf16")
    assert half.vae_dtype == torch.bfloat16
    assert decibels(half.decode(latent()), ordinary.decode(latent())) > 25
    again = fix(half, "8", precision="bf16")
    assert again is half
    wide = make()
    assert fix(wide, precision="fp32") is wide


@pytest.mark.parametrize("method", ["rescale", "as is"])
def test_what_is_in_float16_already_is_guarded_too(sensitive, last_lines, summing_in_float32, method):
    """As the host loads it with --fp16-vae."""
    half = fix(sensitive, "1", method="as is")
    half.first_stage_model = stages.module_of(half)
    fixed = fix(half, method=method)
    expected = sensitive.decode(latent() * 1e3)
    assert not half.decode(latent() * 1e3).isfinite().all()
    assert torch.allclose(fixed.decode(latent() * 1e3), expected, atol=2e-3)
    text = last_lines("7")[-1][1]
    assert text.startswith("fp16, weights as they are")
    assert text.endswith("; the same speed and memory; decoded 1 image, 1 of them again in fp32 since fp16 overflowed")


# What overflows nevertheless


def test_an_image_that_overflows_is_redone_and_the_others_are_not(sensitive, last_lines, summing_in_float32):
    fixed = fix(sensitive, method="as is")
    good, both = fixed.decode(latent()), torch.cat((latent(), latent() * 1e3))
    expected = sensitive.decode(both)
    image = fixed.decode(both)
    assert torch.allclose(image[:1], good, atol=2e-3)
    # The host rounds the latent.
    assert torch.allclose(image[1:], expected[1:], atol=1e-3)
    ((state, text),) = last_lines("7")[-1:]
    assert state == "active"
    assert text.endswith("decoded 2 images, 1 of them again in fp32 since fp16 overflowed")


def test_encoding_is_redone_too(large, last_lines, summing_in_float32):
    fixed = fix(large, method="as is")
    assert decibels(fixed.encode(pixels(batch=2)), large.encode(pixels(batch=2))) > 75
    assert last_lines("7")[-1][1].endswith("encoded 2 images, 2 of them again in fp32 since fp16 overflowed")


def test_what_came_in_float16_is_redone_in_float32(large, summing_in_float32):
    """The host itself runs in float16 when it is told to."""
    expected = large.decode(latent())
    half = fix(large, "1", method="as is")
    half.first_stage_model = stages.module_of(half)
    fixed = fix(half, method="rescale")
    # As if the measured values had been too small.
    engine._measured.clear()
    unscaled = stages.module_of(half).decoder
    stages.module_of(fixed).decoder.load_state_dict(unscaled.state_dict())
    assert decibels(fixed.decode(latent()), expected) > 45
    assert stage_of(fixed)._wide.vae_dtype == torch.float32


def test_a_vae_that_gives_nan_in_any_type_is_an_error_and_no_black_image(ordinary, last_lines):
    fixed = fix(ordinary, precision="bf16")
    stages.module_of(fixed).decoder.conv_out.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match=r"FP16-Fix VAE \(node 7\): the VAE itself gives NaN"):
        fixed.decode(latent())
    assert last_lines("7")[-1][0] == "failed"


@pytest.mark.parametrize(("what", "maker"), [("decode", "sampler"), ("encode", "node that made it")])
def test_nan_that_comes_in_is_told_apart(ordinary, last_lines, summing_in_float32, what, maker):
    fixed = fix(ordinary)
    values = {"decode": latent(), "encode": pixels()}[what]
    broken = values.clone()
    broken[0, 0, 0, 0] = float("nan")
    with pytest.raises(RuntimeError, match=rf"FP16-Fix VAE \(node 7\): expected a .* holds NaN .* {maker}"):
        getattr(fixed, what)(broken)
    assert last_lines("7")[-1][0] == "failed"
    getattr(fixed, what)(values)
    assert last_lines("7")[-1][0] == "active"


# Refusals


def test_other_autoencoders_are_refused(last_lines):
    with pytest.raises(
        RuntimeError, match=r"FP16-Fix VAE: .* but this one is a TAESD\. Take the node out: ComfyUI runs it in bf16 by"
    ):
        fix(small_models.vae())
    assert last_lines("7")[0][0] == "failed"


def test_an_autoencoder_with_other_parts_is_refused(ordinary):
    stages.module_of(ordinary).decoder.extra = torch.nn.Conv2d(3, 3, 1)
    with pytest.raises(RuntimeError, match="but of this one its Decoder has parts of another kind: extra"):
        fix(ordinary)


@pytest.mark.parametrize("what", ["forward", "_conv_forward", "padding_mode"])
def test_code_that_another_node_put_in_is_not_copied(ordinary, what):
    conv = stages.module_of(ordinary).decoder.mid.block_1.conv1
    setattr(conv, what, "circular" if what == "padding_mode" else getattr(conv, what))
    with pytest.raises(RuntimeError, match="another node replaced part of this one's code"):
        fix(ordinary)


@pytest.mark.parametrize(
    ("part", "value", "why"),
    [
        ("decoder.conv_in", float("nan"), "decoder.conv_in gives inf in float32 already: the file is damaged"),
        ("decoder.conv_out", 1e8, "decoder.conv_out reaches .* which no scale of other weights can change"),
    ],
)
def test_what_can_not_be_rescaled_is_refused(ordinary, part, value, why, last_lines):
    stages.module_of(ordinary).get_submodule(part).weight[0, 0, 0, 0] = value
    with pytest.raises(RuntimeError, match=f"can't be rescaled into float16's range: {why}.* Choose precision bf16"):
        fix(ordinary)
    assert last_lines("7")[0][0] == "failed"


def test_a_file_without_a_vae(last_lines):
    with pytest.raises(RuntimeError, match=r"FP16-Fix VAE: expected a VAE, but the file that was loaded holds none"):
        fix(comfy.sd.VAE(sd={}))
    assert last_lines("7")[0][0] == "failed"


def test_too_little_memory_to_measure_is_told_as_that(large, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "_peaks", fail)
    engine._measured.clear()
    with pytest.raises(torch.OutOfMemoryError, match=r"^CUDA out of memory$"):
        fix(large)


def test_what_dynamic_vram_keeps_on_the_module_is_not_copied(large):
    class Buffer:
        def __deepcopy__(self, memo):
            pytest.fail("it would be freed twice")

    module = stages.module_of(large)
    module.dynamic_pins, module.dynamic_patchers = {"cuda": Buffer()}, {id(large)}
    fixed = stages.module_of(fix(large))
    assert fixed.dynamic_pins == {}
    assert fixed.dynamic_patchers == set()
    assert list(module.dynamic_pins) == ["cuda"]


def test_weights_beyond_the_range_are_refused(ordinary):
    stages.module_of(ordinary).decoder.conv_in.weight[0, 0, 0, 0] = 1e6
    with pytest.raises(RuntimeError, match="some weights of this VAE exceed the range of fp16"):
        fix(ordinary, method="as is")


def test_products_beyond_the_range_are_computed_in_float32(ordinary, last_lines, summing_in_float32):
    attention = stages.module_of(ordinary).decoder.mid.attn_1
    attention.q.weight.mul_(400)
    attention.k.weight.mul_(400)
    expected = ordinary.decode(latent())
    fixed = fix(ordinary)
    assert "attention in fp32" in last_lines("7")[0][1]
    raw = engine._copied(ordinary).half()
    assert not raw.decode(latent().half()).isfinite().all()
    assert fixed.decode(latent()).isfinite().all()
    assert not stage_of(fixed)._calls._again.total()
    assert decibels(fixed.decode(latent()), expected) > 30


# With other nodes


def test_compiled_before_or_after_gives_the_same(large, summing_in_float32):
    before = fix(compile_vae(large, "1"), "2")
    after = compile_vae(fix(large, "2"), "1")
    for vae in (before, after):
        assert [type(stage).__name__ for stage in stages.of(vae)] == ["FixedStage", "CompiledStage"]
        assert [stage.node.id for stage in stages.of(vae)] == ["2", "1"]
        assert stages.module_of(vae) is vae.patcher.model
    image = before.decode(latent())
    assert torch.equal(after.decode(latent()), image)
    assert decibels(image, large.decode(latent())) > 45


@pytest.mark.parametrize("direction", ["decode", "encode"])
def test_by_tiles_it_is_redone_by_tiles(large, last_lines, summing_in_float32, direction):
    fixed = fix(large, method="as is")
    if direction == "decode":
        expected = large.decode(latent(16))
        tiled, inputs = "SlipstreamVAEDecodeTiled", {"samples": {"samples": latent(16)}}
    else:
        expected = large.encode(pixels(128))
        tiled, inputs = "SlipstreamVAEEncodeTiled", {"pixels": pixels(128)}
    coder = getattr(stages.module_of(large), direction + "r")
    coder.register_forward_pre_hook(lambda *_: pytest.fail("as a whole"))
    result = execute(tiled, "8", vae=fixed, tile_size=64, **inputs).result[0]
    result = result if direction == "decode" else result["samples"]
    assert decibels(result, expected) > 75
    assert last_lines("7")[-1][1].endswith(f"{direction}d 1 image, 1 of them again in fp32 since fp16 overflowed")
    assert last_lines("8")[-1][1].startswith("exact: 4 tiles of 64x64")


def test_both_tell_what_they_did(large, last_lines, summing_in_float32):
    compile_vae(fix(large, "2"), "1").decode(latent())
    assert last_lines("1")[-1][1].startswith("eager: the VAE in 1 graph")
    assert last_lines("2")[-1][1].endswith("decoded 1 image")


def test_twice_with_equal_settings_is_once_and_with_others_refused(large, last_lines):
    fixed = compile_vae(fix(large, "1"), "2")
    assert fix(fixed, "3") is fixed
    assert last_lines("3") == [("inert", "node 1 does the same to this VAE already, and says what became of it")]
    with pytest.raises(ValueError, match="node 4 and node 1 change the precision of the same VAE with different"):
        fix(fixed, "4", precision="bf16")
