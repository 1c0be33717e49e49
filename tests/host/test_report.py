"""The Report node: the last run of a model, and what it says where there is none."""

from __future__ import annotations

from dataclasses import replace

import comfy.model_management
import hosted
import pytest
from hosted import execute, latent, run_node, sample


@pytest.fixture
def verdicts(monkeypatch):
    """The engine's verdicts, in a prompt of their own."""
    module = hosted.engine("telling.verdicts")
    hosted.engine("telling.history")._kept.clear()
    graph = {"3": {"class_type": "KSampler", "inputs": {}}}
    module.here = module.Prompt("first", "workflow", "3", None, graph)
    monkeypatch.setattr(module, "current_prompt", lambda: module.here)
    return module


def report(model):
    return execute("SlipstreamReport", "9", model=model, after={"samples": latent(model)}).result[0]


def test_it_tells_time_steps_and_each_verdict(model, verdicts):
    model = run_node("SlipstreamCFGCutoff", run_node("SlipstreamDeepCache", model, "1"), "2", cutoff=0.5)
    sample(model)
    counts, cutoff, deepcache = report(model).splitlines()
    assert counts.startswith("KSampler 3: 6 steps in ")
    assert counts.endswith("6 evaluations, 9 predictions")
    assert " s a step (" in counts
    assert cutoff.startswith("CFG Cutoff: no guidance from step 3 of 6")
    assert deepcache.startswith("DeepCache: reused the deep features in 4 of 6 steps")
    ((line),) = verdicts._kept[("workflow", "9")].lines.values()
    assert line["state"] == "active"
    assert len(verdicts._kept[("workflow", "9")].record["step_s"]) == 6


def test_a_prompts_runs_are_added_up(model, verdicts):
    model = run_node("SlipstreamCFGCutoff", run_node("SlipstreamDeepCache", model, "1"), "2", cutoff=0.5)
    verdicts.here = replace(verdicts.here, id="two runs")
    sample(model)
    sample(model)
    for node in ("1", "2"):
        totals = dict(verdicts._kept[("workflow", node)].totals)
        assert totals.pop("elapsed_s") > 0
        assert totals == {"evaluations": 12, "predictions": 18, "full_predictions": 24, "reused": 8}
    verdicts.here = replace(verdicts.here, id="one more")
    sample(model)
    assert verdicts._kept[("workflow", "1")].as_dict()["totals"]["evaluations"] == 6


def test_steps_add_up_to_the_run(model, verdicts):
    model = run_node("SlipstreamFreeU", model)
    sample(model, sampler="heun", steps=5)
    record = next(iter(hosted.engine("telling.history")._kept.values())).record
    assert len(record["step_s"]) == 5
    assert sum(record["step_s"]) <= record["elapsed_s"]
    assert record["elapsed_s"] - sum(record["step_s"]) < 0.5 * record["elapsed_s"]


def test_two_samplers_of_one_chain_each_have_their_own_run(model, verdicts):
    """The second model has one more method: their nodes are shared, their runs are not."""
    first = run_node("SlipstreamDeepCache", model, "1")
    second = run_node("SlipstreamCFGCutoff", first, "2", cutoff=0.5)
    sample(first, steps=4)
    sample(second, steps=6)
    assert ": 4 steps in" in report(first)
    assert ": 6 steps in" in report(second)
    sample(second, steps=8)
    assert ": 8 steps in" in report(second)


def test_two_samplers_of_one_model_are_both_shown(model, verdicts):
    model = run_node("SlipstreamDeepCache", model, "1")
    sample(model, steps=4)
    verdicts.here = verdicts.Prompt("first", "workflow", "5", None, {"5": {"class_type": "KSampler", "inputs": {}}})
    sample(model, steps=6)
    first, second = (line for line in report(model).splitlines() if "KSampler" in line)
    assert first.startswith("KSampler 3: 4 steps")
    assert second.startswith("KSampler 5: 6 steps")


def test_clones_that_other_nodes_make_are_the_same_model(model, verdicts):
    model = run_node("SlipstreamDeepCache", model, "1")
    sample(hosted.add_lora(model))
    assert ": 6 steps in" in report(model)


def test_a_run_of_an_earlier_prompt_is_called_that(model, verdicts):
    model = run_node("SlipstreamFreeU", model)
    sample(model)
    verdicts.here = verdicts.Prompt("second", "workflow", "9")
    assert report(model).startswith("an earlier prompt's run: KSampler 3: 6 steps")
    verdicts.here = verdicts.Prompt("third", "another workflow", "9")
    assert report(model).startswith("an earlier prompt's run: KSampler 3: 6 steps")


def test_an_interrupted_run_says_so(model, verdicts):
    model = run_node("SlipstreamFreeU", model)

    def stop(step, *_):
        if step == 2:
            raise comfy.model_management.InterruptProcessingException

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(model, callback=stop)
    assert report(model).startswith("KSampler 3: interrupted after ")
    # Two steps were over, the third was cut off.
    assert len(verdicts._kept[("workflow", "9")].record["step_s"]) == 2
    ((line),) = verdicts._kept[("workflow", "9")].lines.values()
    assert line["state"] == "interrupted"


def test_without_a_run_or_a_method_it_says_what_to_do(model, verdicts):
    assert "no Slipstream method is on this model" in report(model)
    assert "no sampler has run this model yet" in report(run_node("SlipstreamFreeU", model))
    ((line),) = verdicts._kept[("workflow", "9")].lines.values()
    assert line["state"] == "inert"


def test_a_benchmarks_runs_are_not_the_models(model, verdicts):
    carrying = run_node("SlipstreamFreeU", model)
    inputs = {name: hosted.prompt(model, 10) for name in ("positive", "negative")}
    inputs |= {"latent_image": {"samples": latent(model)}, "sampler_name": "euler", "scheduler": "normal"}
    execute("SlipstreamBenchmark", "8", baseline=model, candidate=carrying, **inputs, steps=3, runs=1)
    assert "no sampler has run this model yet" in report(carrying)
