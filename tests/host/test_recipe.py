"""The Recipe node in the real host: what it puts on a model, what it tells, and how it goes with other nodes."""

from __future__ import annotations

import itertools
import sys
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import hosted
import pytest
import torch
from comfy_execution.utils import CurrentNodeContext
from hosted import add_lora, execute, run_node, sample
from small_models import transformer

GPU = torch.device("cpu", 0)
"""The CPU by its index: another device to the host, so it loads and offloads, but nothing really moves."""


def planned(patcher, goal, node_id="1"):
    return run_node("SlipstreamRecipe", patcher, node_id, goal=goal)


def settings(patcher):
    """The plan: of each method what was set, and whether only suggested."""
    return {entry.config.stem: entry for entry in hosted.engine("plan.plan").plan_of(patcher).entries}


@pytest.fixture
def told():
    """What a node says of itself."""
    verdicts = hosted.engine("telling.verdicts")
    verdicts._kept.clear()
    return lambda node_id="1": verdicts._kept[(None, node_id)].lines[verdicts.TOLD]["text"]


@pytest.fixture
def no_measuring(monkeypatch):
    """Winograd's convolutions as one form: which is fastest takes seconds to find out."""
    winograd = hosted.method("winograd")
    monkeypatch.setattr(winograd, "forms", lambda name, *_: (winograd.Form(2 if name == "F(2x2)" else 4),))
    monkeypatch.setattr(winograd, "choose", lambda call, candidates: winograd.Choice(candidates[0], {}))


@pytest.fixture
def given(monkeypatch):
    """Describes the machine otherwise than it is."""
    recipe = hosted.engine("recipe")
    look, set_to = recipe.given, {}

    def found(patcher):
        seen = look(patcher)
        others = {name: value for name, value in set_to.items() if name != "device"}
        return replace(seen, model=replace(seen.model, device=set_to.get("device", seen.model.device)), **others)

    monkeypatch.setattr(recipe, "given", found)
    return set_to.update


def test_what_is_given_is_the_models_and_the_machines(model):
    seen = hosted.engine("recipe").given(model)
    assert (seen.model.family, seen.model.device, seen.has_ram_apart) == ("SD1", "cpu", False)
    weights = sum(weight.nbytes for weight in model.model.state_dict().values()) / 2**20
    assert seen.size_mib == pytest.approx(weights)
    assert 0 < seen.int8_mib < weights / 4
    assert seen.device_mib > weights
    assert 100 < seen.activations_mib < 10_000
    assert not seen.is_dynamic


def test_of_a_transformer_what_quantize_model_takes_is_counted():
    """Neither modulation nor what is quantized already."""
    look, flux = hosted.engine("recipe").given, transformer("Flux")
    blocks = [part for name in ("double_blocks", "single_blocks") for part in getattr(flux.model.diffusion_model, name)]
    layers = [
        layer
        for block in blocks
        for path, layer in block.named_modules()
        if isinstance(layer, torch.nn.Linear) and "mod" not in path
    ]
    assert look(flux).int8_mib == pytest.approx(1.02 * sum(layer.weight.numel() for layer in layers) / 2**20)
    for layer in layers:
        layer.weight = torch.nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    assert look(flux).int8_mib == 0


def test_what_is_given_does_not_depend_on_what_is_wired_before(model):
    look = hosted.engine("recipe").given
    model.load_device = GPU
    expected = look(model)
    budgeted = run_node("SlipstreamSequentialOffload", add_lora(model), budget_mib=1)
    budgeted.model_options["transformer_options"]["easycache"] = SimpleNamespace(name="EasyCache")
    assert look(budgeted) == expected
    comfy.model_management.load_models_gpu([budgeted])
    assert look(budgeted) == expected


@pytest.mark.parametrize("name", ["minimal", "base", "refiner", "DiT"])
@pytest.mark.parametrize("goal", hosted.method("recipe").GOALS)
def test_every_goal_on_every_family(goal, name, told):
    patcher = hosted.model(name)
    plan = settings(planned(patcher, goal))
    assert all(entry.suggested for entry in plan.values())
    for entry in plan.values():
        entry.config.check(hosted.engine("plan.models").describe(patcher, {}))
        assert f"+ {entry.config.title}" in told()
    # On a processor.
    assert {"attention_backend"} <= set(plan)
    assert ("winograd" in plan) == (goal in ("balanced", "fastest") and name != "DiT")
    assert settings(planned(patcher, goal)) == plan
    assert not settings(patcher)


def test_a_run(model, told, last_lines, no_measuring):
    fast = planned(model, "fastest")
    with hosted.Counter(fast) as counted:
        image = sample(fast, steps=12)
    assert torch.equal(sample(fast, steps=12), image)
    # Half of the steps without guidance, and some of the evaluations skipped.
    assert set(counted.rows) == {1, 2}
    assert len(counted.rows) < 12
    text = told()
    assert f"Forecast: skipped {12 - len(counted.rows)} of 12 evaluations" in last_lines("1")[-1][1]
    assert text.startswith("fastest, for SD15 (")
    assert "\n+ CFG Cutoff, cutoff 0.5: " in text
    assert "\n- no FreeU: changes the picture on purpose\n" in text
    assert "\n> Tiny VAE " in text


def test_the_list_stays_above_what_became_of_each_also_where_the_node_is_cached(model, monkeypatch):
    """A second prompt, in which the node does not execute."""
    verdicts = hosted.engine("telling.verdicts")
    verdicts._kept.clear()
    sent, running = [], []
    queue = SimpleNamespace(get_current_queue_volatile=lambda: (running, []))
    instance = SimpleNamespace(
        prompt_queue=queue, client_id="c", send_progress_text=lambda text, node, client: sent.append(text)
    )
    monkeypatch.setitem(sys.modules, "server", SimpleNamespace(PromptServer=SimpleNamespace(instance=instance)))
    graph = {"1": {"class_type": "SlipstreamRecipe", "inputs": {}}, "3": {"class_type": "KSampler", "inputs": {}}}
    extra = {"extra_pnginfo": {"workflow": {"id": "w"}}, "client_id": "c"}

    def prompt(name, node):
        running[:] = [(0, name, graph, extra, [])]
        return CurrentNodeContext(name, node)

    with prompt("first", "1"):
        best = planned(model, "best quality")
    for name in ("first", "second"):
        with prompt(name, "3"):
            sample(best, steps=1)
        first, *others = verdicts._kept[("w", "1")].lines.values()
        assert (first["sampler"], first["state"]) == ("", "active")
        assert first["text"].startswith("best quality, for SD15")
        assert [line["sampler"] for line in others] == ["KSampler 3"]
        assert others[0]["text"].startswith("Attention Backend: PyTorch's choice of kernel")
        assert sent[-1] == "\n".join(line["text"] for line in (first, *others))


def test_without_anything_to_choose_it_is_the_very_same_model_and_says_why(given, last_lines):
    dit = hosted.model("DiT")
    given(device="cuda", device_mib=1024)
    assert planned(dit, "best quality") is dit
    ((state, text),) = last_lines("1")
    assert state == "off"
    assert text.startswith("off: nothing to choose. best quality, for AuraFlow (")
    assert "\n- no Compile Model: not all of AuraFlow fits into the 1024 MiB of cuda\n" in text


def test_a_node_of_a_methods_own_wins_wherever_it_is_wired(model, last_lines, no_measuring):
    cutoff = lambda patcher: run_node("SlipstreamCFGCutoff", patcher, "2", cutoff=0.25)  # noqa: E731
    images = [sample(patcher) for patcher in (cutoff(planned(model, "fastest")), planned(cutoff(model), "fastest"))]
    assert torch.equal(*images)
    assert not torch.equal(images[0], sample(planned(model, "fastest")))
    ((state, text),) = last_lines("2")
    assert (state, text[:3]) == ("active", "no ")


@pytest.mark.parametrize("order", itertools.permutations(range(3)))
def test_any_order_with_lora_and_other_nodes(order, model, no_measuring):
    put = [
        lambda patcher: planned(patcher, "balanced"),
        add_lora,
        lambda patcher: run_node("SlipstreamFreeU", hosted.add_core_freeu(patcher), "2", preset="SD 1.5"),
    ]
    patcher, expected = model, model
    for i in order:
        patcher = put[i](patcher)
    for one in put:
        expected = one(expected)
    image = sample(patcher, steps=4)
    assert torch.equal(image, sample(expected, steps=4))
    assert not torch.equal(image, sample(planned(model, "balanced"), steps=4))


def test_two_that_differ_are_refused_naming_both(model, last_lines):
    one, other = planned(model, "balanced", "41"), planned(model, "fastest", "42")
    for both in (planned(one, "fastest", "42"), planned(other, "balanced", "41")):
        with pytest.raises(ValueError, match=r"CFG Cutoff: node 4[12] and node 4[12] .*cutoff 0\.\d+ against 0\.\d+"):
            sample(both)
        assert last_lines("41")[-1][0] == last_lines("42")[-1][0] == "failed"


def test_two_that_agree_are_one(model, told):
    image = sample(planned(model, "best quality"))
    assert torch.equal(sample(planned(planned(model, "best quality"), "best quality", "2")), image)
    assert told("1") == told("2")


def test_beside_the_cpu_node(model, no_measuring):
    """It suggests the same on a processor."""
    cpu = lambda patcher, **inputs: run_node("SlipstreamCPU", patcher, "2", **inputs)  # noqa: E731
    expected = sample(planned(model, "balanced"))
    assert torch.equal(sample(cpu(planned(model, "balanced"))), expected)
    assert torch.equal(sample(planned(cpu(model), "balanced")), expected)
    for both in (
        cpu(planned(model, "balanced"), winograd="F(2x2)"),
        planned(cpu(model, winograd="F(2x2)"), "balanced"),
    ):
        with pytest.raises(ValueError, match=r"Winograd: node [12] and node [12] .*form"):
            sample(both)


def test_a_suggestion_that_another_node_rules_out_is_left_out_wherever_that_is_wired(model, last_lines, no_measuring):
    def cached(patcher):
        patcher = patcher.clone()
        patcher.model_options["transformer_options"]["easycache"] = SimpleNamespace(name="EasyCache")
        return patcher

    images = [sample(patcher) for patcher in (cached(planned(model, "balanced")), planned(cached(model), "balanced"))]
    assert torch.equal(*images)
    *_, (state, text) = last_lines("1")
    assert state == "inert"
    assert text.startswith("Forecast: left out: this model already has EasyCache on it")


@pytest.mark.parametrize("percent", [60, 30])
def test_a_memory_goal_keeps_the_weights_within_it(percent, model, given, monkeypatch, told):
    """Of the device's memory. What is beside weights is not there to be counted."""
    recipe = hosted.method("recipe")
    model.load_device = GPU
    size = comfy.model_management.module_size(model.model) / 2**20
    beside = recipe.RESERVED_MIB + recipe.LEAST_ACTIVATIONS_MIB
    monkeypatch.setitem(recipe.LIMITS, "under 4 GB", beside + size * percent / 100)
    given(device="cuda", activations_mib=0, has_ram_apart=True, int8_mib=size)
    carrying = planned(add_lora(model), "under 4 GB")
    assert list(settings(carrying)) == ["sequential_offload", "cfg_cutoff", "forecast"]
    budget = settings(carrying)["sequential_offload"].config.budget_mib
    assert budget == int(size * percent / 100)
    image = sample(carrying, steps=4)
    assert 0 < model.loaded_size() <= budget * 2**20
    cut = run_node("SlipstreamCFGCutoff", add_lora(model), cutoff=0.75)
    assert torch.equal(sample(cut, steps=4), image)
    assert f"+ Sequential Offload, budget_mib {budget}: " in told()
    assert "> Stage Offload " in told()


def test_the_node_has_the_default_goal(model):
    assert set(settings(execute("SlipstreamRecipe", model=model).result[0])) == set(
        settings(planned(model, "balanced"))
    )
