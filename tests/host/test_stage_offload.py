"""Stage Offload in the real host: what it frees, what it leaves, and that the workflow runs again."""

from __future__ import annotations

import comfy.model_management
import comfy.ops
import comfy.samplers
import hosted
import psutil
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from hosted import execute, sample

MIB = 1024 * 1024
GPU = torch.device("cpu", 0)
"""The CPU by its index: another device to the host, so it loads and offloads, but nothing really moves."""


@pytest.fixture
def demo():
    """The demo model's MODEL, CLIP and VAE, used on one device and waiting on another; nothing else is loaded."""
    model, clip, vae = execute("SlipstreamDemoModel").result
    comfy.model_management.current_loaded_models.clear()
    for patcher in (model, clip.patcher, vae.patcher):
        patcher.load_device = GPU
    vae.device = GPU
    return model, clip, vae


def offload(value, stages="text encoders", **inputs):
    output = execute("SlipstreamStageOffload", "1", value=value, stages=stages, **inputs)
    assert output.result[0] is value
    return value


def loaded():
    """The inner models that the host has loaded."""
    return {type(one.model.model).__name__ for one in comfy.model_management.current_loaded_models}


def encode(clip, text):
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def load_all(demo):
    model, clip, vae = demo
    comfy.model_management.load_models_gpu([model, clip.patcher, vae.patcher])
    return {"model": type(model.model).__name__, "clip": type(clip.cond_stage_model).__name__}, loaded()


@pytest.mark.parametrize("stages", ["text encoders", "diffusion models", "all but the input's"])
def test_it_frees_what_it_names_and_nothing_else(stages, demo, last_lines):
    names, everything = load_all(demo)
    model, clip, vae = demo
    freed = {
        "text encoders": {names["clip"]},
        "diffusion models": {names["model"]},
        "all but the input's": {names["clip"], names["model"]},
    }[stages]
    size = {type(one.model).__name__: one.loaded_size() for one in (model, clip.patcher, vae.patcher)}
    assert all(size.values())
    offload(vae, stages)
    assert loaded() == everything - freed
    after = {type(one.model).__name__: one.loaded_size() for one in (model, clip.patcher, vae.patcher)}
    assert after == {name: 0 if name in freed else before for name, before in size.items()}
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert text.startswith(f"freed {sum(size[name] for name in freed) / MIB:.0f} MiB: ")
    for name in everything:
        assert (name in text) == (name in freed)
    assert "MiB before" in text


def test_the_workflow_runs_twice_in_a_row_and_with_the_same_picture(demo, last_lines):
    model, clip, vae = demo

    @torch.inference_mode()
    def workflow(seed, freeing):
        pass_on = offload if freeing else lambda value, *_, **__: value
        positive, negative = encode(clip, "winter night, pines"), encode(clip, "")
        positive = pass_on(positive, "text encoders", after=negative)
        was_freed = type(clip.cond_stage_model).__name__ not in loaded()
        latent = sample(model, positive, negative, steps=2, image=torch.zeros(1, 4, 16, 16), seed=seed)
        latent = pass_on(latent, "diffusion models")
        return vae.decode(latent), was_freed and type(model.model).__name__ not in loaded()

    expected = [workflow(seed, False)[0] for seed in (1, 1, 2)]
    for seed, picture in zip((1, 1, 2), expected, strict=True):
        again, was_freed = workflow(seed, True)
        assert was_freed
        assert torch.equal(again, picture)
        assert last_lines("1")[0][0] == "active"


@pytest.mark.parametrize(
    "kind", ["MODEL", "CLIP", "VAE", "GUIDER", "a list of models", "CONDITIONING with a ControlNet", "LATENT"]
)
def test_all_but_keeps_the_models_of_whatever_passes(kind, demo):
    model, clip, vae = demo
    control = hosted.controlnet(hosted.model("SD15"))
    control.control_model_wrapped.load_device = GPU
    load_all(demo)
    comfy.model_management.load_models_gpu([control.control_model_wrapped])
    guider = comfy.samplers.CFGGuider(model)
    unet, text, pixels = (type(one.model).__name__ for one in (model, clip.patcher, vae.patcher))
    value, kept = {
        "MODEL": (model.clone(), {unet}),
        "CLIP": (clip.clone(), {text}),
        "VAE": (vae, {pixels}),
        "GUIDER": (guider, {unet}),
        "a list of models": ([model, clip], {unet, text}),
        "CONDITIONING with a ControlNet": ([[torch.zeros(1), {"control": control}]], {"ControlNet"}),
        "LATENT": ({"samples": torch.zeros(1)}, set()),
    }[kind]
    offload(value, "all but the input's")
    assert loaded() == kept


def test_where_nothing_is_loaded_it_says_so(demo, last_lines):
    offload(1, "text encoders")
    assert last_lines("1") == [("inert", "freed nothing: no text encoders are loaded")]
    offload("text", "all but the input's")
    assert last_lines("1") == [("inert", "freed nothing: no other model is loaded")]


def test_a_model_that_has_nothing_on_its_device_is_named(demo, last_lines):
    model, _, _ = demo
    comfy.model_management.load_models_gpu([hosted.run_node("SlipstreamSequentialOffload", model, "2")])
    offload(1, "diffusion models")
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert text == f"freed nothing: nothing of {type(model.model).__name__} is on a device"


def test_on_the_cpu_it_says_that_weights_stay_in_ram(last_lines):
    comfy.model_management.current_loaded_models.clear()
    model = hosted.model("SD15")
    comfy.model_management.load_models_gpu([model])
    offload(1, "diffusion models")
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert text == f"freed nothing: weights are kept where they are used ({type(model.model).__name__} on cpu)"


def test_resident_memory_falls_by_the_copies_that_a_lora_made(last_lines):
    """What there is to free in RAM: the patched weights of a text encoder, whose originals are kept."""
    comfy.model_management.current_loaded_models.clear()
    side, layers = 2048, 8
    module = torch.nn.Sequential(
        *(comfy.ops.disable_weight_init.Linear(side, side, bias=False, device=hosted.CPU) for _ in range(layers))
    )
    for layer in module:
        torch.nn.init.normal_(layer.weight)
    patcher = ModelPatcher(module, hosted.CPU, hosted.CPU)
    patcher.is_clip = True
    update = torch.ones(side, side)
    patcher.add_patches({f"{i}.weight": ("diff", (update,)) for i in range(layers)})
    originals = [layer.weight.data_ptr() for layer in module]
    comfy.model_management.load_models_gpu([patcher])
    before = psutil.Process().memory_info().rss
    offload(1, "text encoders")
    copies = layers * side * side * 4
    assert before - psutil.Process().memory_info().rss > 0.9 * copies
    assert [layer.weight.data_ptr() for layer in module] == originals
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert text.startswith(f"freed {copies / MIB:.0f} MiB: Sequential's patched weights {copies / MIB:.0f} MiB; in use")
    assert "this process's RAM" in text
