"""Sequential Offload in the real host, on two devices of a machine with one: what stays, and that the image does."""

from __future__ import annotations

import itertools

import comfy.hooks
import comfy.model_management
import comfy.ops
import hosted
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP
from hosted import CPU, PlantedError, add_lora, prompt, run_node

budgets = hosted.engine("run.budget")

MIB = 1024 * 1024
GPU = torch.device("cpu", 0)
"""The CPU by its index: another device to the host, so it loads and offloads, but nothing really moves."""


@pytest.fixture
def model():
    """A small SD 1.5 model, new for each test, which is used on one device and waits on another."""
    patcher = hosted.model("SD15")
    patcher.load_device = GPU
    return patcher


def sample(patcher, positive=None):
    """One step, of a small latent: what is loaded is the same as for a large one."""
    return hosted.sample(patcher, positive, steps=1, image=hosted.latent(patcher, 8))


def offload(patcher, budget_mib=0, node_id="1"):
    return run_node("SlipstreamSequentialOffload", patcher, node_id, budget_mib=budget_mib)


def size_mib(patcher):
    return comfy.model_management.module_size(patcher.model) / MIB


def share(patcher, percent):
    """A budget of so much of the model."""
    return round(size_mib(patcher) * percent / 100)


def load(*patchers):
    comfy.model_management.load_models_gpu(list(patchers))


def layers(patcher):
    """All layers with weights: (bytes, name), the largest first."""
    found = [
        (comfy.model_management.module_size(module), name)
        for name, module in patcher.model.named_modules()
        if hasattr(module, "comfy_cast_weights") and list(module.parameters(recurse=False))
    ]
    return sorted(found, reverse=True)


def staying(patcher):
    """Names of the layers that the host has on the device, which it does not cast as they are used."""
    modules = {name: patcher.model.get_submodule(name) for _, name in layers(patcher)}
    loaded = {name for name, module in modules.items() if getattr(module, "comfy_patched_weights", False)}
    assert all(module.comfy_cast_weights != (name in loaded) for name, module in modules.items())
    return loaded


# What stays


@pytest.mark.parametrize("percent", [0, 25, 50, 100])
@pytest.mark.parametrize("was_loaded", [False, True], ids=["at first", "loaded in full before"])
def test_which_layers_stay_at_a_budget(percent, was_loaded, model):
    """As much as fits beside the buffer for those that come; the largest first, as the host does."""
    if was_loaded:
        load(model)
        assert staying(model) == {name for _, name in layers(model)}
    budget_mib = share(model, percent) + (percent == 100)
    load(offload(model, budget_mib))
    kept, all_layers = staying(model), layers(model)
    bytes_of = {name: size for size, name in all_layers}
    resident = sum(bytes_of[name] for name in kept)
    if percent == 0:
        assert not kept
    elif percent == 100:
        assert kept == set(bytes_of)
    else:
        assert model.loaded_size() == resident
        buffer = model.model.model_offload_buffer_memory
        assert resident + buffer <= budget_mib * MIB
        # The largest that stays out would not have fitted where the largest ones stand first.
        largest_out = next(i for i, (_, name) in enumerate(all_layers) if name not in kept)
        before = sum(size for size, _ in all_layers[:largest_out])
        assert before + 2 * all_layers[largest_out][0] >= budget_mib * MIB
        assert resident > 0.4 * budget_mib * MIB


@pytest.mark.parametrize("percent", [0, *(pytest.param(share, marks=pytest.mark.long) for share in (25, 50)), 100])
def test_two_clones_alternating_each_have_what_they_have_alone(percent, model):
    """One with a budget, one without, and one with another budget and a LoRA: the same layers and bits each time."""
    others = {
        "none": model,
        "half": offload(model, share(model, 60), "2"),
        "LoRA": offload(add_lora(model), share(model, 40), "3"),
    }
    mine = offload(model, share(model, percent) + (percent == 100))
    expected = {name: sample(patcher) for name, patcher in {**others, "mine": mine}.items()}
    load(mine)
    alone = staying(model)
    assert torch.equal(expected["mine"], expected["none"])
    for name, patcher in others.items():
        assert torch.equal(sample(patcher), expected[name])
        theirs = staying(model)
        for _ in range(2):
            assert torch.equal(sample(mine.clone()), expected["mine"])
            assert staying(model) == alone
            assert torch.equal(sample(patcher), expected[name])
            assert staying(model) == theirs


def test_a_lora_is_applied_once_whatever_was_loaded_before(model):
    """Layers that stay have it in their weights, the others as they are used: never both. In float32 to the bit."""
    with_lora = add_lora(model)
    expected = sample(with_lora)
    patchers = [offload(with_lora, share(model, percent), str(percent)) for percent in (20, 50, 80)]
    for first, second in itertools.permutations(patchers, 2):
        for patcher in (first, second):
            assert torch.equal(sample(patcher), expected)


@pytest.mark.parametrize("percent", [0, 50])
def test_a_lora_hooked_to_a_prompt_is_the_same(percent, model):
    generator = torch.Generator().manual_seed(1)
    lora = {}
    for key, weight in model.model_state_dict().items():
        if key.endswith("to_q.weight"):
            name = key.removesuffix(".weight")
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 2, generator=generator)
            lora[f"{name}.lora_down.weight"] = torch.randn(2, weight.shape[1], generator=generator)
    hooks = comfy.hooks.create_hook_lora(lora, strength_model=0.5, strength_clip=0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt(model, 10), hooks)
    expected = sample(model, hooked)
    assert not torch.equal(expected, sample(model))
    mine = offload(model, share(model, percent))
    for _ in range(2):
        assert torch.equal(sample(mine, hooked), expected)
    assert bool(staying(model)) == bool(percent)
    assert torch.equal(sample(mine), sample(model))


def test_what_the_host_took_off_meanwhile_comes_back_as_it_was(model):
    mine = offload(model, share(model, 50))
    load(mine)
    alone, size = staying(model), mine.loaded_size()
    assert mine.partially_unload(CPU, size // 2) >= size // 2
    assert staying(model) != alone
    load(mine)
    assert staying(model) == alone
    assert mine.loaded_size() == size


def test_loading_again_moves_nothing(model, monkeypatch):
    mine = offload(model, share(model, 50))
    load(mine)
    monkeypatch.setattr(ModelPatcher, "patch_weight_to_device", lambda *args, **kwargs: pytest.fail("moved a weight"))
    load(mine.clone())


def test_other_models_are_untouched_and_stay_loaded(model):
    other = hosted.model("SD15", seed=9)
    other.load_device = GPU
    load(other)
    load(offload(model, share(model, 25)))
    load(other)
    assert staying(other) == {name for _, name in layers(other)}
    assert not isinstance(other, budgets.Budgeted)
    assert type(model) is ModelPatcher


def test_the_host_is_asked_for_room_for_the_budget_only(model, monkeypatch):
    """Else it would unload other models to make room for all of this one."""
    asked = []
    monkeypatch.setattr(
        comfy.model_management, "free_memory", lambda memory, device, *args, **kwargs: asked.append(memory) or []
    )
    load(offload(model))
    small = asked[0]
    asked.clear()
    load(model)
    assert asked[0] - small == pytest.approx(1.1 * size_mib(model) * MIB, rel=0.01)
    mine = offload(model, 1)
    assert mine.model_size() == mine.clone().model_size() == MIB
    assert mine.clone().size == model.model_size()


def test_a_budget_above_what_the_host_has_to_give_takes_no_more(model, monkeypatch):
    monkeypatch.setattr(comfy.model_management, "get_free_memory", no_memory)
    monkeypatch.setattr(comfy.model_management, "is_device_cpu", lambda device: False)
    monkeypatch.setattr(comfy.model_management, "vram_state", comfy.model_management.VRAMState.NORMAL_VRAM)
    load(offload(model, share(model, 50)))
    assert not staying(model)


def no_memory(device=None, torch_free_too=False):
    return (0, 0) if torch_free_too else 0


# Whatever patcher comes


def test_clones_and_patchers_of_other_packs_keep_it(model):
    """GGUF's, among others, have clones of their own class whatever class they are cloned from."""

    class Others(ModelPatcher):
        def clone(self, *args, **kwargs):
            kind, self.__class__ = self.__class__, Others
            clone = super().clone(*args, **kwargs)
            self.__class__ = kind
            clone.__class__ = Others
            return clone

    model.__class__ = Others
    mine = offload(model)
    assert isinstance(mine, Others)
    assert isinstance(mine, budgets.Budgeted)
    lost = mine.clone()
    assert type(lost) is Others
    sample(lost)
    assert isinstance(lost, budgets.Budgeted)
    assert not staying(model)
    assert lost.clone().size == size_mib(model) * MIB


def test_it_takes_its_place_in_any_order(model, last_lines):
    expected = sample(run_node("SlipstreamFreeU", model, "2", preset="SD 1.5"))
    above = offload(run_node("SlipstreamFreeU", model, "2", preset="SD 1.5"))
    below = run_node("SlipstreamFreeU", offload(model), "2", preset="SD 1.5")
    for patcher in (above, below):
        assert torch.equal(sample(patcher), expected)
        assert not staying(model)
        assert last_lines("1")[0][0] == last_lines("2")[0][0] == "active"


@pytest.mark.parametrize("family", ["SDXL", "DiT"])
def test_any_architecture(family, last_lines):
    patcher = hosted.model(family)
    patcher.load_device = GPU
    expected = sample(patcher)
    assert torch.equal(sample(offload(patcher, share(patcher, 50))), expected)
    assert last_lines("1")[0][0] == "active"


def test_behind_it_a_model_compiles_or_says_why_not(last_lines):
    model = hosted.model("tiniest")
    model.load_device = GPU
    mine = hosted.compile_model(offload(model), "2")
    assert torch.equal(sample(mine), sample(model))
    assert last_lines("1")[0][0] == "active"


def fail(*_):
    raise PlantedError("a planted error")


def interrupt(*_):
    raise comfy.model_management.InterruptProcessingException


@pytest.mark.parametrize("end", [fail, interrupt])
@pytest.mark.parametrize("percent", [0, 50])
def test_a_run_that_ends_early_leaves_a_model_that_runs(percent, end, model):
    expected = sample(model)
    mine = offload(add_lora(model), share(model, percent))
    with_lora = sample(mine)
    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(end)
    with pytest.raises((PlantedError, comfy.model_management.InterruptProcessingException)):
        sample(mine)
    handle.remove()
    assert torch.equal(sample(mine), with_lora)
    assert torch.equal(sample(model), expected)
    assert staying(model) == {name for _, name in layers(model)}


def test_a_load_that_fails_leaves_a_model_that_loads(model):
    expected = sample(model)
    mine = offload(add_lora(model), share(model, 50))
    with_lora, kept = sample(mine), staying(model)
    failing = offload(mine.clone(), share(model, 50))
    failing.add_callback(CallbacksMP.ON_LOAD, fail)
    sample(model)
    with pytest.raises(PlantedError):
        sample(failing)
    assert model.loaded_size() == 0
    assert torch.equal(sample(mine), with_lora)
    assert staying(model) == kept
    assert torch.equal(sample(model), expected)


# What is told


def test_the_verdict_says_what_stayed(model, last_lines):
    budget_mib = share(model, 50)
    sample(offload(model, budget_mib))
    kept = staying(model)
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert f"kept {model.loaded_size() / MIB:.0f} of {size_mib(model):.0f} MiB of weights on cpu:0" in text
    assert f"({len(kept)} of {len(layers(model))} layers); the others came as they were used" in text
    sample(offload(model, 0, "2"))
    assert f"all {len(layers(model))} layers came as they were used" in last_lines("2")[0][1]
    sample(offload(model, 1000, "3"))
    assert last_lines("3")[0][0] == "inert"
    assert "within the budget of 1000 MiB" in last_lines("3")[0][1]


def test_on_the_cpu_alone_it_says_that_there_is_nothing_to_do(last_lines):
    model = hosted.model("SD15")
    assert torch.equal(sample(offload(model)), sample(model))
    assert last_lines("1") == [
        ("inert", "offloaded nothing: this model's weights are kept on cpu, where they are used")
    ]


def test_under_dynamic_vram_it_passes_through_and_says_what_the_run_took(model, last_lines, monkeypatch):
    machine = hosted.engine("host.machine")
    monkeypatch.setattr(machine, "is_dynamic", lambda patcher: True)
    in_use = itertools.chain([100 * MIB, 700 * MIB], itertools.repeat(300 * MIB))
    monkeypatch.setattr(machine, "device_memory", lambda device: (lambda: next(in_use), "of the device", True))
    expected = sample(model)
    mine = offload(model)
    assert type(mine) is ModelPatcher
    assert torch.equal(sample(mine), expected)
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert text.startswith("passed through: DynamicVRAM already brings this model's weights to cpu:0")
    assert text.endswith("at most 700 MiB were in use there in this run, other programs included")


@pytest.mark.parametrize(
    ("told", "words"),
    [({"full_allocation": "#cuda:0;4.0;cpu"}, "(#cuda:0;4.0;cpu)"), ({}, None), ("?", "(as it likes)")],
)
def test_where_distorch_has_the_say_it_is_told(told, words, model, last_lines):
    """ComfyUI-MultiGPU marks the models that it spreads over devices."""
    expected = sample(model)
    model.model._distorch_v2_meta = told
    mine = offload(model)
    assert isinstance(mine, budgets.Budgeted) == (words is None)
    assert torch.equal(sample(mine), expected)
    ((state, text),) = last_lines("1")
    assert state == ("active" if words is None else "inert")
    assert words is None or f"has the say over where this model's weights are {words}, whatever the budget" in text


def test_a_device_that_stops_telling_costs_no_image(model, last_lines, monkeypatch):
    def broken():
        if reads:
            raise RuntimeError("no answer")
        reads.append(1)
        return 100 * MIB

    reads = []
    monkeypatch.setattr(hosted.engine("host.machine"), "device_memory", lambda device: (broken, "of the device", True))
    sample(offload(model))
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert "at most" not in text
