"""The Tune node on real models: what it runs, finds, keeps and leaves behind."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import folder_paths
import hosted
import pytest
import safetensors.torch
import small_models
import torch
from hosted import NODES, add_lora, execute, fingerprint, latent, prompt, run_node, sample
from loading import ROOT
from PIL import Image

ROWS = hosted.method("tune").ROWS
STEPS = 7
"""The fewest of which Forecast may skip one."""

SIZE = 8
tune = hosted.engine("tune")
benchmark = hosted.engine("benchmark")
identity = hosted.engine("host.identity")
plan_of = hosted.engine("plan.plan").plan_of


@pytest.fixture
def vae(monkeypatch):
    """One that decodes at once: three of a latent's channels, as a picture."""
    vae = small_models.vae()

    def decode(latent):
        return torch.nn.functional.interpolate(latent[:, :3].sigmoid(), scale_factor=8).movedim(1, -1)

    monkeypatch.setattr(vae, "decode", decode)
    return vae


@pytest.fixture(scope="module", autouse=True)
def little_garbage():
    """Before and after each run it is looked for: not in what was there before."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """The host's folders, in scratch ones."""
    for kind in ("output", "temp", "user"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    return tmp_path


@pytest.fixture(autouse=True)
def runs(monkeypatch):
    """All runs, as (methods, steps, seed); and times that are those of the work that went through the network."""
    ran, real = [], benchmark.Subject.run

    def run(self, call, callback):
        methods = tuple(entry.config for entry in plan_of(self.model).entries)
        ran.append((methods, call.steps, call.seed, id(call.positive)))
        measured = real(self, call, callback)
        return replace(measured, seconds=0.01 * measured.rows + 0.001)

    monkeypatch.setattr(benchmark.Subject, "run", run)
    return ran


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A ladder of three dials."""
    table = hosted.method("tune")
    levels = {"cfg_cutoff": ({"cutoff": 0.75}, {"cutoff": 0.5}), "forecast": ({}, {"error_budget": 0.2})}
    rows = [replace(row, levels=levels.get(row.stem, row.levels)) for row in table.ROWS if row.stem in levels]
    monkeypatch.setattr(table, "ROWS", tuple(rows))
    return rows


@pytest.fixture
def tuned(vae):
    """Runs the node, with a small sampler call for what isn't given; gives its output."""
    prompts = {}

    def run(model, **values):
        call = {"seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler", "scheduler": "normal"}
        call |= {"seeds": 2, "floor": 0.5, "minutes": 60.0, "vae": vae}
        if not prompts:
            prompts.update({side: prompt(model, seed) for side, seed in (("positive", 10), ("negative", 11))})
        values = {**prompts, "latent_image": {"samples": latent(model, SIZE)}, **call, **values}
        return execute("SlipstreamTune", "9", model=model, **values)

    return run


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """What a search keeps: the first test that needs one fills it."""
    return tmp_path_factory.mktemp("measured") / "slipstream"


@pytest.fixture
def finished(model, tuned, folders, measured):
    """The output of a search that is over; of what it keeps, the node answers."""
    kept = folders / "user" / "slipstream"
    if measured.exists():
        shutil.copytree(measured, kept)
        return tuned(model)
    output = tuned(model)
    shutil.copytree(kept, measured)
    return output


OTHERS = '{"schema": 1, "about": {}, "trials": []}'
"""What another version may have kept."""


def report_of(output):
    return output.ui["slipstream_tuned"][0]


def test_it_finds_a_plan_and_returns_the_model_with_it(model, tuned, last_lines, folders):
    sample(model)
    before = fingerprint(model.model)
    output = tuned(model, save_as="found")
    model_out, images, markdown = output.result
    report = report_of(output)
    assert report["status"] == "finished"
    assert report["is_complete"]
    assert report["best"] == report["chosen"]
    assert report["checks"][-1]["holds"]
    assert report["checks"][-1]["worst"] >= 0.5
    found = [entry.config for entry in plan_of(model_out).entries]
    assert found
    assert report["best"].startswith(found[0].title)
    assert images.shape[0] == 2
    assert not torch.equal(images[0], images[1])
    assert markdown == report["markdown"]
    assert f"| {report['best']} |" in markdown
    saved = hosted.engine("saved_plans").read("Tune", "found")
    assert [entry.config for entry in saved.entries] == found
    assert last_lines("9")[0] == ("active", report["summary"])
    # What it returns samples as nodes would make it, and what came in is as it was.
    assert torch.isfinite(sample(model_out, steps=STEPS)).all()
    assert not plan_of(model).entries
    assert fingerprint(model.model) == before
    json.dumps(report, allow_nan=False)


def test_every_plan_that_was_tried_has_its_picture_and_the_exact_one(finished, folders):
    plans = report_of(finished)["plans"]
    pictures = [plan["image"] for plan in plans]
    assert len(pictures) > 3
    assert len({one["filename"] for one in pictures}) == len(pictures)
    for one in (*pictures, *(plan["exact_image"] for plan in plans)):
        assert (folders / "temp" / one["subfolder"] / one["filename"]).is_file()


def test_the_plans_pictures_are_those_that_wiring_it_makes(model, finished, vae):
    output = finished
    call = {"steps": STEPS, "cfg": 5.0, "seed": 1, "image": latent(model, SIZE)}
    for image, one in zip(output.result[1], (model, output.result[0]), strict=True):
        with torch.inference_mode():
            expected = vae.decode(sample(one, prompt(model, 10), prompt(model, 11), **call))
        assert torch.equal(image, expected[0].float())


def test_the_same_node_run_again_measures_nothing(model, tuned, finished, runs):
    first = report_of(finished)
    count = len(runs)
    again = report_of(tuned(model))
    assert len(runs) == count
    assert (again["best"], again["checks"], again["plans"]) == (first["best"], first["checks"], first["plans"])


def test_another_floor_uses_what_was_measured(model, tuned, finished, runs):
    count = len(runs)
    tuned(model, floor=0.45)
    assert len(runs) - count <= count // 2
    counted = [run for run in runs if run[0]]
    assert len(counted) == len(set(counted))


@pytest.mark.parametrize(
    "other",
    [
        {"steps": STEPS + 1},
        pytest.param({"cfg": 4.0}, marks=pytest.mark.long),
        pytest.param({"sampler_name": "heun"}, marks=pytest.mark.long),
        pytest.param({"scheduler": "simple"}, marks=pytest.mark.long),
        pytest.param({"denoise": 0.9}, marks=pytest.mark.long),
    ],
    ids=lambda other: next(iter(other)),
)
def test_another_sampler_call_is_measured_anew(other, model, tuned, folders):
    tuned(model, minutes=1e-6)
    tuned(model, minutes=1e-6, **other)
    assert len(list((folders / "user").rglob("*.json"))) == 2


def test_what_a_model_is_is_what_is_in_it(model):
    """Not its id or its uuid: another process finds it again."""
    same = small_models.model("minimal")
    assert identity.of_weights(same) == identity.of_weights(model)
    assert identity.of_weights(small_models.model("DiT")) != identity.of_weights(model)
    loras = [add_lora(model, seed=3), add_lora(model, seed=3), add_lora(model, seed=4), add_lora(model, 3, 0.4)]
    one, equal, other, weaker = (identity.of_patches(lora) for lora in loras)
    assert one == equal
    assert len({one, other, weaker, identity.of_patches(model)}) == 4
    # Also while a LoRA is patched into the weights.
    sample(loras[0])
    assert identity.of_weights(model) == identity.of_weights(same)


def test_prompts_are_told_apart_by_what_is_in_them(model):
    one, equal, other = prompt(model, 10), prompt(model, 10), prompt(model, 11)
    assert identity.digest(one) == identity.digest(equal) != identity.digest(other)
    controlled = [hosted.with_control(one, hosted.controlnet(model)) for _ in range(2)]
    assert identity.digest(controlled[0]) == identity.digest(controlled[1]) != identity.digest(one)
    controlled[1][0][1]["control"].set_cond_hint(torch.zeros(1, 3, 128, 128), 1.0)
    assert identity.digest(controlled[0]) != identity.digest(controlled[1])


@pytest.mark.parametrize("after", [3, *(pytest.param(after, marks=pytest.mark.long) for after in (1, 6, 10))])
def test_after_an_interrupt_it_goes_on_and_nothing_is_measured_twice(
    after, model, tuned, runs, monkeypatch, last_lines
):
    real = comfy.model_management.throw_exception_if_processing_interrupted
    monkeypatch.setattr(
        comfy.model_management,
        "throw_exception_if_processing_interrupted",
        lambda: comfy.model_management.interrupt_current_processing() or real() if len(runs) == after else real(),
    )
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tuned(model)
    state, text = last_lines("9")[0]
    assert state == "interrupted"
    # The first one is a warm-up, and the last one did not end.
    assert f"after {max(after - 2, 0)} runs" in text
    comfy.model_management.interrupt_current_processing(False)
    monkeypatch.undo()
    token = NODES["SlipstreamTune"].fingerprint_inputs()
    assert token != 0


@pytest.mark.parametrize(("after", "has_best"), [(7, False), (13, True)])
def test_an_interrupted_search_is_gone_on_with(after, has_best, model, tuned, runs, last_lines):
    class Crash(BaseException):
        pass

    real = tune.Tuning._run

    def crashing(self, task):
        if len(runs) == after:
            raise Crash
        return real(self, task)

    tune.Tuning._run = crashing
    try:
        with pytest.raises(Crash):
            tuned(model)
        state, text = last_lines("9")[0]
        assert state == "failed"
        best = r"; best so far: .+x faster.*, SSIM 0\.\d+ at the worst so far, not checked on fresh seeds yet"
        assert re.search(f"run it again to go on{best if has_best else ''}$", text)
        tune.Tuning._run = real
        report = report_of(tuned(model))
    finally:
        tune.Tuning._run = real
    assert report["is_complete"]
    counted = [run for run in runs if run[0] or run[1] != STEPS]
    assert len(counted) == len(set(counted))
    # Pictures of the exact model that were kept serve again.
    exact = [run for run in runs if not run[0] and run[1] == STEPS]
    # Each session has a warm-up.
    assert len(exact) <= report["runs"] - len(counted) + 2


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (RuntimeError("the compiler failed\nin many lines"), "RuntimeError: the compiler failed"),
        pytest.param(MemoryError(), "out of memory", marks=pytest.mark.long),
        (comfy.model_management.OOM_EXCEPTION("CUDA out of memory"), "out of memory"),
        pytest.param(ValueError("no such setting"), "ValueError: no such setting", marks=pytest.mark.long),
    ],
    ids=["compiler", "RAM", "VRAM", "setting"],
)
def test_a_method_that_fails_is_a_result(error, told, model, tuned, runs, monkeypatch):
    def begin(self, run):
        raise error

    forecast = hosted.method("forecast").Forecast
    real = forecast.begin
    monkeypatch.setattr(forecast, "begin", begin)
    report = report_of(tuned(model, seeds=1))
    assert report["is_complete"]
    assert "Forecast" not in (report["best"] or "")
    failed = [plan for plan in report["plans"] if "Forecast" in plan["name"]]
    assert failed
    assert all(plan["state"] == "failed" and told in plan["problem"] for plan in failed)
    assert told in report["markdown"]
    # Once it has passed, what was left out for it is found.
    monkeypatch.setattr(forecast, "begin", real)
    again = report_of(tuned(model, seeds=1))
    assert "Forecast" in again["best"]
    assert not any(plan["problem"] for plan in again["plans"])


@pytest.fixture
def planted(monkeypatch):
    """Changes what runs take and give: a function of (measured, pictures, call, configurations, number)."""

    def plant(change):
        counted, real = itertools.count(), benchmark.Subject.run

        def run(self, call, callback):
            measured = real(self, call, callback)
            configs = {entry.config.stem: entry.config for entry in plan_of(self.model).entries}
            measured, images = change(measured, self.result.images, call, configs, next(counted))
            self.result = replace(self.result, images=images)
            return measured

        monkeypatch.setattr(benchmark.Subject, "run", run)

    return plant


def test_a_method_that_is_slower_is_left_out_and_told(model, tuned, planted):
    def slower(measured, images, call, configs, number):
        return replace(measured, seconds=measured.seconds * (3 if "cfg_cutoff" in configs else 1)), images

    planted(slower)
    report = report_of(tuned(model, seeds=1))
    assert report["best"].startswith("Forecast")
    slow = [plan for plan in report["plans"] if plan["name"].startswith("CFG Cutoff")]
    # Nothing is built on it.
    assert [plan["state"] for plan in slow] == ["slower"] * 2
    assert all(plan["speed"]["value"] < 1 for plan in slow)
    assert "| not faster |" in report["markdown"]


def test_a_method_that_breaks_the_pictures_of_one_prompt_only_is_found_out_and_told(model, tuned, planted):
    second = prompt(model, 20)

    def broken(measured, images, call, configs, number):
        return measured, 1 - images if "forecast" in configs and call.positive is second else images

    planted(broken)
    report = report_of(tuned(model, seeds=2, positive_2=second, floor=0.05))
    assert report["best"].startswith("CFG Cutoff")
    assert "Forecast" not in report["best"]
    states = {plan["state"] for plan in report["plans"] if "Forecast" in plan["name"]}
    assert states <= {"below the floor", "unfinished", "unlikely"}
    assert "below the floor" in states
    assert report["checks"][-1]["holds"]


@pytest.mark.long
@pytest.mark.parametrize("at", [3, 6, 9, 13])
def test_a_machine_that_slows_down_in_the_middle_changes_nothing_and_is_told(at, model, tuned, planted, folders):
    pace = [1.0]

    def slowing(measured, images, call, configs, number):
        # Of each picture the same: what Forecast skips is not.
        seconds = call.steps / STEPS
        if "cfg_cutoff" in configs:
            seconds *= 0.5 + configs["cfg_cutoff"].cutoff / 2
        if "forecast" in configs:
            seconds *= 0.6 - configs["forecast"].error_budget
        return replace(measured, seconds=seconds * (pace[0] if number >= at else 1.0)), images

    planted(slowing)
    usual = report_of(tuned(model))
    shutil.rmtree(folders / "user" / "slipstream")
    pace[0] = 3.0
    planted(slowing)
    slowed = report_of(tuned(model))
    assert slowed["best"] == usual["best"]
    speeds = {plan["name"]: plan["speed"]["value"] for plan in usual["plans"]}
    for plan in slowed["plans"]:
        assert plan["speed"]["value"] == pytest.approx(speeds[plan["name"]], rel=0.02)
    assert slowed["checks"][-1]["speed"]["value"] == pytest.approx(usual["checks"][-1]["speed"]["value"], rel=0.02)
    assert usual["unsteady"] == 0 < slowed["unsteady"]
    assert "the machine was faster or slower after" in slowed["markdown"]
    assert any(line.startswith("the machine was faster or slower after") for line in slowed["told"])


@pytest.mark.parametrize("fails", [pytest.param(False, marks=pytest.mark.long), True], ids=["compiles", "fails"])
def test_a_compiler(fails, model, tuned, short, monkeypatch):
    """What it takes the first time is told apart; one that fails costs its own plans alone."""
    table = hosted.method("tune")
    row = next(row for row in ROWS if row.stem == "compile_model")
    # A graph that was made before would serve again.
    compiling = replace(row, levels=({"backend": "eager", "dynamic": "off" if fails else "auto"},))
    monkeypatch.setattr(table, "ROWS", (compiling, *table.ROWS))
    if fails:

        def compile_graph(*args):
            raise RuntimeError("no compiler was found")

        monkeypatch.setattr(hosted.DynamoAlone, "compile_graph", compile_graph)
    report = report_of(tuned(model, seeds=1, may_use="everything"))
    assert report["is_complete"]
    (alone,) = [
        plan for plan in report["plans"] if plan["name"].startswith("Compile Model, ") and "+" not in plan["name"]
    ]
    if fails:
        assert alone["state"] == "failed"
        assert "no compiler was found" in alone["problem"]
        assert "no compiler was found" in report["markdown"]
        assert report["best"]
        assert "Compile" not in report["best"]
        assert sum("Compile" in plan["name"] for plan in report["plans"]) == 1
    else:
        # It runs as it did, since dynamo alone makes nothing faster.
        assert alone["state"] == "slower"
        assert alone["first_s"] > 0


def test_pictures_that_are_not_finite_are_a_result(model, tuned, monkeypatch):
    module = hosted.method("forecast")
    real = module.ForecastRun.conditions
    monkeypatch.setattr(
        module.ForecastRun, "conditions", lambda self, *args: [one * float("nan") for one in real(self, *args)]
    )
    report = report_of(tuned(model, seeds=1))
    failed = [plan for plan in report["plans"] if "Forecast" in plan["name"]]
    assert failed
    assert all("NaN" in plan["problem"] for plan in failed)
    assert "Forecast" not in (report["best"] or "")


def test_a_picture_that_nobody_asked_for_is_no_fault_of_a_plan(model, vae):
    one = hosted.engine("trying")
    call = benchmark.SamplerCall(
        prompt(model, 10),
        prompt(model, 11),
        {"samples": latent(model, SIZE)},
        1,
        STEPS,
        5.0,
        "euler",
        "normal",
        1.0,
        "Tune",
    )
    runs = one.Runs(model, vae, call, [one.Prompts(call.positive, call.negative)], {})
    with pytest.raises(KeyError):
        runs.run(tune.Task("a plan", one.picture_of("others", 1), tune.Candidate()))


def test_a_model_that_gives_nan_itself_is_refused(model, tuned):
    broken = model.clone()
    broken.set_model_sampler_post_cfg_function(lambda args: args["denoised"] * float("nan"))
    with pytest.raises(RuntimeError, match="Tune: the model itself gives NaN"):
        tuned(broken)


def test_a_chosen_plan_is_used_and_nothing_measured(model, tuned, finished, runs):
    report = report_of(finished)
    other = next(plan["name"] for plan in report["plans"] if plan["name"] not in (report["best"], report["rival"]))
    count = len(runs)
    output = tuned(model, chosen=other)
    assert len(runs) == count
    assert report_of(output)["chosen"] == other
    assert report_of(output)["best"] == report["best"]
    assert " + ".join(map(hosted.engine("saved_plans").described, configs(output))) == other


def configs(output):
    return [entry.config for entry in plan_of(output.result[0]).entries]


@pytest.mark.parametrize("other", [{"seed": 99}, {"seeds": 5}, {"prompts": 30}], ids=lambda other: next(iter(other)))
def test_a_chosen_plan_is_one_of_the_last_search_whatever_stands_in_the_node(other, model, tuned, finished, runs):
    """The page may have drawn another seed by now."""
    first, count = report_of(finished), len(runs)
    plans = first["plans"]
    others = [plan["name"] for plan in plans if plan["name"] not in (first["best"], first["rival"])]
    # What has one dial alone was tried on the first picture, which the best one is shown by.
    one = min(others, key=lambda name: name.count(" + "))
    values = {"positive": prompt(model, other["prompts"])} if "prompts" in other else other
    output = tuned(model, chosen=one, **values)
    report = report_of(output)
    # What was measured, and with it the chart, is the same; the pictures are those that were kept.
    assert (report["chosen"], report["best"]) == (one, first["best"])
    assert (report["plans"], report["checks"]) == (plans, first["checks"])
    assert (report["settings"]["seed"], report["settings"]["seeds"]) == ("1", 2)
    assert len(runs) == count
    assert torch.equal(output.result[1][0], finished.result[1][0])


def test_what_was_kept_without_its_last_search_is_still_read(model, tuned, finished, runs, folders):
    (file,) = (folders / "user" / "slipstream" / "tune").glob("*.json")
    kept, count = json.loads(file.read_text()), len(runs)
    for last in (None, {"prompts": [], "seed": 1, "seeds": 1}, {"prompts": ["a"], "seed": "1", "seeds": 1}, 7):
        file.write_text(json.dumps({**kept, "last": last}))
        report = report_of(tuned(model, chosen=report_of(finished)["plans"][0]["name"]))
        assert report["plans"] == report_of(finished)["plans"]
        assert report["notes"] == report_of(finished)["notes"]
    assert len(runs) == count


def test_a_node_placed_by_hand_keeps_its_seed(monkeypatch):
    """Another one would begin another search."""

    def control(name):
        schema = NODES[name].define_schema()
        return next(one for one in schema.inputs if one.id == "seed").as_dict()["control_after_generate"]

    assert control("SlipstreamTune") == "fixed"
    assert control("SlipstreamBenchmark") is True
    # A host that knows of no such choice.
    monkeypatch.delattr(hosted.engine("node").io, "ControlAfterGenerate")
    assert control("SlipstreamTune") is True


def test_a_chosen_plan_that_was_never_tried_is_refused(model, tuned, runs):
    with pytest.raises(
        ValueError, match=r"Tune: chosen should be a plan that was tried here, but is 'magic'; .*none yet"
    ):
        tuned(model, chosen="magic")
    assert runs == []


def test_where_nothing_holds_the_very_model_comes_out(model, tuned, last_lines):
    output = tuned(model, floor=1.0)
    assert output.result[0] is model
    assert last_lines("9")[0][0] == "inert"
    images = output.result[1]
    assert torch.equal(images[0], images[1])
    assert "nothing is faster" in report_of(output)["summary"]


@pytest.mark.parametrize(
    "text", ["no json", *(pytest.param(text, marks=pytest.mark.long) for text in ("", "{}", OTHERS))]
)
def test_what_was_kept_and_is_broken_is_measured_anew_and_told(text, model, tuned, folders):
    tuned(model, minutes=1e-6)
    (file,) = (folders / "user" / "slipstream" / "tune").glob("*.json")
    file.write_text(text)
    report = report_of(tuned(model, minutes=1e-6))
    assert any("measured anew" in note for note in report["notes"])
    assert json.loads(file.read_text())["trials"]


@pytest.mark.parametrize("name", ["../evil", "a/b", ".hidden", "a .json", "mine (Slipstream)", "计" * 100])
def test_a_name_to_save_under_is_looked_at_before_anything_runs(name, model, tuned, runs):
    with pytest.raises(ValueError, match=r"Tune: (a plan's name has letters|names that end in \(Slipstream\))"):
        tuned(model, save_as=name)
    assert runs == []


def test_an_empty_prompt_is_refused_naming_it(model, tuned, runs):
    with pytest.raises(ValueError, match="Tune: expected a prompt at positive_2"):
        tuned(model, positive_2=[])
    assert runs == []


def test_further_prompts_are_tried_too(model, tuned, runs):
    second = prompt(model, 20)
    report = report_of(tuned(model, positive_2=second, seeds=1))
    assert report["pictures"] == 2
    assert {run[3] for run in runs} >= {id(second)}
    assert len({run[3] for run in runs}) == 2


@pytest.mark.long
def test_methods_that_are_on_the_model_stay_and_are_part_of_what_is_exact(model, tuned):
    freeu = run_node("SlipstreamFreeU", model, "5", preset="SD 1.5")
    output = tuned(freeu, seeds=1)
    stems = [config.stem for config in configs(output)]
    assert "freeu" in stems
    with_cutoff = run_node("SlipstreamCFGCutoff", model, "5", cutoff=0.9)
    report = report_of(tuned(with_cutoff, seeds=1))
    assert "CFG Cutoff is on the model already, and stays as it is" in report["notes"]
    assert not any("CFG Cutoff" in plan["name"] for plan in report["plans"])


def test_a_search_that_ran_out_of_time_is_not_answered_from_the_hosts_cache(model, tuned):
    token = NODES["SlipstreamTune"].fingerprint_inputs
    before = token(model=None, minutes=1.0)
    report = report_of(tuned(model, minutes=1e-6, seeds=1))
    assert not report["is_complete"]
    assert token() != before
    after = token()
    assert report_of(tuned(model, seeds=1))["is_complete"]
    assert token() == after


@pytest.mark.parametrize("left", [0, 40])
def test_a_picture_that_was_half_written_is_made_again(left, model, tuned, finished, runs, folders):
    """As after a crash of the whole machine."""
    kept = next((folders / "user" / "slipstream" / "tune").glob("*/"))
    (trials,) = (folders / "user" / "slipstream" / "tune").glob("*.json")
    exact = tune.Kept(json.loads(trials.read_text())["about"])
    for path in kept.glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:left])
    count = len(runs)
    output = tuned(model)
    assert report_of(output)["best"] == report_of(finished)["best"]
    # A warm-up, and the pictures that are given.
    assert [methods for methods, *_ in runs[count:]] == [(), (), tuple(configs(output))]
    assert torch.equal(output.result[1], finished.result[1])
    assert len(exact.log.trials) + 1 == len(tune.Kept(exact.about).log.trials)


@contextlib.contextmanager
def no_room():
    """No file can be written to, as the system has it."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_costs_no_run_and_is_told(model, tuned, monkeypatch, folders):
    """With the errors that the libraries raise then."""
    for place, name in ((safetensors.torch, "save_file"), (Path, "write_text"), (Image.Image, "save")):
        monkeypatch.setattr(place, name, no_room()(getattr(place, name)))
    report = report_of(tuned(model, seeds=1))
    assert report["best"]
    assert any("not everything could be kept: " in note and "too large" in note for note in report["notes"])
    # One of each kind.
    assert len(report["notes"]) == len(set(report["notes"])) <= 2
    # Nothing that is half written stays, and none is taken for whole.
    assert not [path for path in (folders / "user").rglob("*") if path.is_file()]
    assert all(plan["image"] is None for plan in report["plans"])


def test_a_picture_that_cannot_be_shown_is_none(model, tuned, finished, monkeypatch, folders):
    def full(source, target):
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    shutil.rmtree(folders / "temp" / "slipstream")
    monkeypatch.setattr(tune.shutil, "copyfile", full)
    report = report_of(tuned(model))
    assert report["best"]
    assert all(plan["image"] is None for plan in report["plans"])
    assert not [path for path in (folders / "temp").rglob("*") if path.is_file()]


def test_half_a_picture_is_never_in_the_place_of_a_whole_one(tmp_path):
    def crashing(part):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    put_in_place = hosted.engine("saved_plans").put_in_place
    put_in_place(tmp_path / "picture", lambda part: part.write_bytes(b"whole"))
    with pytest.raises(KeyboardInterrupt):
        put_in_place(tmp_path / "picture", crashing)
    assert [(path.name, path.read_bytes()) for path in tmp_path.glob("pict*")] == [("picture", b"whole")]


def test_where_the_plans_picture_was_not_kept_it_is_made_once(model, tuned, runs, vae):
    """The search has seen it already, as a later picture of another first seed."""
    tuned(model, seeds=3)
    output = tuned(model, seed=3, seeds=3)
    call = {"steps": STEPS, "cfg": 5.0, "seed": 3, "image": latent(model, SIZE)}
    for image, one in zip(output.result[1], (model, output.result[0]), strict=True):
        with torch.inference_mode():
            expected = vae.decode(sample(one, prompt(model, 10), prompt(model, 11), **call))
        assert torch.equal(image, expected[0].float())
    assert not torch.equal(*output.result[1])
    count = len(runs)
    again = tuned(model, seed=3, seeds=3)
    assert len(runs) == count
    assert torch.equal(again.result[1], output.result[1])
    assert report_of(again)["plans"] == report_of(output)["plans"]


def test_where_the_plans_picture_cannot_be_made_there_is_none(model, tuned, monkeypatch):
    tuned(model, seeds=3)
    real = tune.Tuning.pictures

    def begin(self, run):
        raise RuntimeError("gone wrong")

    def pictures(self, chosen):
        for config in self.configs(chosen):
            monkeypatch.setattr(type(config), "begin", begin)
        return real(self, chosen)

    monkeypatch.setattr(tune.Tuning, "pictures", pictures)
    output = tuned(model, seed=3, seeds=3)
    assert "gone wrong" in output.result[1].message
    assert configs(output)


@pytest.fixture
def command(monkeypatch):
    """What `./slipstream tune --ray` begins with, and its arguments."""
    monkeypatch.syspath_prepend(str(ROOT / "demo"))
    options, ray = importlib.import_module("tune_options"), importlib.import_module("tune_ray")
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    return ray, lambda *argv: parser.parse_args(["--demo", "--ray", "127.0.0.1:1", *argv])


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--floor", "1"], "--floor should be 0.0 to 0.9999, but is 1.0"),
        (["--floor", "nan"], "--floor should be 0.0 to 0.9999, but is nan"),
        (["--seeds", "0"], "--seeds should be 1 to 20, but is 0"),
        (["--minutes", "0"], "--minutes should be 0.1 to 1440.0, but is 0.0"),
        (["--steps", "0"], "--steps should be 1 to 10000, but is 0"),
        (["--save-as", "mine (Slipstream)"], "--save-as: Tune: names that end in (Slipstream)"),
        (["--save-as", "a/b"], "--save-as: Tune: a plan's name has letters"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_on_a_cluster_the_nodes_ranges_and_names_hold_too(argv, told, command):
    ray, parsed = command
    with pytest.raises(RuntimeError, match=f"^{re.escape(told)}"):
        ray.check(parsed(*argv))
    ray.check(parsed("--save-as", "mine.json"))
    assert [ray.name_of(" mine.json ", number) for number in (0, 1)] == ["mine", "mine 2"]
    assert ray.name_of(" ", 1) == ""


def test_on_a_cluster_a_full_disk_costs_no_run_and_is_told(model, command, monkeypatch, vae):
    """And what the search comes to is there before a plan is written."""
    ray, parsed = command
    call = benchmark.SamplerCall(
        *(prompt(model, 10), prompt(model, 11), {"samples": latent(model, SIZE)}),
        *(1, STEPS, 5.0, "euler", "normal", 1.0, "Tune"),
    )
    module = hosted.engine("trying")
    one = module.Prompts(call.positive, call.negative)
    ladder = module.Ladder.of(model, call, "exact and approximate")
    runs = module.Runs(model, vae, call, [one], ladder.configs)

    about = {
        "comparable": module.comparable(model, vae, call),
        "prompts": [one.key],
        "title": "a model",
        "machine": {},
        "dials": ladder.dials,
        "left_out": [],
    }

    def asked(name, method, *arguments):
        if method == "reference":
            return runs.take_reference(*arguments)
        trial, result = runs.run(arguments[0])
        return trial, result if arguments[1] else None

    cluster = SimpleNamespace(abouts={"here": about}, call=asked)
    group = ray.Group(cluster, ["here"], parsed("--floor", "0.3", "--seeds", "1", "--steps", str(STEPS)))
    for place, name in ((safetensors.torch, "save_file"), (Path, "write_text")):
        monkeypatch.setattr(place, name, no_room()(getattr(place, name)))
    with torch.inference_mode():
        group.run()
    report = group.report()
    assert (report["status"], report["reason"]) == ("finished", "")
    assert report["best"]
    assert any("too large" in note for note in report["notes"])
    with pytest.raises(RuntimeError, match="could not be written"):
        group.save("mine")
