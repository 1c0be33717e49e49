"""Compile Model on transformers: blocks found by looking, the eager picture from every graph, few graphs, explained.

As in `test_compile_model`, most tests run dynamo's graphs as they are; what inductor makes of them is in the last part.
"""

from __future__ import annotations

import gc
import json
from functools import partial

import comfy.controlnet
import comfy.hooks
import comfy.ops
import hosted
import psutil
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from comfy.quant_ops import QuantizedTensor
from hosted import bypass_lora, compile_model, relative_error, run_node, sample
from small_models import CPU, DEEPER, FAMILIES, deep, transformer_latent, transformer_prompt
from test_compile_model import attention_overridden, fresh, tallies, wrapped  # noqa: F401

machine = hosted.engine("host.machine")

BOUND = 1e-3
ROUNDING = 1e-5
"""What another layout of an input may leave, where the host's own kernels choose by it."""

long = partial(pytest.param, marks=pytest.mark.long)

SAMPLE = ("Cosmos", "Flux", "HiDream", "LTXV", "PixArt", "SD3", "Wan 2.1", "Z-Image")
"""Each finds its blocks in another way, or hands attention over in another."""
TORN = ("HunyuanDiT", "PixArt", "HiDream")
"""Those whose graphs break on a processor: two do not hand the options on to attention, which then is ComfyUI's own
Python; the third chooses an expert for each token."""


def latent(name, side=None, batch=1, frames=None):
    image = transformer_latent(name, batch)
    sides = (side or image.shape[-1],) * 2
    length = image.shape[2:-2] if frames is None or image.ndim == 4 else (frames,)
    return torch.zeros(*image.shape[:2], *length, *sides)


def picture(name, patcher, *, steps=2, positive=None, negative=None, **kwargs):
    positive = transformer_prompt(name, 1) if positive is None else positive
    negative = transformer_prompt(name, 2) if negative is None else negative
    kwargs.setdefault("image", latent(name))
    return sample(patcher, positive, negative, steps=steps, **kwargs)


@pytest.fixture
def qwen():
    return deep("Qwen-Image")


# What is found


def blocks_of(name):
    found = hosted.engine("model.blocks").repeated(deep(name).model.diffusion_model)
    return sorted(len(blocks) for blocks in found.values())


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("Flux", [2, 3]),
        ("Qwen-Image", [3]),
        # Two refiners and the layers, of which one and the layers are alike: their lengths differ.
        ("Z-Image", [2, 2, 3]),
        ("SD3", [2]),
        ("Mochi", [2]),
        # In a dictionary, and each of it a list of further blocks, which belong to it.
        ("Cosmos", [2]),
        # One block of each kind: inside it, the experts.
        ("HiDream", [4, 4]),
    ],
)
def test_blocks_are_found_by_looking_and_outermost(name, numbers):
    assert blocks_of(name) == numbers


def test_what_is_alike_but_for_its_weights_form_is_another_kind():
    blocks = hosted.engine("model.blocks")
    module = deep("Qwen-Image").model.diffusion_model
    module.transformer_blocks[0].to(torch.bfloat16)
    ((_, members),) = blocks.repeated(module).items()
    assert members == list(module.transformer_blocks)[1:]


@pytest.mark.parametrize(
    ("name", "number"), [("SD3", 1), ("Mochi", 1), *((one, 0) for one in ("Flux", "Z-Image", "Cosmos", "HiDream"))]
)
def test_what_is_like_no_other_of_its_list_is_found(name, number):
    """The last of SD 3 and Mochi; not what is itself made of blocks, as Cosmos' and HiDream's are."""
    blocks = hosted.engine("model.blocks")
    module = deep(name).model.diffusion_model
    assert len(list(blocks.alone(module, blocks.repeated(module)))) == number


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_a_block_that_is_like_no_other_is_told(scope, qwen, tallies):  # noqa: F811
    """Alone in its list it ran without a graph, unless the model is one."""
    module = qwen.model.diffusion_model
    module.transformer_blocks[0].attn.to_q = torch.nn.Sequential(module.transformer_blocks[0].attn.to_q)
    eager = picture("Qwen-Image", qwen)
    assert relative_error(picture("Qwen-Image", compile_model(qwen, scope=scope)), eager) <= ROUNDING
    told = "1 of 3 blocks run without graphs: no other is like it"
    assert list(tallies[0].notes) == ([told] if scope == "blocks" else [])
    assert tallies[0].units == ("2 blocks" if scope == "blocks" else "the model")


@pytest.mark.parametrize("name", [name if name in SAMPLE else long(name) for name in sorted(FAMILIES)])
def test_every_family_gives_its_eager_picture_and_one_graph_for_each_kind(name, fresh, tallies):  # noqa: F811
    model = deep(name)
    eager = picture(name, model)
    assert relative_error(picture(name, compile_model(model)), eager) <= ROUNDING
    assert torch.equal(picture(name, model), eager)
    (tally,) = tallies
    kinds = len(blocks_of(name))
    assert tally.units == f"{sum(blocks_of(name))} blocks"
    assert bool(tally.breaks) == (name in TORN and name != "HiDream"), tally.sentence()
    if name not in TORN:
        assert tally.graphs == kinds, tally.sentence()


def test_a_number_that_each_block_has_of_its_own_makes_no_graph_for_each(fresh, tallies):  # noqa: F811
    """Wan VACE's blocks read which of them they are."""
    name = "Wan 2.1 VACE"
    model = deep(name)
    compiled, numbers = compile_model(model), blocks_of(name)
    assert numbers == [3, 4]
    for kwargs in ({}, {"image": latent(name, 24)}, {"cfg": 1.0}):
        assert relative_error(picture(name, compiled, **kwargs), picture(name, model, **kwargs)) <= ROUNDING
    # One graph for the first of them, and one for all others.
    assert tallies[0].graphs == len(numbers) + 1
    assert all(tally.new_graphs <= len(numbers) for tally in tallies[1:])
    assert not any(tally.breaks for tally in tallies)


@pytest.mark.parametrize("name", ["Flux", "Qwen-Image", "Wan 2.1", *map(long, ("LTXV", "Lumina 2", "SD3", "Z-Image"))])
def test_scope_model_is_one_graph_of_all_of_it(name, fresh, tallies):  # noqa: F811
    model = deep(name)
    compiled = compile_model(model, scope="model")
    assert relative_error(picture(name, compiled), picture(name, model)) <= ROUNDING
    assert (tallies[0].units, tallies[0].graphs, dict(tallies[0].breaks)) == ("the model", 1, {})


def test_what_no_graph_can_be_made_of_as_a_whole_is_told_with_what_serves():
    """Its positions are numpy's, made anew in each call."""
    with pytest.raises(RuntimeError, match=r"Compile Model: eager could not compile this model .*Set scope to blocks"):
        picture("HunyuanDiT", compile_model(deep("HunyuanDiT"), scope="model"))


# Changes


def add_lora(patcher, seed=3, strength=0.5):
    generator = torch.Generator().manual_seed(seed)
    patches = {
        key: ("diff", (torch.randn(weight.shape, generator=generator) * 0.02,))
        for key, weight in patcher.model_state_dict("diffusion_model.").items()
        if weight.ndim == 2 and ("blocks" in key or "layers" in key)
    }
    clone = patcher.clone()
    assert len(clone.add_patches(patches, strength)) == len(patches) > 0
    return clone


def hooked(name, patcher):
    """A prompt with a LoRA of its own."""
    weights = hosted.lora_of_queries_and_keys(patcher)
    ((context, values),) = transformer_prompt(name, 1)
    return [[context, {**values, "hooks": comfy.hooks.create_hook_lora(weights, 1.0, 1.0)}]]


class Residuals(comfy.controlnet.ControlBase):
    """A ControlNet that gives one residual for each block of a transformer."""

    def get_control(self, x_noisy, t, cond, batched_number, *_):
        generator = torch.Generator().manual_seed(9)
        one = torch.randn(x_noisy.shape[0], 64, 64, generator=generator)
        return {"input": [one * self.strength, None, one], "output": []}

    def copy(self):
        made = Residuals()
        made.strength = self.strength
        return made

    def get_models(self):
        return []


def controlled(name, strength):
    net = Residuals()
    net.strength = strength
    ((context, values),) = transformer_prompt(name, 1)
    return [[context, {**values, "control": net, "control_apply_to_uncond": True}]]


def block_replaced(factor):
    """As a node replaces a block: its own code around the original."""

    def change(patcher):
        def replacement(args, extra):
            out = extra["original_block"](args)
            return {**out, "img": out["img"] * factor}

        clone = patcher.clone()
        clone.set_model_patch_replace(replacement, "dit", "double_block", 1)
        return clone

    return change


def patched(kind, factor):
    """A patch that the model runs between its blocks, or a block inside."""

    def after_block(args):
        return {"img": args["img"] * factor, "txt": args["txt"]}

    def attention_in(q, k, v, pe=None, attn_mask=None, extra_options=None):
        return {"q": q * factor, "k": k, "v": v, "pe": pe, "attn_mask": attn_mask}

    def change(patcher):
        clone = patcher.clone()
        clone.set_model_patch(attention_in if kind == "attn1_patch" else after_block, kind)
        return clone

    return change


def ours(name, **values):
    return lambda patcher: run_node(f"Slipstream{name}", patcher, "3", **values)


CHANGES = {
    # name: (two changes, one after the other, whether the first of them needs graphs that were not there)
    "LoRA": (add_lora, lambda p: add_lora(p, seed=4), True),
    "LoRA's strength": (lambda p: add_lora(p, strength=0.5), lambda p: add_lora(p, strength=0.9), True),
    "block replaced": (block_replaced(0.5), block_replaced(2.0), False),
    "patch between blocks": (patched("double_block", 0.9), patched("double_block", 0.5), False),
    "patch inside blocks": (patched("attn1_patch", 0.5), patched("attn1_patch", 2.0), False),
    "attention overridden": (attention_overridden(0.5), attention_overridden(2.0), False),
    "model wrapped": (wrapped(0.9), wrapped(0.5), False),
    "call wrapped": (wrapped(0.9, WrappersMP.APPLY_MODEL), wrapped(0.5, WrappersMP.APPLY_MODEL), False),
    "CFG Cutoff": (ours("CFGCutoff", cutoff=0.5), ours("CFGCutoff", cutoff=0.3), True),
    "Precision": (ours("Precision", compute_dtype="bf16"), ours("Precision", compute_dtype="bf16"), True),
}
INSIDE = ("block replaced", "patch between blocks", "patch inside blocks", "attention overridden", "model wrapped")
"""Those for which a model can't be one graph."""


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((name, "blocks") for name in CHANGES),
        *((pytest.param if name in ("LoRA", "block replaced") else long)(name, "model") for name in CHANGES),
    ],
)
def test_no_graph_is_used_for_what_it_was_not_made_for(name, scope, qwen, tallies):  # noqa: F811
    """After a run without it, then with one value, then with another, then without: the eager picture each time."""
    first, second, needs_graphs = CHANGES[name]
    compiled, plain = compile_model(qwen, scope=scope), picture("Qwen-Image", qwen)
    assert torch.equal(picture("Qwen-Image", compiled), plain)
    for change in (first, second):
        eager = picture("Qwen-Image", change(qwen), steps=4)
        assert relative_error(picture("Qwen-Image", change(compiled), steps=4), eager) <= ROUNDING
        if scope == "blocks" and (change is second or not needs_graphs):
            assert not tallies[-1].new_graphs, tallies[-1].sentence()
        if scope == "model" and name in INSIDE:
            assert "block by block, since" in tallies[-1].sentence()
        if name == "patch inside blocks":
            assert "other nodes patch it inside (attn1_patch)" in tallies[-1].sentence()
    assert torch.equal(picture("Qwen-Image", compiled), plain)
    assert not tallies[-1].new_graphs
    assert torch.equal(picture("Qwen-Image", qwen), plain)


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_prompts_with_a_controlnet_or_a_lora_of_their_own(scope, qwen):
    name, compiled = "Qwen-Image", compile_model(qwen, scope=scope)
    plain = picture(name, qwen)
    for make in (partial(controlled, name, 0.5), partial(controlled, name, 2.0), partial(hooked, name, qwen)):
        eager = picture(name, qwen, positive=make())
        assert relative_error(eager, plain) > BOUND
        assert relative_error(picture(name, compiled, positive=make()), eager) <= ROUNDING
    assert torch.equal(picture(name, compiled), plain)


def test_positions_and_masks_are_inputs(tallies):  # noqa: F811
    """Other values of the same shapes, from another node and from the prompt."""
    name = "LTXV"
    model = deep(name)
    compiled = compile_model(model)
    ((context, values),) = transformer_prompt(name, 1)
    pictures = []
    for kept, rate in ((8, 25), (3, 25), (3, 10)):
        mask = (torch.arange(8) < kept).long().unsqueeze(0)
        values = {**values, "attention_mask": mask, "frame_rate": rate}
        both = {"positive": [[context, values]], "negative": [[context.flip(1), values]]}
        eager = picture(name, model, **both)
        assert torch.equal(picture(name, compiled, **both), eager)
        pictures.append(eager)
    assert all(relative_error(pictures[i], pictures[i + 1]) > BOUND for i in (0, 1))
    assert [tally.new_graphs > 0 for tally in tallies] == [True, False, False]


def test_another_nodes_attention_of_another_shape_is_named(qwen):
    """A block may have written into what it was given: it is not run a second time."""
    wrong = qwen.clone()
    wrong.model_options["transformer_options"]["optimized_attention_override"] = lambda function, q, *args, **kwargs: (
        function(q, *args, **kwargs).double()
    )
    with pytest.raises(RuntimeError, match=r"Compile Model: attention gave .*float64.*another node's"):
        picture("Qwen-Image", compile_model(wrong))


def test_forecast_and_cfg_cutoff_around_it():
    name = "Wan 2.1"
    model = deep(name)
    both = lambda p: ours("Forecast", error_budget=0.5)(ours("CFGCutoff", cutoff=0.5)(p))  # noqa: E731
    assert relative_error(
        picture(name, both(compile_model(model)), steps=10), picture(name, both(model), steps=10)
    ) <= (ROUNDING)


def test_the_model_is_left_as_it_was_also_after_an_error(qwen):
    picture("Qwen-Image", qwen)
    before = hosted.fingerprint(qwen.model)
    picture("Qwen-Image", compile_model(qwen))
    fails = wrapped(1.0)(qwen)

    def fail(*_, **__):
        raise hosted.PlantedError

    fails.set_model_patch(fail, "double_block")
    with pytest.raises(hosted.PlantedError):
        picture("Qwen-Image", compile_model(fails))
    assert hosted.fingerprint(qwen.model) == before


# How many graphs, and why


INPUTS = {
    # name: (family, the run's arguments, what the verdict calls the change)
    "resolution": ("Flux", lambda n: {"image": latent(n, 24)}, "resolution 128x128 to 192x192"),
    "batch of one": ("Flux", lambda _: {"cfg": 1.0}, "batch 2 to 1"),
    "images": ("Qwen-Image", lambda n: {"image": latent(n, batch=2)}, "batch 2 to 4"),
    "length": ("Wan 2.1", lambda n: {"image": latent(n, frames=5)}, "length 2 to 5"),
    "prompt length": (
        "Qwen-Image",
        lambda n: {"positive": [[torch.cat([transformer_prompt(n, 1)[0][0]] * 2, dim=1), {}]]},
        "batch 2 to 1, prompt length 8 to 16",
    ),
}


@pytest.mark.parametrize("name", INPUTS)
def test_other_inputs_get_one_graph_for_each_kind_named_in_the_verdict(name, fresh, tallies):  # noqa: F811
    family, make, told = INPUTS[name]
    model, kwargs = deep(family), make(family)
    compiled = compile_model(model)
    first = picture(family, compiled)
    for _ in range(2):
        assert torch.equal(picture(family, compiled, **kwargs), picture(family, model, **kwargs))
    assert next(iter(tallies[1].recompiled)) == told
    assert 0 < tallies[1].new_graphs <= len(blocks_of(family)) * len(tallies[1].recompiled)
    assert not tallies[2].new_graphs
    assert torch.equal(picture(family, compiled), first)
    assert not tallies[3].new_graphs


def test_a_third_size_needs_no_graph_and_a_lora_is_told(fresh, tallies):  # noqa: F811
    name = "Flux"
    compiled = compile_model(deep(name))
    for side in (16, 24, 32):
        picture(name, compiled, image=latent(name, side))
    assert [tally.new_graphs for tally in tallies] == [2, 2, 0]
    picture(name, add_lora(compiled), image=latent(name, 32))
    assert dict(tallies[-1].recompiled) == {"weights as they are to patched": 2}


@pytest.mark.parametrize(("prompts", "name"), [(5, "Flux"), long(20, "Flux"), long(20, "Wan 2.1")])
def test_prompts_that_cycle_make_no_graph_after_the_first_cycle(prompts, name, fresh, tallies):  # noqa: F811
    compiled = compile_model(deep(name))
    kinds = [(side, with_lora) for with_lora in (False, True) for side in (16, 32)]
    resident = []
    for number in range(prompts):
        side, with_lora = kinds[number % len(kinds)]
        patcher = add_lora(compiled, seed=number) if with_lora else compiled
        picture(name, patcher, image=latent(name, side))
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert not any(tally.new_graphs for tally in tallies[len(kinds) :])
    assert resident[-1] <= 1.05 * resident[len(kinds) - 1]


@pytest.mark.parametrize("is_patched", [False, True])
def test_the_gain_is_told_by_one_block_unless_another_nodes_code_might_notice(is_patched, qwen, fresh, tallies):  # noqa: F811
    model = patched("double_block", 0.9)(qwen) if is_patched else qwen
    compiled, eager = compile_model(model), picture("Qwen-Image", model, steps=10)
    assert torch.equal(picture("Qwen-Image", compiled, steps=10), eager)
    (made,) = hosted.engine("host.artifacts")._made.values()
    numbers = len(made.value._eager_s), len(made.value._steady_s)
    assert (numbers, tallies[0].timed) == (((0, 0), "") if is_patched else ((3, 6), "block"))


# Weights of other kinds


@torch.inference_mode()
def host_quantized(name, layout, quant_format):
    """A model as the host loads a quantized checkpoint of it."""
    weights = deep(name).model.diffusion_model.state_dict()
    for key in [key for key, weight in weights.items() if "blocks" in key and weight.ndim == 2 and weight.shape[0] > 8]:
        quantized = QuantizedTensor.from_float(weights[key], layout)
        weights.update(quantized.state_dict(key))
        told = json.dumps({"format": quant_format}).encode()
        weights[f"{key.removesuffix('weight')}comfy_quant"] = torch.frombuffer(
            bytearray(told), dtype=torch.uint8
        ).clone()
    config = FAMILIES[name].family({**FAMILIES[name].config, **DEEPER[name]})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = comfy.ops.mixed_precision_ops({}, torch.float32, disabled={"float8_e4m3fn"})
    model = config.get_model({}, "", device=CPU)
    model.diffusion_model.load_state_dict(weights)
    return ModelPatcher(model, load_device=CPU, offload_device=CPU)


def kept_in_fp8(name):
    """A model whose weights are fp8 as they are, cast each time they are used."""
    model = deep(name)
    for part in model.model.diffusion_model.transformer_blocks.modules():
        if isinstance(part, torch.nn.Linear):
            part.weight = torch.nn.Parameter(part.weight.to(torch.float8_e4m3fn), requires_grad=False)
            part.comfy_cast_weights = True
    return model


QUANTIZED = {
    "Quantize Model": lambda name: ours("Quantize", scheme="int8 dynamic", min_features=0)(deep(name)),
    "the host's int8": lambda name: host_quantized(name, "TensorWiseINT8Layout", "int8_tensorwise"),
    "the host's fp8": lambda name: host_quantized(name, "TensorCoreFP8E4M3Layout", "float8_e4m3fn"),
    "fp8 as it is": kept_in_fp8,
}


@pytest.mark.parametrize("kind", QUANTIZED)
def test_quantized_models_are_served(kind, fresh, tallies):  # noqa: F811
    name = "Qwen-Image"
    model = QUANTIZED[kind](name)
    eager = picture(name, model)
    assert relative_error(eager, picture(name, deep(name))) > BOUND
    assert relative_error(picture(name, compile_model(model)), eager) <= ROUNDING
    assert (tallies[-1].graphs, dict(tallies[-1].breaks)) == (1, {})


class Packed(torch.Tensor):
    """A weight as GGUF's loader keeps it: bytes that its own operations unpack."""


def packed(layer):
    layer.weight = torch.nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)


def partly_loaded(layer):
    layer.weight_function, layer.comfy_cast_weights = [lambda weight: weight], True


def with_dynamic_vram(layer):
    layer._v = None


UNSUITED = {
    "their weights are another pack's Packeds, which no compiler takes": packed,
    "weights are patched as they are used, since the model is loaded in part only": partly_loaded,
    "DynamicVRAM brings the weights to the device as they are used": with_dynamic_vram,
}


@pytest.mark.parametrize("is_unet", [False, True])
@pytest.mark.parametrize("why", UNSUITED)
def test_where_no_block_can_be_compiled_the_reason_is_on_the_node(why, is_unet, qwen, last_lines):
    model, run = (hosted.model("minimal"), sample) if is_unet else (qwen, partial(picture, "Qwen-Image"))
    eager = run(model)
    for part in model.model.diffusion_model.modules():
        if isinstance(part, torch.nn.Linear):
            UNSUITED[why](part)
    assert torch.equal(run(compile_model(model)), eager)
    state, text = last_lines("7")[-1]
    assert state == "inert"
    assert text.startswith("compiled nothing: no block can be compiled (")
    assert text.endswith(f" blocks run without graphs: {why}")


@pytest.mark.parametrize("is_unet", [False, True])
def test_the_blocks_of_a_bypass_lora_are_compiled_once_it_is_taken_out(is_unet, qwen, fresh, tallies):  # noqa: F811
    """The host leaves their own forwards on its layers' instances."""
    model, run = (hosted.model("minimal"), sample) if is_unet else (qwen, partial(picture, "Qwen-Image"))
    expected = run(compile_model(model))
    compiled = compile_model(model)
    eager = run(bypass_lora(model))
    assert relative_error(eager, expected) > BOUND
    assert torch.equal(run(bypass_lora(compiled)), eager)
    assert machine.REPLACED in tallies[-1].sentence()
    layers = [part for part in model.model.diffusion_model.modules() if "forward" in part.__dict__]
    assert layers
    assert torch.equal(run(compiled), expected)
    before, *_, after = tallies
    assert after.units == before.units
    # Dynamo tells a forward on an instance from one that is not.
    assert set(after.recompiled) == {"another node took its code off some layers"}
    run(compiled)
    assert tallies[-1].new_graphs == 0
    assert all("forward" in layer.__dict__ for layer in layers)


def test_a_forward_that_was_on_a_block_s_instance_stays_there(qwen):
    block = qwen.model.diffusion_model.transformer_blocks[0]
    forward = block.forward = block.forward
    picture("Qwen-Image", compile_model(qwen))
    assert block.__dict__["forward"] == forward


# Real backends


@pytest.mark.long
def test_openvino_and_a_backend_that_takes_modules(fresh, tallies):  # noqa: F811
    from onediff.infer_compiler.backends import registry

    if "slipstream_flat" not in registry._BACKENDS:

        @registry.register_backend("slipstream_flat")
        def compile_by_tracing(module, options=None):
            return lambda *inputs: torch.jit.trace(module, inputs, check_trace=False)(*inputs)

    model = deep("Flux")
    backends = {"openvino": {}, "onediff": {"onediff_backend": "slipstream_flat"}}
    for backend, options in backends.items():
        compiled = compile_model(model, backend=backend, **options)
        assert relative_error(picture("Flux", compiled), picture("Flux", model)) < BOUND
        eager = picture("Flux", add_lora(model))
        assert relative_error(picture("Flux", add_lora(compiled)), eager) < BOUND
    assert [tally.units for tally in tallies] == ["5 blocks", "5 blocks", "the model", "the model"]
    # What another node changes inside, a module that was traced can't see: those calls run without it.
    change = patched("double_block", 0.5)
    assert torch.equal(picture("Flux", change(compiled)), picture("Flux", change(model)))
    assert not tallies[-1].is_active


@pytest.mark.long
@pytest.mark.parametrize("name", ["Wan 2.1", "Flux", "Qwen-Image", "SD3", "Z-Image"])
def test_inductor_for_the_first_size(name, fresh, tallies):  # noqa: F811
    model = deep(name)
    error = relative_error(picture(name, compile_model(model, backend="inductor")), picture(name, model))
    assert 0 < error < BOUND
    assert tallies[0].graphs == len(blocks_of(name))


@pytest.mark.long
@pytest.mark.parametrize("name", ["Flux", "Qwen-Image", "SD3", "Wan 2.1", "Z-Image"])
def test_inductor_through_sizes_batches_and_loras(name, fresh, tallies):  # noqa: F811
    model, kinds = deep(name), len(blocks_of(name))
    both = lambda p: ours("Forecast", error_budget=0.5)(ours("CFGCutoff", cutoff=0.5)(p))  # noqa: E731
    compiled = compile_model(model, backend="inductor")

    def graphs(change=lambda p: p, **kwargs):
        began = len(tallies)
        eager = picture(name, change(model), **kwargs)
        assert relative_error(picture(name, change(compiled), **kwargs), eager) < BOUND
        (tally,) = tallies[began:]
        return tally.new_graphs, list(tally.recompiled)

    assert graphs() == (kinds, [])
    new, why = graphs(image=latent(name, 32))
    assert 0 < new <= kinds
    assert why == ["resolution 128x128 to 256x256"]
    assert graphs(image=latent(name, 24)) == (0, [])
    new, why = graphs(cfg=1.0)
    assert 0 < new <= kinds
    assert why == ["resolution 192x192 to 128x128, batch 2 to 1"]
    new, why = graphs(add_lora)
    assert 0 < new <= kinds
    assert why[0].endswith("weights as they are to patched")
    graphs(both, steps=10)
    resident = []
    for number in range(20):
        change = partial(add_lora, seed=number) if number % 2 else lambda p: p
        kwargs = {"image": latent(name, (16, 32)[number // 2 % 2]), "cfg": (5.0, 1.0)[number // 4 % 2]}
        made, why = graphs(change, **kwargs)
        assert number < 8 or not made, why
        gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] <= 1.05 * resident[7]


@pytest.mark.long
@pytest.mark.parametrize("kind", QUANTIZED)
def test_inductor_on_quantized_models(kind):
    model = QUANTIZED[kind]("Qwen-Image")
    eager = picture("Qwen-Image", model)
    assert relative_error(picture("Qwen-Image", compile_model(model, backend="inductor")), eager) < 2e-2
