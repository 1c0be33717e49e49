"""CFG Cutoff's beginning, reuse and measured end in the real host: all that holds of its cutoff holds of them."""

from __future__ import annotations

import gc
import itertools

import comfy.model_management
import comfy.samplers
import hosted
import pytest
import torch
from hosted import (
    METHODS,
    Counter,
    PlantedError,
    hooked_prompt,
    latent,
    prompt,
    regional_prompt,
    run_node,
    sample,
    sample_with,
    scheduled_prompt,
)
from small_models import FAMILIES, transformer, transformer_latent, transformer_prompt
from test_cfg_cutoff import GUIDERS
from test_guidance_nodes import GOES_ON, NEEDS_THE_NEGATIVE, ON_TRANSFORMERS

MODEL = "tiniest"
STEPS = 10
DIALS = {
    "start": {"cutoff": 1.0, "start": 0.3},
    "interval": {"cutoff": 0.7, "start": 0.2},
    "timesteps": {"cutoff": 0.7, "start": 0.2, "unit": "timesteps"},
    "reuse": {"cutoff": 1.0, "reuse_every": 3},
    "adaptive": {"cutoff": 0.9, "adaptive": 0.9},
    "all": {"cutoff": 0.9, "start": 0.1, "reuse_every": 2, "adaptive": 0.001},
}
every_dial = pytest.mark.parametrize("dial", DIALS)
measured_dial = pytest.mark.parametrize("dial", ["reuse", pytest.param("all", marks=pytest.mark.long)])
OF_EACH_KIND = ("euler", "heun", "dpm_2", "dpmpp_2m", "euler_cfg_pp", "dpm_adaptive", "uni_pc", "dpmpp_2s_ancestral")
SAMPLERS = [
    name if name in OF_EACH_KIND else pytest.param(name, marks=pytest.mark.long)
    for name in comfy.samplers.KSampler.SAMPLERS
]


@pytest.fixture(autouse=True)
def generous(monkeypatch):
    """Of random weights no prediction goes on smoothly: what reuse leaves is no matter here."""
    monkeypatch.setattr(hosted.method("cfg_cutoff"), "MOST", 1e9)


@pytest.fixture
def runs(monkeypatch):
    """The objects of all runs, in their order."""
    found, kind = [], hosted.method("cfg_cutoff").CFGCutoff
    begin = kind.begin
    monkeypatch.setattr(kind, "begin", lambda self, run: found.append(begin(self, run)) or found[-1])
    return found


def dialled(patcher, dial, node="2", **values):
    return run_node("SlipstreamCFGCutoff", patcher, node, **{**DIALS[dial], **values})


def told(lines):
    ((state, text),) = lines
    return state, text


def test_the_settings_of_before_install_what_they_did(model, runs):
    """No wrapper around the conditions: the run of before, and its bits."""
    seen = []

    def look(executor, *args):
        seen.append(set(executor.class_obj.model_options["transformer_options"]["wrappers"]))
        return executor(*args)

    patched = model.clone()
    patched.add_wrapper("predict_noise", look)
    sample(run_node("SlipstreamCFGCutoff", patched, cutoff=0.5), steps=4)
    sample(dialled(patched, "start"), steps=4)
    assert not any("slipstream" in kinds or "calc_cond_batch" in kinds for kinds in seen)
    assert {type(run).__name__ for run in runs} == {"CFGCutoffRun"}


@pytest.mark.parametrize("family", ["SD15", "DiT"])
def test_a_beginning_is_the_hosts_own_run_without_guidance_up_to_there(family):
    patcher = hosted.model(family)
    found: dict[str, list[torch.Tensor]] = {"unguided": [], "guided": [], "dialled": []}
    for name, model, cfg in (
        ("unguided", patcher, 1.0), ("guided", patcher, 5.0), ("dialled", dialled(patcher, "interval"), 5.0)
    ):  # fmt: skip
        sample(model, steps=STEPS, cfg=cfg, callback=lambda _, denoised, *__, name=name: found[name].append(denoised))
    for step in range(2):
        assert torch.equal(found["dialled"][step], found["unguided"][step])
        assert not torch.equal(found["dialled"][step], found["guided"][step])
    assert not torch.equal(found["dialled"][2], found["unguided"][2])


@every_dial
@pytest.mark.parametrize("name", ["CFG", *GUIDERS, "two models"])
def test_every_guider(name, dial, model, runs, last_lines):
    conditions = 3 if name in GUIDERS else 2
    changed, rows = dialled(model, dial), []
    if name == "CFG":
        with Counter(model) as counted:
            out = sample(changed, steps=STEPS)
        rows = counted.rows
    elif name == "two models":
        nodes = pytest.importorskip("comfy_extras.nodes_custom_sampler")
        if not hasattr(nodes, "Guider_DualModel"):
            pytest.skip("this host has no DualModelGuider")
        other = hosted.model(MODEL, seed=9)
        guider = nodes.Guider_DualModel(changed, other)
        guider.set_conds(prompt(model, 10), prompt(model, 11))
        guider.set_cfg(5.0)
        with Counter(model) as counted, Counter(other) as negative:
            out = sample_with(guider, steps=STEPS)
        rows = counted.rows + negative.rows
    else:
        with Counter(model) as counted:
            out = sample_with(GUIDERS[name](changed), steps=STEPS)
        rows = counted.rows
    assert out.isfinite().all()
    (run,) = runs
    state, text = told(last_lines("2"))
    assert state == "active"
    assert f"{sum(rows)} of {conditions * STEPS} predictions evaluated" in text
    reused = getattr(run, "reused", 0)
    assert sum(rows) == conditions * STEPS - (conditions - 1) * (run.alone + reused)
    assert bool(run.alone) == (dial != "reuse")
    if dial == "reuse":
        # Each third from the last of the first three on.
        assert reused == 5


@measured_dial
@pytest.mark.parametrize("name", sorted({*NEEDS_THE_NEGATIVE, *GOES_ON}))
def test_every_node_of_guidance(name, dial, model, runs, last_lines):
    put = {**NEEDS_THE_NEGATIVE, **GOES_ON}[name]
    patcher = hosted.model("DiT") if name.split()[0] in ON_TRANSFORMERS else model
    out = sample(dialled(put(patcher), dial), steps=STEPS, image=latent(patcher, 8))
    assert out.isfinite().all()
    state, text = told(last_lines("2"))
    inside = name in ("SelfAttentionGuidance", "NAGuidance")
    if "reuse_every" in DIALS[dial]:
        (run,) = runs
        assert bool(run.reused) == (not inside)
        if inside:
            assert f"no guidance was reused, since {name} needs the negative evaluated each time" in text
    assert state == "active" or (dial == "reuse" and inside)


@pytest.mark.parametrize("name", ["APG", "RescaleCFG", "CFGZeroStar", "TCFG"])
def test_a_guidance_of_its_own_works_on_what_was_foretold(name, model):
    """It is given two predictions each time, of which the positive's is fresh."""
    patched, seen = NEEDS_THE_NEGATIVE[name](model), []

    def look(executor, inner, conds, x, timestep, options):
        found = executor(inner, conds, x, timestep, options)
        (positive, _) = comfy.samplers.calc_cond_batch(model.model, [conds[0], None], x, timestep, {})
        seen.append((len(found), torch.allclose(found[0], positive, rtol=1e-4, atol=1e-4)))
        return found

    changed = dialled(patched, "reuse")
    changed.add_wrapper("calc_cond_batch", look)
    sample(changed, steps=STEPS, image=latent(model, 8))
    assert seen == [(2, True)] * STEPS


@measured_dial
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(sampler, dial, model, runs, last_lines):
    out = sample(dialled(model, dial), steps=STEPS, sampler=sampler, image=latent(model, 8))
    assert out.isfinite().all()
    (run,) = runs
    state, text = told(last_lines("2"))
    if sampler == "dpm_adaptive" and "reuse_every" in DIALS[dial]:
        assert run.reused == 0
        assert "this sampler chooses its own steps" in text
    elif dial == "reuse":
        assert (state, run.reused >= 4) == ("active", True)


PROMPTS = {
    "regions": regional_prompt,
    "a schedule": scheduled_prompt,
    "hooks": lambda model: hooked_prompt(model, {0.0: 0.2, 0.5: 1.0}),
    "several": lambda model: prompt(model, 20) + prompt(model, 21),
}


@measured_dial
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", PROMPTS)
def test_prompts_and_batches(kind, batch, dial, model, runs, last_lines):
    model.model.memory_required = lambda *a, **k: 0.0
    try:
        with Counter(model) as stock:
            sample(model, PROMPTS[kind](model), steps=STEPS, image=latent(model, batch=batch))
        with Counter(model) as counted:
            out = sample(dialled(model, dial), PROMPTS[kind](model), steps=STEPS, image=latent(model, batch=batch))
    finally:
        del model.model.memory_required
    assert out.isfinite().all()
    assert sum(counted.rows) < sum(stock.rows)
    state, text = told(last_lines("2"))
    assert state == "active"
    if kind != "regions":  # whose areas have sizes of their own
        evaluated, whole = sum(counted.rows) // batch, sum(stock.rows) // batch
        # What a schedule changes is evaluated in full where it does.
        assert f"{evaluated} of {whole} predictions evaluated" in text


def test_a_prompt_that_changes_is_evaluated_in_full_where_it_does(model):
    with Counter(model) as counted:
        sample(dialled(model, "reuse", reuse_every=5), scheduled_prompt(model), steps=STEPS)
    halfway = model.get_model_object("model_sampling").percent_to_sigma(0.5)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    changes = next(step for step, sigma in enumerate(sigmas.tolist()) if sigma <= halfway)
    assert counted.rows[changes] == 2


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_context_windows_have_a_difference_each(schedule, runs):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = transformer("Wan 2.1")
    prompts = [transformer_prompt("Wan 2.1", seed) for seed in (1, 2)]
    windowed = ContextWindowsManualNode.execute(model, 4, 2, schedule, 1, False, "pyramid", 2, False).result[0]
    image = torch.zeros(1, 16, 8, *transformer_latent("Wan 2.1").shape[-2:])
    out = sample(dialled(windowed, "reuse", adaptive=1e-6), *prompts, steps=8, scheduler="simple", cfg=3.0, image=image)
    assert out.isfinite().all()
    (run,) = runs
    if schedule == "standard_static":
        assert run.reused == 4


@pytest.mark.parametrize(
    "name",
    [name if name in ("Flux", "Wan 2.1") else pytest.param(name, marks=pytest.mark.long) for name in sorted(FAMILIES)],
)
def test_families_of_transformers(name, runs):
    model = transformer(name)
    prompts = [transformer_prompt(name, seed) for seed in (1, 2)]
    given = {"image": transformer_latent(name), "steps": 6, "scheduler": "simple", "cfg": 3.0}
    out = sample(dialled(model, "reuse"), *prompts, **given)
    assert out.isfinite().all()
    assert runs[0].reused == 2


# With the others, in any order, however it ends.


@measured_dial
@pytest.mark.parametrize("name", [name for name in METHODS if name != "SlipstreamCFGCutoff"])
def test_every_order_with_every_other_node(name, dial, model):
    from test_engine import ON

    images = []
    for first in (True, False):
        patcher = dialled(model, dial) if first else model
        patcher = run_node(name, patcher, "3", **ON[name])
        images.append(sample(patcher if first else dialled(patcher, dial), steps=STEPS, image=latent(model, 8)))
    assert torch.equal(*images)
    assert images[0].isfinite().all()


def interrupt():
    raise comfy.model_management.InterruptProcessingException


def fail():
    raise PlantedError("a planted error")


@pytest.mark.parametrize(
    "dial", [name if name == "all" else pytest.param(name, marks=pytest.mark.long) for name in DIALS]
)
@pytest.mark.parametrize("end", [interrupt, fail])
@pytest.mark.parametrize("at", [0, 4, 8])
def test_nothing_is_left_behind_however_the_run_ends(at, end, dial, model, last_lines):
    untouched, changed = sample(model, steps=STEPS), dialled(model, dial)
    expected, options = sample(changed, steps=STEPS), repr(changed.model_options)
    calls = itertools.count()
    handle = model.model.diffusion_model.middle_block[0].register_forward_hook(
        lambda *_: end() if next(calls) == at else None
    )
    try:
        with pytest.raises((PlantedError, comfy.model_management.InterruptProcessingException)):
            sample(changed, steps=STEPS)
    finally:
        handle.remove()
    assert told(last_lines("2"))[0] in ("failed", "interrupted")
    assert repr(changed.model_options) == options
    assert torch.equal(sample(changed, steps=STEPS), expected)
    assert torch.equal(sample(model, steps=STEPS), untouched)


def test_nothing_is_written_into_what_came_in_and_nothing_is_kept(model):
    patched, given = hosted.scribbling(model, 1.5)
    images = [sample(dialled(patched, "reuse"), steps=STEPS) for _ in range(2)]
    assert torch.equal(*images)
    gc.collect()
    assert not any(one() is not None for one in given)


def test_what_it_measures_is_read_from_the_device_once_an_evaluation(model, monkeypatch):
    kind, reads = hosted.method("cfg_cutoff").MeasuredRun, []
    original = kind.predict_noise

    def predict_noise(self, evaluation, guidance):
        counts = []
        guided = guidance.guided

        def evaluated():
            counts.append(len(reads))
            found = guided()
            counts.append(len(reads))
            return found

        object.__setattr__(guidance, "guided", evaluated)
        before = len(reads)
        found = original(self, evaluation, guidance)
        seen.append((counts[0] - before, len(reads) - counts[1]))
        return found

    seen = []
    monkeypatch.setattr(kind, "predict_noise", predict_noise)
    read = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or read(self))
    sample(dialled(model, "reuse", adaptive=1e-9), steps=STEPS)
    assert seen[0] == (0, 0)
    assert {after for _, after in seen} == {0}
    # After a full evaluation once, after one with reused guidance not at all.
    assert [before for before, _ in seen] == [0, 1, 1, 1, 0, 0, 1, 0, 0, 1]


# With Forecast.


@pytest.mark.parametrize("sampler", ["euler", "dpmpp_2m", "heun", "euler_ancestral"])
@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_errors_of_both_stay_within_forecasts_budget_and_each_thing_is_counted_once(budget, sampler, model, last_lines):
    evaluations, kind = [], hosted.method("forecast").ForecastRun
    original, errors = kind._begin, []

    def begin(self, evaluation):
        original(self, evaluation)
        evaluations.append(evaluation)
        errors.append(self.error)

    kind._begin = begin
    both = dialled(run_node("SlipstreamForecast", model, "1", error_budget=budget), "reuse")
    try:
        with Counter(model) as counted:
            out = sample(both, steps=20, sampler=sampler)
    finally:
        kind._begin = original
    assert out.isfinite().all()
    assert max(errors) <= budget
    skipped = sum(evaluation.is_forecast for evaluation in evaluations)
    reused = sum(evaluation.is_reused for evaluation in evaluations)
    made = len(evaluations) - skipped
    assert not any(evaluation.is_forecast and evaluation.is_reused for evaluation in evaluations)
    assert sum(counted.rows) == 2 * made - reused
    if skipped:
        assert f"skipped {skipped} of {len(evaluations)} evaluations" in last_lines("1")[0][1]
    if reused:
        assert f"{reused} of {made} evaluations reused the guidance" in last_lines("2")[0][1]
        assert f"{sum(counted.rows)} of {2 * made} predictions evaluated" in last_lines("2")[0][1]
    if budget == 0.5:
        assert skipped
        assert reused


@pytest.mark.parametrize("dial", [{"adaptive": 0.001}, {"reuse_every": 3}], ids=str)
@pytest.mark.parametrize("cfg", [1.0, 1.2])
@pytest.mark.parametrize("sampler", ["euler_cfg_pp", "dpmpp_2m_cfg_pp"])
def test_a_sampler_that_steps_along_the_negative_is_guided_at_any_scale(sampler, cfg, dial, model):
    """cfg++: at a scale of 1 the negative has no part in the prediction, and much in the step."""
    settings = {"steps": STEPS, "sampler": sampler, "cfg": cfg}
    exact = sample(model, **settings)
    unguided = hosted.relative_error(sample(run_node("SlipstreamCFGCutoff", model, "2", cutoff=0.0), **settings), exact)
    found = sample(run_node("SlipstreamCFGCutoff", model, "2", cutoff=1.0, **dial), **settings)
    assert hosted.relative_error(found, exact) < unguided / 4


def test_windows_with_prompts_of_their_own_are_told_apart(runs, last_lines):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = transformer("Wan 2.1")
    positive, negative, other = (transformer_prompt("Wan 2.1", seed) for seed in (1, 2, 5))
    given = ("standard_static", 1, False, "pyramid", 2, False, "", True)
    windowed = ContextWindowsManualNode.execute(model, 4, 2, *given).result[0]
    image = torch.zeros(1, 16, 8, *transformer_latent("Wan 2.1").shape[-2:])
    sample(
        dialled(windowed, "reuse"), positive + other, negative, steps=8, scheduler="simple", cfg=3.0, image=image
    )  # fmt: skip
    assert runs[0].reused
    assert "reused the guidance of those before" in told(last_lines("2"))[1]


def test_where_nothing_was_guided_nothing_is_said_of_reuse(model, last_lines):
    sample(run_node("SlipstreamCFGCutoff", model, "2", cutoff=0.0, reuse_every=3), steps=6)
    assert "reuse" not in told(last_lines("2"))[1]
