"""Precision in the real host: the bits of the host's own way, and nothing of it left on the model."""

from __future__ import annotations

import comfy.ldm.modules.attention
import comfy.model_management
import hosted
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from hosted import (
    CONFIGS,
    PlantedError,
    add_lora,
    compile_model,
    controlnet,
    hooked_prompt,
    prompt,
    relative_error,
    run_node,
    sample,
    with_control,
)
from torch.utils._python_dispatch import TorchDispatchMode

FAMILIES = [*CONFIGS, "DiT"]


def precision(patcher, node_id="1", **values):
    values = {"compute_dtype": "bf16", "channels_last": "off", **values}
    return run_node("SlipstreamPrecision", patcher, node_id, **values)


def host_s_own(patcher, dtype=torch.bfloat16):
    """Core's ModelComputeDtype: every weight is cast at every use."""
    clone = patcher.clone()
    clone.set_model_compute_dtype(dtype)
    return clone


@pytest.fixture
def with_fp16(monkeypatch):
    """As on a processor that has it: PyTorch's stand-in is slow, and right."""
    monkeypatch.setattr(hosted.method("precision"), "has_fp16", lambda: True)


class Products(TorchDispatchMode):
    """Notes the dtypes of what is multiplied, and how convolutions' results lie in memory."""

    # In inference mode torch takes the first two apart only behind this.
    NAMES = ("conv2d", "linear", "convolution", "mm", "addmm")
    OF_ATTENTION = ("matmul", "bmm", "baddbmm", "scaled_dot_product_attention")

    def __init__(self):
        super().__init__()
        self.dtypes, self.of_attention, self.layouts = set(), set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        name = function.__name__.split(".")[0]
        seen = self.dtypes if name in self.NAMES else self.of_attention if name in self.OF_ATTENTION else set()
        seen.update(arg.dtype for arg in args if isinstance(arg, torch.Tensor))
        if name in ("conv2d", "convolution") and output.shape[1] > 4 and min(output.shape[2:]) > 1:
            self.layouts.add(output.is_contiguous(memory_format=torch.channels_last))
        return output


# Bits and bounds


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *(
            pytest.param(name, "bf16", marks=[pytest.mark.long] * (name in ("SSD1B", "SDXLRefiner")))
            for name in FAMILIES
        ),
        ("minimal", "fp16"),
    ],
)
def test_it_has_the_bits_of_the_host_s_own_way(family, dtype, with_fp16):
    model = hosted.model(family)
    expected = sample(host_s_own(model, {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]), steps=2)
    assert torch.equal(sample(precision(model, compute_dtype=dtype), steps=2), expected)


BOUNDS = {
    # relative error of a UNet's latent against fp32, after one step and after six
    ("fp32", "on"): (2e-6, 2e-6),
    ("bf16", "off"): (1e-2, 1e-2),
    ("bf16", "on"): (1e-2, 1e-2),
    ("fp16", "off"): (2e-3, 2e-3),
    ("fp16", "on"): (2e-3, 2e-3),
}
OF_A_DIT = 3
"""How many times as far off a diffusion transformer may be."""


@pytest.mark.parametrize(
    ("family", "steps"),
    [*((name, 1) for name in FAMILIES), ("SD15", 6), pytest.param("SDXL", 6, marks=pytest.mark.long)],
)
def test_the_error_against_fp32_is_bounded(family, steps, with_fp16):
    model = hosted.model(family)
    exact = sample(model, steps=steps)
    for (dtype, channels_last), bounds in BOUNDS.items():
        # PyTorch's stand-in for fp16 takes a hundred times as long.
        if dtype == "fp16" and (steps > 1 or family not in ("SD15", "SDXL", "DiT")):
            continue
        changed = precision(model, compute_dtype=dtype, channels_last=channels_last)
        error = relative_error(sample(changed, steps=steps), exact)
        print(f"{family} {dtype} channels_last {channels_last} {steps} steps: {error:.1e}")
        assert error < bounds[steps > 1] * (OF_A_DIT if family == "DiT" else 1)
        # A diffusion transformer has no convolution that the layout would matter to.
        assert error > 0 or (family, dtype) == ("DiT", "fp32")


def test_the_error_of_fp16_over_six_steps_is_bounded(with_fp16):
    model = hosted.model("minimal")
    error = relative_error(sample(precision(model, compute_dtype="fp16")), sample(model))
    print(f"minimal fp16 six steps: {error:.1e}")
    assert 0 < error < BOUNDS["fp16", "off"][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_on_a_cpu_computes_in_bf16(family):
    """The host's own flag stores bf16 and multiplies fp32."""
    model = hosted.model(family)
    with Products() as plain:
        sample(model, steps=1)
    with Products() as seen:
        sample(precision(model), steps=1)
    assert plain.dtypes == plain.of_attention == {torch.float32}
    assert seen.dtypes == {torch.bfloat16}
    # The host computes the products of SD 2.x's attention in fp32 whatever the rest is in: they overflow fp16.
    assert torch.bfloat16 in seen.of_attention
    assert family == "SD20" or seen.of_attention == {torch.bfloat16}


@pytest.mark.parametrize("family", CONFIGS)
def test_the_transformers_alone_compute_in_bf16_and_lose_less(family):
    """Linear layers in them and their 1x1 projections; what goes from block to block stays fp32."""
    model = hosted.model(family)
    exact, weights = sample(model, steps=1), {key: value.clone() for key, value in model.model_state_dict().items()}
    dtypes = {}

    def note(path):
        return lambda module, args, output: dtypes.setdefault(path, set()).update((args[0].dtype, output.dtype))

    unet = model.model.diffusion_model
    layers = {path: part for path, part in unet.named_modules() if isinstance(part, (torch.nn.Linear, torch.nn.Conv2d))}
    handles = [part.register_forward_hook(note(path)) for path, part in layers.items()]
    changed = precision(model, scope="transformers")
    result = sample(changed, steps=1)
    for handle in handles:
        handle.remove()
    for path, seen in dtypes.items():
        is_inside = "transformer_blocks" in path or path.endswith(("proj_in", "proj_out"))
        assert seen == {torch.bfloat16 if is_inside else torch.float32}, path
    error, of_all = relative_error(result, exact), relative_error(sample(precision(model), steps=1), exact)
    print(f"{family}: transformers {error:.1e}, model {of_all:.1e}")
    assert 0 < error < min(of_all, 5e-3)
    assert not any(type(part).__name__ == "_Border" for part in unet.modules())
    assert all(torch.equal(value, weights[key]) for key, value in model.model_state_dict().items())
    assert torch.equal(sample(model, steps=1), exact)


def test_the_transformers_alone_with_everything_else(model):
    """Joined projections, graphs, LoRA, ControlNet and DeepCache, in two orders of wiring."""
    changed, images = add_lora(model), []
    nodes = [
        lambda patcher: precision(patcher, "1", scope="transformers"),
        lambda patcher: run_node("SlipstreamAttention", patcher, "2", backend="math", fuse_qkv=True),
        lambda patcher: compile_model(patcher, "3"),
        lambda patcher: run_node("SlipstreamDeepCache", patcher, "4", cache_interval=2),
    ]
    control = controlnet(model)
    positive, negative = (with_control(prompt(model, seed), control, both=True) for seed in (10, 11))
    for order in (nodes, nodes[::-1]):
        patcher = changed
        for node in order:
            patcher = node(patcher)
        images += [sample(patcher, positive, negative) for _ in range(2)]
    assert all(torch.equal(image, images[0]) for image in images)
    exact = sample(run_node("SlipstreamDeepCache", changed, "4", cache_interval=2), positive, negative)
    assert 0 < relative_error(images[0], exact) < 1e-2


@pytest.mark.parametrize("scope", ["model", "transformers"])
def test_what_replaces_attention_gets_what_it_expects(scope, model):
    """As IPAdapter: keys and values of its own, in the dtype that the host computes in."""
    own, replaced = torch.randn(1, 4, 64, generator=torch.Generator().manual_seed(2)), model.clone()
    dtypes = set()

    def replace(q, k, v, extra):
        dtypes.update((q.dtype, k.dtype, v.dtype))
        keys = own[..., : q.shape[-1]].expand(q.shape[0], -1, -1)
        plain = comfy.ldm.modules.attention.optimized_attention
        return plain(q, k, v, extra["n_heads"]) + plain(q, keys, keys, extra["n_heads"])

    for block in (("input", 1), ("output", 3)):
        replaced.set_model_attn2_replace(replace, *block)
    exact = sample(replaced, steps=1)
    assert relative_error(sample(precision(replaced, scope=scope), steps=1), exact) < 1e-2
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("channels_last", ["on", "off"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_convolutions_lie_as_they_were_asked_to(dtype, channels_last, model):
    with Products() as seen:
        sample(precision(model, compute_dtype=dtype, channels_last=channels_last), steps=1)
    assert seen.layouts == {channels_last == "on"}


def test_a_model_that_is_stored_in_bf16_computes_in_it_too(model):
    """What ``--bf16-unet`` makes of a model on a CPU: stored in bf16, computed in fp32. No weight is copied."""
    model.model.diffusion_model.to(torch.bfloat16)
    model.model.diffusion_model.dtype = torch.bfloat16
    model.set_model_compute_dtype(torch.float32)
    with Products() as plain:
        sample(model, steps=1)
    assert plain.dtypes == {torch.float32}
    with Products() as seen:
        sample(precision(model), steps=1)
    assert seen.dtypes == {torch.bfloat16}


def test_auto_takes_bf16_where_the_processor_has_it(model, monkeypatch, last_lines):
    for has_bf16 in (True, False):
        monkeypatch.setattr(hosted.method("precision"), "has_bf16", lambda has_bf16=has_bf16: has_bf16)
        with Products() as seen:
            sample(run_node("SlipstreamPrecision", model, "1"), steps=1)
        assert seen.dtypes == {torch.bfloat16 if has_bf16 else torch.float32}
        assert last_lines("1")[0][0] == ("active" if has_bf16 else "inert")


# What it meets


def edit(patcher):
    with torch.no_grad():
        unet = patcher.model.diffusion_model
        unet.input_blocks[1][1].transformer_blocks[0].attn1.to_v.weight.mul_(3)
        unet.input_blocks[1][0].in_layers[2].weight.data = unet.input_blocks[1][0].in_layers[2].weight.data * 3
    return patcher


@pytest.mark.parametrize("change", [add_lora, lambda p: add_lora(p, seed=4, strength=0.9), edit])
@pytest.mark.parametrize("channels_last", ["on", "off"])
def test_lora_and_changed_weights_are_followed(change, channels_last, model):
    fast = precision(model, channels_last=channels_last)
    before = sample(fast, steps=2)
    changed = change(fast)
    expected = sample(host_s_own(change(model) if change is not edit else model), steps=2)
    after = sample(changed, steps=2)
    assert relative_error(after, before) > 0.05
    assert relative_error(after, expected) < (1e-2 if channels_last == "on" else 1e-12)
    if change is not edit:
        assert torch.equal(sample(fast, steps=2), before)


@pytest.mark.parametrize("keyframed", [False, True])
def test_lora_by_hooks_is_followed_within_the_run(keyframed, model):
    """On one prompt alone, so the weights change in each step; and with a strength that changes."""
    strengths = {0.0: 1.0, 0.4: 0.3, 0.7: 1.5} if keyframed else None
    plain = sample(precision(model), steps=4)
    expected = sample(host_s_own(model), hooked_prompt(model, strengths), steps=4)
    assert relative_error(expected, plain) > 0.01
    assert torch.equal(sample(precision(model), hooked_prompt(model, strengths), steps=4), expected)
    assert torch.equal(sample(precision(model), steps=4), plain)


def test_a_model_that_is_loaded_in_part_is_cast_at_each_use(model, monkeypatch, last_lines):
    """As on a card that is too small: the host patches and casts some weights as they are used."""
    load = ModelPatcher.partially_load
    limited = lambda self, device, extra_memory=0, **kwargs: load(self, device, 4 * 2**20, **kwargs)  # noqa: E731
    whole = sample(add_lora(precision(model)))
    model.detach()
    monkeypatch.setattr(ModelPatcher, "partially_load", limited)
    assert relative_error(sample(add_lora(precision(model))), whole) < 1e-2
    assert model.model.model_lowvram
    _, text = last_lines("1")[-1]
    assert "layers are cast at each use (they are patched as they are used, since the model is loaded in part" in text
    model.detach()


def test_controlnet_and_batches(model):
    net = controlnet(model)
    positive, negative = (with_control(prompt(model, seed), net, both=True) for seed in (10, 11))
    expected = sample(host_s_own(model), positive, negative, image=hosted.latent(model, batch=2))
    assert torch.equal(sample(precision(model), positive, negative, image=hosted.latent(model, batch=2)), expected)


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_compiled_code_computes_in_it(scope):
    """With the node, without it, and with it again: graphs of their own, and the bits of running without graphs."""
    model = hosted.model("tiniest")
    plain, expected = sample(model, steps=2), sample(precision(model), steps=2)
    compiled = compile_model(model, "2", scope=scope)
    for _ in range(2):
        assert torch.equal(sample(precision(compiled), steps=2), expected)
        assert torch.equal(sample(compiled, steps=2), plain)


# Nothing is left


def state_of(patcher):
    """All that it might change of a model."""
    base = patcher.model
    weights = [
        (name, id(weight), weight.data_ptr(), weight.dtype, weight.stride(), float(weight.double().sum()))
        for name, weight in base.named_parameters()
    ]
    own = {name: sorted(module.__dict__) for name, module in base.named_modules()}
    flags = [getattr(module, "comfy_cast_weights", None) for module in base.modules()]
    return weights, own, flags, base.manual_cast_dtype


ENDS = (None, PlantedError, comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("where", ["between calls", "inside a call"])
def test_the_model_is_as_it_was_between_calls_and_afterwards(end, where, model):
    plain = sample(model, steps=1)
    other, fast = model.clone(), precision(model, channels_last="on")
    before, flags = state_of(model), hosted.method("precision").tf32_switches()
    seen = []

    def stop(*_):
        seen.append(state_of(model) if where == "between calls" else None)
        if end is not None and len(seen) == 2:
            raise end()

    handle, kwargs = None, {}
    if where == "between calls":
        kwargs["callback"] = stop
    else:
        handle = model.model.diffusion_model.middle_block[0].register_forward_hook(stop)
    try:
        sample(fast, steps=3, **kwargs)
    except ENDS[1:]:
        assert end is not None
    finally:
        if handle is not None:
            handle.remove()
    assert len(seen) == (3 if end is None else 2)
    if where == "between calls":
        assert all(state == before for state in seen)
    assert state_of(model) == before
    assert hosted.method("precision").tf32_switches() == flags
    assert torch.equal(sample(other, steps=1), plain)


def test_the_memory_that_it_tells_is_that_of_its_copies(model, last_lines):
    sample(precision(model))
    weights = sum(weight.numel() for weight in model.model.diffusion_model.parameters())
    assert f"{weights * 2 / 2**20:.0f} MiB more memory" in last_lines("1")[0][1]
    sample(precision(model, compute_dtype="fp32"))
    assert last_lines("1")[-1] == ("inert", "changed nothing: the model computes in fp32, as without this node")


def test_values_beyond_fp16_name_the_node(model, with_fp16, last_lines):
    with torch.no_grad():
        model.model.diffusion_model.input_blocks[0][0].weight.mul_(1e6)
    with pytest.raises(RuntimeError, match="Precision: the model gave values that are no numbers in fp16"):
        sample(precision(model, compute_dtype="fp16"))
    assert last_lines("1")[0][0] == "failed"
    sample(precision(model))
