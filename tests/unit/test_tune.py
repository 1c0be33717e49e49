"""Tune: which settings are tried, for models and machines that are described."""

from __future__ import annotations

import importlib

import pytest
from loading import PACK
from slipstream_pack.nodes.methods import deepcache, precision, quantize, winograd
from slipstream_pack.nodes.methods.method import Model
from slipstream_pack.nodes.methods.tune import APPROXIMATE, EVERYTHING, EXACT_ONLY, MAY_USE, ROWS, Given, ladder

UNET = Model("SD15", "SD1", 320, 12, 25, device="cuda")
DIT = Model("Flux", None, None, 0, 0, device="cuda")


def kind(stem):
    module = importlib.import_module(f"{PACK}.nodes.methods.{stem}")
    (found,) = (one for one in vars(module).values() if isinstance(one, type) and getattr(one, "stem", None) == stem)
    return found


def stems(may_use, model, cfg=5.0, taken=()):
    dials, _ = ladder(may_use, Given(model, cfg, frozenset(taken)), kind)
    return [dial.row.stem for dial in dials]


@pytest.fixture(autouse=True)
def installed(monkeypatch):
    """Everything that could be missing is there."""
    monkeypatch.setattr(quantize, "lacking", lambda scheme, device: None)
    monkeypatch.setattr(importlib.import_module(f"{PACK}.nodes.compiling.backends"), "find", lambda *_: None)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.stem)
def test_every_level_is_a_setting_that_does_something_and_they_differ(row):
    made = [kind(row.stem)(**settings) for settings in row.levels]
    assert all(config.off() is None for config in made)
    assert len(set(made)) == len(made)
    assert row.is_exact == all(config.is_exact for config in made)
    assert row.prepares == (row.stem in ("compile_model", "quantize"))


def test_what_excludes_does_so_both_ways():
    excludes = {row.stem: set(row.excludes) for row in ROWS}
    assert all(stem in excludes[other] for stem, others in excludes.items() for other in others)
    assert excludes["deepcache"] == {"forecast"}


def test_what_a_search_may_use():
    assert MAY_USE[0] == APPROXIMATE
    assert stems(EXACT_ONLY, UNET) == ["attention_backend"]
    assert stems(APPROXIMATE, UNET) == ["attention_backend", "cfg_cutoff", "forecast", "deepcache"]
    everything = ["attention_backend", "compile_model", "quantize", "cfg_cutoff", "forecast", "deepcache"]
    assert stems(EVERYTHING, UNET) == everything


def test_what_cannot_serve_a_model_is_left_out_and_told():
    dials, left_out = ladder(APPROXIMATE, Given(DIT, 5.0), kind)
    assert [dial.row.stem for dial in dials] == ["attention_backend", "cfg_cutoff", "forecast"]
    assert any(text.startswith("DeepCache: ") for text in left_out)
    assert all(isinstance(config, deepcache.Configuration) for dial in dials for config in dial.configs)


def test_without_guidance_none_is_left_out():
    assert "cfg_cutoff" not in stems(APPROXIMATE, UNET, cfg=1.0)


def test_a_method_that_is_on_the_model_already_stays_as_it_is():
    dials, left_out = ladder(APPROXIMATE, Given(UNET, 5.0, frozenset({"forecast"})), kind)
    assert "forecast" not in [dial.row.stem for dial in dials]
    assert "Forecast is on the model already, and stays as it is" in left_out


def test_what_is_for_processors_is_tried_on_them_alone():
    on_cpu = Model("SD15", "SD1", 320, 12, 25, device="cpu")
    assert "winograd" in stems(APPROXIMATE, on_cpu)
    assert "winograd" not in stems(APPROXIMATE, UNET)


@pytest.mark.parametrize("is_able", [True, False])
def test_what_a_processor_computes_as_something_else_is_not_tried_twice(is_able, monkeypatch):
    monkeypatch.setattr(precision, "has_bf16", lambda: is_able)
    monkeypatch.setattr(winograd, "has_bf16", lambda: is_able)
    monkeypatch.setattr(quantize, "multiplies_in_int8", lambda device: is_able or device != "cpu")
    dials, left_out = ladder(EVERYTHING, Given(Model("SD15", "SD1", 320, 12, 25, device="cpu"), 5.0), kind)
    tried = {dial.row.stem: dial.configs for dial in dials}
    assert len(tried["winograd"]) == 1 + is_able
    assert ("precision" in tried) == is_able
    assert any(config.scheme == "int8 dynamic" for config in tried["quantize"]) == is_able
    no_bf16 = "changes nothing: this processor has no bf16 arithmetic"
    expected = [f"Precision: auto {no_bf16}", f"Winograd: bf16 {no_bf16}", "Quantize Model: int8 dynamic is no faster"]
    assert [any(text.startswith(start) for text in left_out) for start in expected] == [not is_able] * 3
    # A GPU is not asked what the processor can.
    assert ladder(EVERYTHING, Given(UNET, 5.0), kind)[1] == []
