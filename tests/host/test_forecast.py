"""Forecast in the real host: what is evaluated, every sampler and guider, and what must not be foretold."""

from __future__ import annotations

import gc
import itertools
import threading

import comfy.model_sampling
import comfy.patcher_extension
import comfy.samplers
import hosted
import pytest
import torch
from hosted import (
    Counter,
    controlnet,
    hooked_prompt,
    latent,
    prompt,
    regional_prompt,
    run_node,
    sample,
    sample_with,
    scheduled_prompt,
    with_control,
)
from small_models import FAMILIES, transformer, transformer_latent, transformer_prompt
from test_cfg_cutoff import GUIDERS

WIDE = 0.5
"""A budget under which nearly all is skipped that may be."""


def forecast(patcher, budget=WIDE, **values):
    return run_node("SlipstreamForecast", patcher, "1", error_budget=budget, **values)


@pytest.fixture
def runs(monkeypatch):
    """The objects of all runs, in their order."""
    found, kind = [], hosted.method("forecast").Forecast
    begin = kind.begin
    monkeypatch.setattr(kind, "begin", lambda self, run: found.append(begin(self, run)) or found[-1])
    return found


def test_what_is_skipped_calls_neither_the_model_nor_a_controlnet(model, runs, last_lines):
    control = controlnet(model)
    controlled = []
    get_control = control.get_control
    control.get_control = lambda *args, **kwargs: controlled.append(1) or get_control(*args, **kwargs)
    control.copy = lambda: control
    positive = with_control(prompt(model, 10), control)
    with Counter(model) as counted:
        sample(forecast(model), positive, steps=12)
    (run,) = runs
    assert run.skipped >= 4
    # Two calls an evaluation where only one prompt has the ControlNet, one where both fit a batch.
    assert counted.unet_calls == len(controlled) * (counted.unet_calls // len(controlled))
    assert len(controlled) == 12 - run.skipped
    ((state, text),) = last_lines("1")
    assert state == "active"
    assert text.startswith(f"skipped {run.skipped} of 12 evaluations (error about ")
    assert " of a budget of 0.5), forecast by " in text
    assert "made: " in text
    assert text.endswith("; little memory")


@pytest.mark.parametrize("steps", [1, 2, 3, 6])
def test_runs_of_few_steps_are_exact_and_say_so(steps, model, last_lines):
    assert torch.equal(sample(forecast(model), steps=steps), sample(model, steps=steps))
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert "the first 4 and the last 2 are made in any case" in text


def test_a_budget_that_nothing_fits_gives_the_exact_bits(model, last_lines):
    assert torch.equal(sample(forecast(model, 1e-9), steps=8), sample(model, steps=8))
    ((state, text),) = last_lines("1")
    assert state == "inert"
    assert "the least that a skip would leave is about" in text


@pytest.mark.parametrize("limit", [1, 2, 4])
def test_no_more_in_a_row_than_allowed(limit, model, runs):
    rows = []
    kind = hosted.method("forecast").ForecastRun
    original = kind.conditions

    def conditions(self, evaluation, call):
        found = original(self, evaluation, call)
        rows.append(evaluation.is_forecast)
        return found

    kind.conditions = conditions
    try:
        sample(forecast(model, max_skips=limit), steps=16)
    finally:
        kind.conditions = original
    longest = max(map(len, "".join("x" if skipped else " " for skipped in rows).split()))
    assert longest <= limit
    assert rows[:3] == [False] * 3
    assert rows[-2:] == [False] * 2


def test_the_range_is_in_timesteps(model, runs):
    sample(forecast(model, start_percent=0.4, end_percent=0.8), steps=20)
    (run,) = runs
    assert run.made["outside the range"] >= 8
    assert run.skipped


KINDS = {
    "EPS": "all",
    "V_PREDICTION": "all",
    "EDM": "all",
    "X0": "all",
    "COSMOS_RFLOW": "all",
    "CONST": "what noise leaves",
}


@pytest.mark.parametrize(("kind", "holds"), KINDS.items())
def test_what_a_latent_holds_of_the_picture_is_asked_of_the_model(kind, holds):
    """Of every kind of prediction of the host's that samples from noise."""
    signal = hosted.engine("run.sampling").signal_of(getattr(comfy.model_sampling, kind)(), [0.25])
    for sigma in (0.0, 0.25, 1.0):
        assert signal(sigma) == (1.0 if holds == "all" else 1.0 - sigma)


TWO_STAGES = ("heun", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "seeds_2", "heunpp2")


@pytest.mark.parametrize("sampler", comfy.samplers.KSampler.SAMPLERS)
def test_every_sampler(sampler, model, runs, last_lines):
    seen = []
    kind = hosted.method("forecast").ForecastRun
    original = kind._begin

    def begin(self, evaluation):
        original(self, evaluation)
        seen.append((evaluation.step, evaluation))

    kind._begin = begin
    try:
        image = sample(forecast(model), steps=12, sampler=sampler)
    finally:
        kind._begin = original
    assert image.isfinite().all()
    (run,) = runs
    skipped = [step for step, evaluation in seen if evaluation.is_forecast]
    if sampler == "dpm_adaptive":
        assert not skipped
        assert "chooses its own steps" in last_lines("1")[0][1]
        return
    assert skipped
    # Never both evaluations of a step.
    for step in set(skipped):
        of_it = [evaluation.is_forecast for at, evaluation in seen if at == step]
        assert len(of_it) == 1 or not all(of_it)
    if sampler in TWO_STAGES:
        assert run.is_multistage


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_of_transformers(name, runs):
    model = transformer(name)
    assert forecast(model, 0.0) is model
    prompts = [transformer_prompt(name, seed) for seed in (1, 2)]
    given = {"image": transformer_latent(name), "steps": 10, "scheduler": "simple", "cfg": 3.0}
    calls = []
    hook = model.model.diffusion_model.register_forward_hook(lambda *_: calls.append(1))
    try:
        exact, made = sample(model, *prompts, **given), len(calls)
        calls.clear()
        image = sample(forecast(model), *prompts, **given)
    finally:
        hook.remove()
    (run,) = runs
    assert run.skipped >= 2
    assert len(calls) * 10 == made * (10 - run.skipped)
    assert image.isfinite().all()
    assert not torch.equal(image, exact)
    assert torch.equal(sample(model, *prompts, **given), exact)


# What each caller asks for.


@pytest.mark.parametrize("name", list(GUIDERS))
def test_guiders_whose_arithmetic_is_their_own(name, model, runs, last_lines):
    out = sample_with(GUIDERS[name](forecast(model)), steps=12)
    assert out.isfinite().all()
    (run,) = runs
    assert run.skipped
    assert "the worst condition" in last_lines("1")[0][1]


def test_two_models_have_a_history_each(model, runs):
    from comfy_extras import nodes_custom_sampler

    if not hasattr(nodes_custom_sampler, "Guider_DualModel"):
        pytest.skip("this host has no DualModelGuider")
    other = hosted.model("SD15", seed=9)
    guider = nodes_custom_sampler.Guider_DualModel(forecast(model), other)
    guider.set_conds(prompt(model, 10), prompt(model, 11))
    guider.set_cfg(5.0)
    with Counter(other) as negative, Counter(model) as positive:
        sample_with(guider, steps=12)
    (run,) = runs
    assert run.skipped
    assert positive.unet_calls == negative.unet_calls == 12 - run.skipped
    assert len(run.known) == 2


def controlled_for_a_while(model):
    control = controlnet(model)
    control.set_cond_hint(torch.rand(1, 3, 128, 128), 1.0, (0.0, 0.5))
    return [[tensor, {**values, "control": control}] for tensor, values in prompt(model, 10)]


def hooked(model):
    return hooked_prompt(model, {0.0: 0.2, 0.5: 1.0})


CHANGES = {"prompts": scheduled_prompt, "a ControlNet": controlled_for_a_while, "hooks": hooked}


@pytest.mark.parametrize("kind", list(CHANGES))
def test_what_changes_in_the_run_is_evaluated_anew(kind, model, runs):
    """Past the change no forecast is of what was before it."""
    sample(forecast(model, max_skips=10), CHANGES[kind](model), steps=24)
    (run,) = runs
    assert run.skipped
    assert run.made["for a changed prompt"] >= 1


@pytest.mark.parametrize("batch", [1, 3])
def test_regions_and_batches(batch, model, runs):
    out = sample(forecast(model), regional_prompt(model), steps=12, image=latent(model, batch=batch))
    assert out.isfinite().all()
    assert runs[0].skipped
    assert "for a changed prompt" not in runs[0].made


def test_of_a_batch_the_worst_decides(model, runs):
    """A picture that could not be foretold alone is not in a batch either."""
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    shares = []
    for some in (noise[:1], noise[1:], noise):
        runs.clear()
        sample(forecast(model, 0.05), steps=16, image=torch.zeros_like(some), noise=some)
        shares.append(runs[0].skipped)
    assert shares[2] <= max(shares[:2])


@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_context_windows_have_a_history_each(schedule, runs):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    model = transformer("Wan 2.1")
    prompts = [transformer_prompt("Wan 2.1", seed) for seed in (1, 2)]
    windowed = ContextWindowsManualNode.execute(model, 4, 2, schedule, 1, False, "pyramid", 2, False).result[0]
    image = torch.zeros(1, 16, 8, *transformer_latent("Wan 2.1").shape[-2:])
    out = sample(forecast(windowed), *prompts, steps=12, scheduler="simple", cfg=3.0, image=image)
    assert out.isfinite().all()
    (run,) = runs
    windows = {window for ((_, _, window, _), _), _ in run.known}
    assert len(windows) > 1
    assert windowed.model_options["context_handler"].callbacks == {}
    if schedule == "standard_static":
        assert run.skipped
        assert "for a changed prompt" not in run.made


class Watching:
    """Another pack's, which is told of windows and can't be copied."""

    def __init__(self):
        self.calls = 0
        self.lock = threading.Lock()

    def begins(self, *args):
        self.calls += 1


@pytest.mark.parametrize("node", ["SlipstreamForecast", "SlipstreamCFGCutoff"])
def test_what_others_have_windows_call_is_called_as_it_is(node):
    from comfy_extras.nodes_context_windows import ContextWindowsManualNode

    watching, model = Watching(), transformer("Wan 2.1")
    windowed = ContextWindowsManualNode.execute(model, 4, 2, "standard_static", 1, False, "pyramid", 2, False).result[0]
    callbacks = windowed.model_options["context_handler"].callbacks
    comfy.patcher_extension.add_callback_with_key("evaluate_context_windows", "another", watching.begins, callbacks)
    values = {"error_budget": WIDE} if node == "SlipstreamForecast" else {"cutoff": 1.0, "reuse_every": 2}
    prompts = [transformer_prompt("Wan 2.1", seed) for seed in (1, 2)]
    image = torch.zeros(1, 16, 8, *transformer_latent("Wan 2.1").shape[-2:])
    calls = []
    for patcher in (windowed, run_node(node, windowed, "1", **values)):
        watching.calls = 0
        sample(patcher, *prompts, steps=6, scheduler="simple", cfg=3.0, image=image)
        calls.append(watching.calls)
    assert calls[0] == calls[1] > 0
    assert callbacks == {"callbacks": {"evaluate_context_windows": {"another": [watching.begins]}}}


def test_what_cfg_cutoff_leaves_out_forces_nothing(model, runs, last_lines):
    both = run_node("SlipstreamCFGCutoff", forecast(model), "2", cutoff=0.5)
    with Counter(model) as counted:
        sample(both, steps=16)
    (run,) = runs
    assert "for a changed prompt" not in run.made
    assert len(counted.rows) == 16 - run.skipped
    guided, alone = counted.rows.count(2), counted.rows.count(1)
    ((_, text),) = last_lines("2")
    # Each thing is counted once: what was skipped saved its predictions there, not here.
    assert f"{alone} of {guided + alone} evaluations ran on the positive alone" in text
    assert f"{2 * guided + alone} of {2 * (guided + alone)} predictions evaluated" in text
    assert f"{8 - alone} more were skipped by Forecast" in text


@pytest.mark.parametrize("name", ["SAG", "PAG"])
def test_nodes_that_evaluate_more_themselves(name, model, runs):
    if name == "SAG":
        from comfy_extras.nodes_sag import SelfAttentionGuidance

        patched = SelfAttentionGuidance.execute(model, 0.5, 2.0).result[0]
    else:
        from comfy_extras.nodes_pag import PerturbedAttentionGuidance

        patched = PerturbedAttentionGuidance.execute(model, 3.0).result[0]
    with Counter(model) as counted:
        out = sample(forecast(patched), steps=12)
    assert out.isfinite().all()
    (run,) = runs
    assert run.skipped
    # One way for each, whatever the node adds to it.
    assert sum(run.ways.values()) == run.skipped
    # Neither the evaluation nor what the node adds to it.
    assert counted.rows.count(2) == 12 - run.skipped
    assert counted.rows.count(1) <= 12 - run.skipped


@pytest.mark.parametrize("name", ["EasyCacheNode", "LazyCacheNode"])
def test_another_step_cache_is_refused(name, model):
    import comfy_extras.nodes_easycache as core

    cached = getattr(core, name).execute(model, 0.2, 0.15, 0.95, False).result[0]
    with pytest.raises(RuntimeError, match=r"^Forecast: this model already has .*Remove or bypass one"):
        forecast(cached)
    later = getattr(core, name).execute(forecast(model), 0.2, 0.15, 0.95, False).result[0]
    with pytest.raises(RuntimeError, match="two caches"):
        sample(later)


def test_with_deepcache_nothing_is_learned_from_what_it_shortened(model, runs, last_lines):
    both = run_node("SlipstreamDeepCache", forecast(model), "2", cache_interval=2)
    sample(both, steps=16)
    (run,) = runs
    assert run.skipped
    assert run.cached
    assert f"nothing was learned from {run.cached} that DeepCache shortened" in last_lines("1")[0][1]


def test_a_noise_level_that_goes_up_begins_anew(model, runs):
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", 8)

    def restarting(denoiser, x, sigmas, extra_args=None, callback=None, disable=None):
        for step in (0, 1, 2, 3, 4, 5, 1, 2, 3, 4, 5):
            x = x * 0.9 + 0.1 * denoiser(x, sigmas[step] * x.new_ones([x.shape[0]]), **extra_args)
        return x

    hosted.sample_by_hand(forecast(model), restarting, sigmas)
    (run,) = runs
    assert run.made["for a noise level that went up"] == 1
    assert run.made["to learn"] >= 1


def test_nothing_is_written_into_what_came_in_and_nothing_is_kept(model, runs):
    patched, given = hosted.scribbling(model, 2)
    sample(forecast(patched), steps=12)
    first = runs[0].skipped
    assert first
    runs.clear()
    gc.collect()
    assert not any(one() is not None for one in given)


def test_a_run_begins_with_nothing_of_the_one_before(model, runs):
    patched = forecast(model)
    images = [sample(patched, steps=12, seed=seed) for seed in (1, 2, 1)]
    assert torch.equal(images[0], images[2])
    assert runs[0].skipped == runs[2].skipped


def test_a_skip_reads_nothing_from_the_device_and_an_evaluation_once(model, runs, monkeypatch):
    """Beside the noise level that the engine reads. What waits for a device is a number taken out of a tensor."""
    kind = hosted.method("forecast").ForecastRun
    reads, seen = [], []
    original = kind.conditions

    def conditions(self, evaluation, call):
        before = len(reads)
        evaluate = call.evaluate

        def evaluated():
            kept = len(reads)
            found = evaluate()
            del reads[kept:]
            return found

        call.evaluate = evaluated
        found = original(self, evaluation, call)
        seen.append((evaluation.is_forecast, len(reads) - before))
        return found

    monkeypatch.setattr(kind, "conditions", conditions)
    for name in ("tolist", "item", "__float__", "__bool__", "__int__", "cpu", "numpy"):
        read = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *args, read=read, **kwargs: reads.append(1) or read(self, *args, **kwargs)
        )
    sample(forecast(model), steps=14)
    assert reads
    assert any(is_skipped for is_skipped, _ in seen)
    # Scores of an evaluation are read when the next one begins: there, once, whether that is skipped or not.
    assert all(count <= 1 for _, count in seen)
    after_a_skip = [now for (was_skipped, _), (_, now) in itertools.pairwise(seen) if was_skipped]
    assert set(after_a_skip) == {0}
