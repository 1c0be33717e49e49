"""Recipe: what is chosen for each goal, on machines and for models that are described, not had."""

from __future__ import annotations

import ast
import importlib
import itertools
import json
from dataclasses import fields, replace

import pytest
from loading import PACK, ROOT
from slipstream_pack.nodes.methods import compile_model, quantize, recipe
from slipstream_pack.nodes.methods.method import Model
from slipstream_pack.nodes.methods.recipe import GOALS, LIMITS, NEVER, ROWS, Given, choose

FUSED = {"fuse_qkv": True}

SIZES = {
    # Family, weights in fp16, what Quantize Model makes of them in eight bits, features of a guided 1024x1024, in MiB.
    "SD15": ("SD1", 1640, 240, 655),
    "SDXL": ("SDXL", 4897, 2150, 524),
    "SDXLRefiner": ("SDXL refiner", 4310, 1900, 655),
    "Flux": (None, 22700, 8100, 2031),
    "FluxSchnell": (None, 22700, 8100, 2031),
    "Flux in fp8": (None, 11350, 0, 2031),
    "ZImage": (None, 11740, 5900, 1600),
}
MACHINES = {
    "RTX 3090": ("cuda", 24576, {}),
    "RTX 4060": ("cuda", 8188, {"is_dynamic": True}),
    "RTX 2060": ("cuda", 6144, {"has_bf16": False}),
    "RTX 4090, no loader": ("cuda", 24564, {"is_dynamic": True, "is_reloadable": False}),
    "Arc": ("xpu", 16384, {}),
    "Mac": ("mps", 32768, {"has_ram_apart": False}),
    "Xeon": ("cpu", 65536, {"has_ram_apart": False}),
    "Ryzen": ("cpu", 16384, {"has_ram_apart": False, "has_bf16": False}),
}


def describe(machine, model):
    device, device_mib, others = MACHINES[machine]
    family, *sizes = SIZES[model]
    blocks = (320, 12, 25) if family else (None, 0, 0)
    return Given(Model(model, family, *blocks, device=device), device_mib, *sizes, **others)


def kind(stem):
    """As the engine's registry does."""
    found = vars(importlib.import_module(f"{PACK}.nodes.methods.{stem}")).values()
    (one,) = (one for one in found if isinstance(one, type) and getattr(one, "stem", None) == stem)
    return one


REGISTRY = next(
    set(ast.literal_eval(node.value))
    for node in ast.parse((ROOT / "nodes" / "engine" / "plan" / "registry.py").read_text()).body
    if isinstance(node, ast.Assign)
)


@pytest.fixture
def installed(monkeypatch):
    """Sets what is there beside torch."""

    def having(*names):
        def find(settings, device):
            if "inductor" not in names or device.type == "mps":
                raise RuntimeError("Compile Model: inductor needs Triton to compile for a GPU. Install it with: pip")

        monkeypatch.setattr(compile_model.backends, "find", find)
        lacking = None if "torchao" in names else "torchao is not installed. Install it with: pip"
        monkeypatch.setattr(quantize, "lacking", lambda scheme, device: lacking)

    return having


INSTALLS = ((), ("inductor",), ("torchao",), ("inductor", "torchao"))


def stems(found):
    return [choice.config.stem for choice in found.chosen]


def settings(found):
    return {choice.config.stem: dict(choice.settings) for choice in found.chosen}


@pytest.fixture
def everywhere(installed):
    """Each model on each machine, with each of what may be installed: (given, installed)."""

    def cases():
        for names, machine, model in itertools.product(INSTALLS, MACHINES, SIZES):
            installed(*names)
            yield describe(machine, model), names

    return cases


every_goal = pytest.mark.parametrize("goal", GOALS)


# The table


def test_every_row_names_a_method_settings_goals_and_needs_that_there_are():
    for row in ROWS:
        assert row.stem in REGISTRY
        assert set(row.settings) <= {field.name for field in fields(kind(row.stem))}
        assert set(row.goals) <= set(GOALS)
        assert set(row.needs) <= set(recipe.NEEDS)
    for one in (*NEVER, *recipe.ADVICE):
        assert set(one.goals) <= set(GOALS)
        assert set(getattr(one, "needs", ())) <= set(recipe.NEEDS)


def test_every_need_is_needed():
    assert {need for one in (*ROWS, *recipe.ADVICE) for need in one.needs} == set(recipe.NEEDS)


@every_goal
def test_every_method_is_in_a_goals_rows_or_has_a_reason_against_it(goal):
    chosen, never = ({one.stem for one in table if goal in one.goals} for table in (ROWS, NEVER))
    assert chosen | never == REGISTRY
    assert not chosen & never


def test_the_likenesses_told_are_those_that_were_measured():
    """benchmarks/results/approximations and forecast, of the sampler that both have"""
    results = ROOT / "benchmarks" / "results"
    figures = json.loads((results / "approximations" / "figures.json").read_text())
    measured = {(row["method"], row["setting"]): row["ssim"] for row in figures["rows"]}
    rows = json.loads((results / "forecast" / "figures.json").read_text())["rows"]
    measured |= {(row["method"], row["setting"]): row["ssim"] for row in rows if row["sampler"] == "dpmpp_2m"}
    for row in ROWS:
        if row.stem == "forecast":
            key = ("Forecast", row.settings.get("error_budget", kind("forecast")().error_budget))
        elif row.stem == "cfg_cutoff":
            key = ("CFG Cutoff", f"cutoff {row.settings['cutoff']:g}")
        else:
            assert "SSIM" not in row.costs
            continue
        assert f"SSIM {measured[key]:.3f})" in row.costs


# What is chosen


@every_goal
def test_what_is_chosen_serves_the_model_and_is_there_and_the_rest_has_a_reason(goal, everywhere):
    for given, names in everywhere():
        found = choose(goal, given, kind)
        for choice in found.chosen:
            choice.config.check(given.model)
            assert choice.config.off() is None
        assert ("compile_model" in stems(found)) <= ("inductor" in names)
        assert ("quantize" in stems(found)) <= ("torchao" in names)
        titles = [choice.config.title for choice in found.chosen]
        assert len(set(titles)) == len(titles)
        assert set(titles) | set(found.left) == {kind(stem).title for stem in REGISTRY}
        assert not set(titles) & set(found.left)
        text = str(found)
        assert text.startswith(f"{goal}, for {given.model.name} ({given.size_mib} MiB) on {given.model.device} (")
        assert "{" not in text
        assert str(choose(goal, replace(given), kind)) == text


def test_best_quality_is_exact(everywhere):
    for given, _ in everywhere():
        assert all(choice.config.is_exact for choice in choose("best quality", given, kind).chosen)


@pytest.mark.parametrize("goal", LIMITS)
def test_memory_goals_leave_room_for_all_that_sampling_takes(goal, everywhere):
    for given, _ in everywhere():
        found = choose(goal, given, kind)
        # Nothing that needs memory beside the weights.
        assert set(stems(found)) <= {"attention_backend", "quantize", "sequential_offload", "forecast", "cfg_cutoff"}
        if not given.is_gpu or not given.has_ram_apart:
            assert set(stems(found)) <= {"attention_backend"}
            continue
        resident = settings(found).get("sequential_offload", {"budget_mib": given.size_mib})["budget_mib"]
        if "quantize" in stems(found):
            resident += given.int8_mib
            assert resident < given.size_mib
        beside = given.activations_mib + recipe.RESERVED_MIB
        assert resident + beside <= max(LIMITS[goal], beside)
        assert ("sequential_offload" in stems(found)) == (given.size_mib + beside > LIMITS[goal])


def test_a_goal_that_is_reached_already_changes_nothing(installed):
    installed("inductor", "torchao")
    found = choose("under 8 GB", describe("RTX 3090", "SDXL"), kind)
    assert found.chosen == []
    assert found.left["Sequential Offload"] == "all 4897 MiB of weights fit into the 6644 MiB left for them"
    assert any(line.startswith("Stage Offload") for line in found.advice)


@pytest.mark.parametrize(
    ("goal", "machine", "model", "expected"),
    [
        ("best quality", "RTX 3090", "SDXL", {"compile_model": {"backend": "inductor"}, "attention_backend": FUSED}),
        ("best quality", "RTX 3090", "Flux", {}),
        ("best quality", "RTX 3090", "ZImage", {"compile_model": {"backend": "inductor"}}),
        ("best quality", "RTX 2060", "SDXL", {}),
        ("best quality", "Xeon", "SD15", {"attention_backend": {}}),
        (
            "balanced",
            "RTX 3090",
            "SDXL",
            {
                "compile_model": {"backend": "inductor"},
                "attention_backend": FUSED,
                "forecast": {},
                "cfg_cutoff": {"cutoff": 0.75},
            },
        ),
        (
            "balanced",
            "RTX 4090, no loader",
            "SDXLRefiner",
            {"attention_backend": FUSED, "forecast": {}, "cfg_cutoff": {"cutoff": 0.75}},
        ),
        ("fastest", "RTX 3090", "Flux", {"forecast": {"error_budget": 0.2}, "cfg_cutoff": {"cutoff": 0.5}}),
        (
            "fastest",
            "Xeon",
            "SD15",
            {
                "attention_backend": {},
                "precision": {"scope": "transformers"},
                "winograd": {"bf16": True},
                "forecast": {"error_budget": 0.2},
                "cfg_cutoff": {"cutoff": 0.5},
            },
        ),
        (
            "fastest",
            "Xeon",
            "Flux",
            {
                "attention_backend": {},
                "precision": {},
                "forecast": {"error_budget": 0.2},
                "cfg_cutoff": {"cutoff": 0.5},
            },
        ),
        (
            "under 6 GB",
            "RTX 3090",
            "SDXL",
            {"sequential_offload": {"budget_mib": 4596}, "forecast": {}, "cfg_cutoff": {"cutoff": 0.75}},
        ),
        (
            "under 4 GB",
            "RTX 3090",
            "SDXL",
            {
                "quantize": {"scheme": "int8 weight-only", "offload_originals": "on"},
                "sequential_offload": {"budget_mib": 398},
                "forecast": {},
                "cfg_cutoff": {"cutoff": 0.75},
            },
        ),
        (
            "under 8 GB",
            "RTX 3090",
            "Flux",
            {"sequential_offload": {"budget_mib": 5137}, "forecast": {}, "cfg_cutoff": {"cutoff": 0.75}},
        ),
        ("under 4 GB", "Xeon", "SDXL", {"attention_backend": {}}),
        ("under 4 GB", "Mac", "SDXL", {}),
    ],
)
def test_a_choice(goal, machine, model, expected, installed):
    installed("inductor", "torchao")
    assert settings(choose(goal, describe(machine, model), kind)) == expected


@pytest.mark.parametrize("goal", GOALS)
def test_of_few_steps_nothing_is_left_out_and_only_a_class_tells_that(goal, installed):
    installed("inductor")
    for model in SIZES:
        text = str(choose(goal, describe("RTX 3090", model), kind))
        told = "> FluxSchnell is made for four steps at cfg 1" in text
        assert told == (model == "FluxSchnell" and goal in ("balanced", "fastest"))


def test_what_is_quantized_already_is_offloaded(installed):
    installed("torchao")
    found = choose("under 4 GB", describe("RTX 3090", "Flux in fp8"), kind)
    assert "sequential_offload" in stems(found)
    assert found.left["Quantize Model"].startswith("Flux in fp8 has no linear layers that are not quantized already")


def test_a_goal_that_cannot_be_reached_says_so(installed):
    installed()
    given = replace(describe("RTX 3090", "SDXL"), activations_mib=3932)
    found = choose("under 4 GB", given, kind)
    assert settings(found)["sequential_offload"] == {"budget_mib": 0}
    assert "smaller pictures: the features of 1024x1024, 3932 MiB, leave nothing for weights" in found.advice


def test_a_reason_is_a_few_words(installed):
    installed()
    found = choose("fastest", describe("RTX 3090", "SDXL"), kind)
    assert found.left["Compile Model"] == "inductor needs Triton to compile for a GPU"
    assert found.left["Winograd"] == "for processors, and this model runs on cuda"
    found = choose("under 4 GB", describe("RTX 4060", "SDXL"), kind)
    assert found.left["Quantize Model"] == "torchao is not installed"
    assert any(line.startswith("DynamicVRAM is on") for line in found.advice)
    found = choose("balanced", describe("RTX 2060", "SDXL"), kind)
    assert found.left["Compile Model"] == "not all of SDXL fits into the 6144 MiB of cuda"
    assert any(line.startswith("FP16-Fix VAE: cuda has no bf16") for line in found.advice)


def test_the_whole_text(installed):
    installed("inductor")
    assert str(choose("fastest", describe("RTX 3090", "SDXLRefiner"), kind)) == "\n".join(
        [
            "fastest, for SDXLRefiner (4310 MiB) on cuda (24576 MiB):",
            "+ Compile Model, backend inductor: fused code, the same picture up to rounding. Costs: a minute or "
            "more before the first picture, once more at a second size, then none",
            "+ Attention Backend, fuse_qkv on: q, k and v in one product, the same picture. Costs: memory for those "
            "weights once more (SDXL in fp16: 586 MiB)",
            "+ Forecast, error_budget 0.2: evaluations that can be foretold are skipped, about half of them. "
            "Costs: approximate (SSIM 0.993)",
            "+ CFG Cutoff, cutoff 0.5: half the work in the last half of the steps. Costs: approximate (SSIM 0.971)",
            "- no Precision: for processors, and this model runs on cuda",
            "- no Winograd: for processors, and this model runs on cuda",
            "- no DeepCache: Forecast is nearer to the exact picture in as much time",
            "- no Quantize Model: approximate; what it saves beside the others is not measured",
            "- no Sequential Offload: saves memory, not time",
            "- no FreeU: changes the picture on purpose",
            "> Tiny VAE decodes in a fraction of the time, with a little less detail",
        ]
    )


def test_half_of_the_weights_is_nobodys_goal():
    """2:4 sparse was measured, and no picture gains by it."""
    assert [row.settings for row in ROWS if row.stem == "quantize"]
    assert "2:4 sparse" in quantize.SCHEMES
    assert not [row for row in ROWS if "2:4 sparse" in row.settings.values()]
