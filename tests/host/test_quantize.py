"""Quantize Model: how near the image stays, what it follows, and that the model finds its own weights afterwards."""

from __future__ import annotations

import copy
import gc
import os
import re
import weakref

import comfy.model_management
import comfy.ops
import hosted
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from hosted import PlantedError, add_lora, bypass_lora, compile_model, hooked_prompt, relative_error, run_node, sample
from small_models import FAMILIES, transformer, transformer_latent, transformer_prompt
from test_compile_transformers import QUANTIZED, picture

BOUNDS = {"int8 weight-only": 0.01, "int8 dynamic": 0.02, "fp8 weight-only": 0.04}
"""Of the latents after three steps, the norm of the difference over the norm. Eight bits round each row to 1/255 of its
range, fp8's three bits of mantissa to 1/16 of each number."""

every_scheme = pytest.mark.parametrize("scheme", list(BOUNDS))


def quantize(patcher, node_id="1", scheme="int8 dynamic", **values):
    return run_node("SlipstreamQuantize", patcher, node_id, scheme=scheme, **{"min_features": 0, **values})


def draw(patcher, *args, **kwargs):
    return sample(patcher, *args, **{"steps": 3, **kwargs})


def state(patcher):
    """The weights' objects, their values, and what the host set on its layers."""
    module = patcher.model.diffusion_model
    flags = ("comfy_cast_weights", "weight_function", "bias_function", "forward")
    return (
        {name: (id(one), one.data_ptr(), float(one.double().sum())) for name, one in module.named_parameters()},
        [(path, {name: part.__dict__[name] for name in flags if name in part.__dict__})
         for path, part in module.named_modules()],
        list(module.state_dict()),
    )  # fmt: skip


@every_scheme
@pytest.mark.parametrize("family", ["SD15", "SDXL", "DiT"])
def test_the_image_stays_near_and_the_layers_take_a_quarter(scheme, family, last_lines):
    model = hosted.model(family)
    exact = draw(model, steps=2)
    error = relative_error(draw(quantize(model, scheme=scheme), steps=2), exact)
    assert 1e-4 < error < BOUNDS[scheme]
    ((told, text),) = last_lines("1")
    assert told == "active"
    layers, total = {"SD15": (160, 184), "SDXL": (302, 323), "DiT": (28, 38)}[family]
    assert text.startswith(f"{scheme}: {layers} of {total} linear layers, ")
    assert re.search(r" \((25|26|27)%\); ", text)
    assert ("of modulation" if family == "DiT" else "of time embeddings") in text
    assert "first, last or embedding" in text


AROUND = ("distilled_guidance", "caption_projection", "embed", "final_layer")
"""What is around a transformer's blocks, by names that families have for it."""


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_of_a_transformer_what_is_around_its_blocks_and_what_sees_one_row_an_image_stays(name):
    model, rows, quantized = transformer(name), {}, set()
    handles = []
    for path, part in model.model.diffusion_model.named_modules():
        if isinstance(part, torch.nn.Linear):

            def hook(layer, inputs, _, path=path):
                rows[path] = max(rows.get(path, 0), inputs[0].numel() // inputs[0].shape[-1])
                quantized.update({path} if type(layer.weight) is not torch.nn.Parameter else ())

            handles.append(part.register_forward_hook(hook))
    given = {"image": transformer_latent(name), "scheduler": "simple", "steps": 1, "cfg": 1.0}
    draw(quantize(model, scheme="int8 weight-only"), *[transformer_prompt(name, 1)] * 2, **given)
    assert quantized
    assert not [path for path in quantized if any(part in path for part in AROUND)]
    assert not [path for path in quantized if rows[path] == 1]
    # Of what is numbered, as blocks are, all else is.
    of_blocks = {path for path, count in rows.items() if count > 1 and re.search(r"\.\d+\.", path)}
    assert not [path for path in of_blocks - quantized if not any(part in path for part in AROUND)]


def test_what_is_left_out_and_much_of_the_model_is_told(last_lines):
    model = transformer("Qwen-Image")
    linear = {
        path: part for path, part in model.model.diffusion_model.named_modules() if isinstance(part, torch.nn.Linear)
    }
    share = sum(part.weight.nbytes for path, part in linear.items() if "_mod" in path)
    share /= sum(part.weight.nbytes for part in linear.values())
    given = {"image": transformer_latent("Qwen-Image"), "scheduler": "simple", "steps": 1, "cfg": 1.0}
    draw(quantize(model, scheme="int8 weight-only"), *[transformer_prompt("Qwen-Image", 1)] * 2, **given)
    assert f"4 of modulation ({share:.0%} of all linear weights)" in last_lines("1")[0][1]


def test_a_lora_is_merged_first_and_followed(model, last_lines):
    """Below or above the node, changed, taken out: always what the merged weights give."""
    plain = draw(quantize(model))
    for strength in (0.5, 0.9):
        exact = draw(add_lora(model, strength=strength))
        below, above = quantize(add_lora(model, strength=strength)), add_lora(quantize(model), strength=strength)
        image = draw(below)
        assert relative_error(image, exact) < BOUNDS["int8 dynamic"] < relative_error(image, plain)
        assert torch.equal(draw(above), image)
    assert torch.equal(draw(quantize(model)), plain)


@pytest.mark.parametrize(
    ("scheme", "strengths"), [*((scheme, None) for scheme in BOUNDS), ("int8 dynamic", {0.0: 1.0, 0.5: 0.2})]
)
def test_hooks_are_followed(scheme, strengths, model, last_lines):
    positive = hooked_prompt(model, strengths)
    plain, exact = draw(model), draw(model, positive)
    quantized = quantize(model, scheme=scheme)
    image = draw(quantized, positive)
    error = relative_error(image, exact)
    assert error < 1.5 * BOUNDS[scheme]
    assert 2 * error < relative_error(image, plain)
    assert "quantized anew at each call, since hooks change them" in last_lines("1")[0][1]
    # And what they left: the same as if they had never been.
    assert torch.equal(draw(quantized), draw(quantize(hosted.model("minimal"), scheme=scheme)))
    assert torch.equal(draw(model, positive), exact)


def test_with_transformers_in_bf16_hooks_are_followed_and_nothing_is_taken_from_other_runs(model):
    """Another dtype, and modules that stand in for others: both are none of what an earlier run kept."""

    def lower(patcher):
        return run_node("SlipstreamPrecision", patcher, "2", compute_dtype="bf16", scope="transformers")

    plain, hooked = hosted.prompt(model, 10), hooked_prompt(model)
    quantized, both = quantize(model, scheme="fp8 weight-only"), lower(quantize(model, scheme="fp8 weight-only"))
    alone, low = draw(quantized, plain), draw(both, plain)
    assert not torch.equal(alone, low)
    with_hooks = draw(both, hooked)
    assert relative_error(with_hooks, draw(model, hooked)) < 1.5 * relative_error(low, draw(model, hooked))
    assert relative_error(with_hooks, draw(model, hooked)) < 0.1
    for _ in range(2):
        assert torch.equal(draw(quantized, plain), alone)
        assert torch.equal(draw(both, plain), low)
        assert torch.equal(draw(both, hooked), with_hooks)


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise PlantedError("planted")


@pytest.mark.parametrize("end", [None, interrupt, fail])
@pytest.mark.parametrize("where", ["in a block", "in a step"])
def test_the_model_finds_its_own_weights_however_a_run_ends(end, where, model):
    exact, quantized = draw(model), quantize(model)
    before, seen = state(model), []
    layer = model.model.diffusion_model.middle_block[1].transformer_blocks[0].attn1.to_q

    def hook(*_):
        seen.append(type(layer.weight))
        if end is not None and where == "in a block":
            end()

    kwargs = {"callback": lambda i, *_: end() if end is not None and where == "in a step" and i == 1 else None}
    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(hook)
    try:
        if end is None:
            draw(quantized, **kwargs)
        else:
            with pytest.raises((comfy.model_management.InterruptProcessingException, PlantedError)):
                draw(quantized, **kwargs)
    finally:
        handle.remove()
    assert seen
    assert torch.nn.Parameter not in seen
    assert state(model) == before
    assert torch.equal(draw(model), exact)
    assert relative_error(draw(quantized), exact) < BOUNDS["int8 dynamic"]


def test_between_two_calls_the_model_has_its_own_weights(model):
    """A node that saves or copies the model within a callback finds them."""
    draw(model)
    before, found = state(model), []
    draw(quantize(model), callback=lambda *_: found.append(state(model)))
    assert found == [before] * 3


def test_quantized_weights_stay_for_the_next_run_until_the_model_is_unloaded(model, last_lines):
    quantized = quantize(model)
    first = draw(quantized)
    assert "quantized in " in last_lines("1")[0][1]
    (artifact,) = (one for one in quantized.get_attachment("slipstream.artifacts")._held)
    weight = weakref.ref(next(iter(artifact.value._made.values()))[1].weight)
    # A clone, and a node that is executed again in the place of one.
    for again in (quantized, quantized.clone(), quantize(model)):
        assert torch.equal(draw(again), first)
        assert "quantized earlier" in last_lines("1")[0][1]
    quantized = again
    gc.collect()
    assert weight() is not None
    quantized.detach()
    gc.collect()
    assert weight() is None
    assert torch.equal(draw(quantized), first)
    assert "quantized in " in last_lines("1")[0][1]


class Injected(torch.nn.Module):
    """A layer that another pack puts into a block of the UNet."""

    def __init__(self, seed: int):
        super().__init__()
        self.linear = comfy.ops.disable_weight_init.Linear(32, 32)
        hosted.initialize(self, seed)

    def forward(self, x):
        return x + self.linear(x.movedim(1, -1)).movedim(-1, 1)


def injected(patcher, seed):
    """As AnimateDiff-Evolved does: a model of its own, whose layers are in the UNet's blocks while that is loaded."""
    other = ModelPatcher(Injected(seed), hosted.CPU, hosted.CPU)
    clone = patcher.clone()
    clone.set_additional_models("test", [other])
    block = clone.model.diffusion_model.input_blocks[1]
    inject, eject = lambda patcher: block.append(other.model), lambda patcher: block.__delitem__(-1)
    clone.set_injections("test", [PatcherInjection(inject, eject)])
    return clone


def test_what_other_models_put_into_it_is_quantized_anew_when_it_is_another(model):
    images = [
        draw(quantize(injected(patcher, seed))) for patcher in (model, hosted.model("minimal")) for seed in (1, 2)
    ]
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], draw(quantize(injected(hosted.model("minimal"), 2))))
    assert not torch.equal(images[0], images[1])


def another_block(patcher):
    """As a node replaces a block of a model by its own."""
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0"
    block = copy.deepcopy(patcher.get_model_object(name))
    with torch.no_grad():
        for weight in block.parameters():
            weight.mul_(-1.5)
    return name, block


def another_layer(patcher):
    """A layer of the same weights but for its bias."""
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2"
    layer = copy.deepcopy(patcher.get_model_object(name))
    with torch.no_grad():
        layer.bias.add_(3)
    return name, layer


def another_weight(patcher):
    name = "diffusion_model.input_blocks.1.1.transformer_blocks.0.ff.net.2.weight"
    return name, torch.nn.Parameter(patcher.get_model_object(name) * -1.5, requires_grad=False)


@pytest.mark.parametrize("other", [another_block, another_layer, another_weight])
@every_scheme
def test_what_is_put_in_the_place_of_a_part_and_taken_out_again_is_followed(scheme, other, model, last_lines):
    """The host's version of the weights stays what it was."""
    quantized = quantize(model, scheme=scheme)
    changed = quantized.clone()
    changed.add_object_patch(*other(model))
    assert changed.patches_uuid == quantized.patches_uuid
    fresh = quantize(hosted.model("minimal"), scheme=scheme)
    fresh.add_object_patch(*other(fresh))
    plain, put = draw(quantized), draw(fresh)
    assert relative_error(plain, put) > 0.05
    for patcher, image in ((changed, put), (quantized, plain), (changed, put)):
        assert torch.equal(draw(patcher), image)
        assert "quantized in " in last_lines("1")[0][1]
    assert torch.equal(draw(changed), put)
    assert "quantized earlier" in last_lines("1")[0][1]


def test_cast_anew_for_each_run_they_are_quantized_once(model, last_lines):
    cast = run_node("SlipstreamPrecision", quantize(model), "2", compute_dtype="bf16")
    first = draw(cast)
    assert "quantized in " in last_lines("1")[0][1]
    assert torch.equal(draw(cast), first)
    assert "quantized earlier" in last_lines("1")[0][1]


def test_a_model_that_was_quantized_is_freed_with_its_patcher():
    model = hosted.model("minimal")
    quantized = quantize(model)
    draw(quantized)
    parts = [weakref.ref(model.model.diffusion_model), weakref.ref(model.model.diffusion_model.out[2].weight)]
    del model, quantized
    gc.collect()
    assert [part() for part in parts] == [None, None]


def test_weights_kept_in_another_dtype_than_they_compute_in(last_lines):
    """The host casts them at each use; the quantized ones are used as they are."""
    import comfy.supported_models as families
    import small_models

    config = families.SD15(dict(small_models.MINIMAL))
    config.set_inference_dtype(torch.bfloat16, torch.float32)
    base = config.get_model({}, "", device=hosted.CPU)
    small_models.initialize(base.diffusion_model, 0)
    model = type(hosted.model("tiniest"))(base, load_device=hosted.CPU, offload_device=hosted.CPU)
    exact = draw(model)
    before = state(model)
    for scheme, bound in BOUNDS.items():
        assert 1e-4 < relative_error(draw(quantize(model, scheme=scheme)), exact) < bound
        assert "(5" in last_lines("1")[0][1]
    assert state(model) == before
    lora = add_lora(model)
    assert relative_error(draw(quantize(lora)), draw(lora)) < BOUNDS["int8 dynamic"]


def test_layers_that_are_quantized_already_or_somebody_elses_stay(model, last_lines):
    block = model.model.diffusion_model.middle_block[1].transformer_blocks[0]
    own = block.attn1.to_q.forward
    block.attn1.to_q.forward = lambda *args: own(*args)
    block.attn1.to_k.weight = torch.nn.Parameter(block.attn1.to_k.weight.to(torch.float8_e4m3fn), requires_grad=False)
    block.attn1.to_k.comfy_cast_weights = True
    exact = draw(model)
    assert relative_error(draw(quantize(model)), exact) < BOUNDS["int8 dynamic"]
    text = last_lines("1")[0][1]
    assert "1 quantized already" in text
    assert "1 of another node's code" in text


@pytest.mark.parametrize("scheme", ["int8 dynamic", "2:4 sparse"])
@pytest.mark.parametrize("kind", ["the host's int8", "the host's fp8"])
def test_the_host_s_own_quantized_checkpoints_are_told(kind, scheme, last_lines):
    name = "Qwen-Image"
    model = QUANTIZED[kind](name)
    quantized = run_node("SlipstreamQuantize", model, "1", scheme=scheme, min_features=0)
    assert torch.equal(picture(name, quantized), picture(name, model))
    state, text = last_lines("1")[0]
    assert state == "inert"
    done = "pruned" if scheme == "2:4 sparse" else "quantized"
    assert re.fullmatch(
        rf"{done} none of 48 linear layers; left out: 42 quantized already \(\d+% .*\), 6 first, .*", text
    )


def test_what_a_quantized_checkpoint_leaves_whole_stays_so_and_is_told(last_lines):
    model = QUANTIZED["the host's int8"]("Qwen-Image")
    layer = model.model.diffusion_model.transformer_blocks[0].attn.to_q
    layer.weight = torch.nn.Parameter(layer.weight.dequantize().detach(), requires_grad=False)
    layer.layout_type = layer.quant_format = None
    picture("Qwen-Image", quantize(model))
    assert "1 left whole by a quantized checkpoint" in last_lines("1")[0][1]


def test_the_layers_of_a_bypass_lora_are_quantized_once_it_is_taken_out(model, last_lines):
    quantized = quantize(model)
    expected, told = draw(quantized), last_lines("1")[0][1].split(";")[0]
    draw(bypass_lora(quantized))
    assert " of another node's code" in last_lines("1")[0][1]
    assert any("forward" in part.__dict__ for part in model.model.diffusion_model.modules())
    assert torch.equal(draw(quantized), expected)
    assert last_lines("1")[0][1].startswith(f"{told};")


def test_nothing_to_quantize_is_said_and_leaves_the_image(model, last_lines):
    assert torch.equal(draw(quantize(model, min_features=256)), draw(model))
    ((told, text),) = last_lines("1")
    assert (told, text.split(";")[0]) == ("inert", "quantized none of 80 linear layers")
    assert "70 small" in text


# Where the originals can leave the device


@pytest.fixture
def own_memory(monkeypatch):
    """The CPU as a device with memory of its own, and a model that the host can load in part."""
    quantized = hosted.engine("model.quantized")
    monkeypatch.setattr(quantized, "has_own_memory", lambda device: True)
    monkeypatch.setattr(quantized, "OFFLOADED_AT_ONCE", 1)


@pytest.mark.parametrize("has_lora", [False, True])
def test_offloaded_originals_are_in_the_hosts_books_and_come_back(has_lora, model, own_memory, last_lines):
    patcher = add_lora(model) if has_lora else model
    exact = draw(patcher)
    kept = draw(quantize(patcher, offload_originals="off"))
    loaded = model.model.model_loaded_weight_memory
    assert torch.equal(draw(quantize(patcher, offload_originals="auto")), kept)
    assert model.model.model_loaded_weight_memory == loaded
    offloading = quantize(patcher, offload_originals="on")
    for _ in range(2):
        assert torch.equal(draw(offloading), kept)
        text = last_lines("1")[0][1]
        assert " MiB of the originals left the device" in text
        assert loaded - model.model.model_loaded_weight_memory > 1e6
        assert model.model.model_lowvram
        assert "_load_list" not in offloading.__dict__
    assert torch.equal(draw(patcher), exact)
    assert model.model.model_loaded_weight_memory == loaded
    assert not model.model.model_lowvram


def test_a_model_that_is_loaded_in_part_is_quantized_as_a_whole(model, own_memory, last_lines):
    """The host offloads in the middle of loading, as it does where memory is short."""
    patcher = add_lora(model)
    exact, kept = draw(patcher), draw(quantize(patcher))
    quantized = quantize(patcher)

    def in_part(executor, patcher, *args, **kwargs):
        result = executor(patcher, *args, **kwargs)
        patcher.partially_unload(patcher.offload_device, 4e5)
        return result

    quantized.add_wrapper("prepare_sampling", in_part)
    image = draw(quantized)
    assert relative_error(image, exact) < BOUNDS["int8 dynamic"]
    assert relative_error(image, kept) < 0.005
    assert " MiB of the originals left the device" in last_lines("1")[0][1]
    assert torch.equal(draw(patcher), exact)


# With Compile Model


SLOW = bool(os.environ.get("SLIPSTREAM_SLOW"))


def test_it_is_compiled_once_whatever_the_lora(last_lines):
    """The eager bits from dynamo's graphs, and what rounding leaves of them from inductor's (`--slow`)."""
    quantized = quantize(hosted.model("tiniest"))
    backend, bound = ("inductor", 0.01) if SLOW else ("eager", 0)
    draw(compile_model(hosted.model("tiniest"), "2", backend=backend))
    compiled = compile_model(quantized, "2", backend=backend)
    image = draw(compiled)
    assert last_lines("2")[0][1].endswith(": weights as they are to quantized")
    assert relative_error(image, draw(quantized)) <= bound
    draw(compiled)
    assert "Compile Model" not in last_lines("1")[0][1]
    # Other weights of the same kind: no graph is made.
    image = draw(add_lora(compiled))
    assert "compiled earlier" in last_lines("2")[0][1]
    assert relative_error(image, draw(add_lora(quantized))) <= bound


def test_a_backend_that_keeps_weights_is_refused(model, monkeypatch):
    monkeypatch.setattr(hosted.compiling("backends").ALL["eager"], "follows_weights", False, raising=False)
    with pytest.raises(RuntimeError, match=r"Compile Model: eager keeps weights, and can't keep quantized ones\."):
        draw(compile_model(quantize(model), "2"))
