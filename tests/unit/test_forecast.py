"""Forecast's mathematics and decisions, on runs whose truth is known: Euler's, over a planted prediction."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from slipstream_pack.nodes.methods import forecast
from slipstream_pack.nodes.methods.forecast import (
    FIRST,
    HELD_PREDICTION,
    LAST,
    MEMORY,
    SAME_LEVEL,
    WAYS,
    Exact,
    Forecast,
    ForecastRun,
    Scores,
)
from slipstream_pack.nodes.methods.method import Evaluation, Model, Run, Steps

ANY = Model("any", None, None, 0, 0)
BY_NAME = {way.name: way for way in WAYS}
every_way = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)


# What a way foretells.


def polynomial(order: int, place: float) -> torch.Tensor:
    """One whose parts all differ, as a latent (1, 1, 2, 2) in float64."""
    signs = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).view(1, 1, 2, 2)
    return sum(
        (signs.roll(power, -1) * place**power for power in range(order + 1)), torch.zeros(1, dtype=torch.float64)
    )


def history_of(order: int, sigmas: Sequence[float], is_of_derivative: bool) -> list[Exact]:
    """Evaluations, newest first: the derivative is a polynomial of sigma, or the prediction one of -log sigma."""
    generator = torch.Generator().manual_seed(3)
    made = []
    for sigma in sigmas:
        x = torch.randn(1, 1, 2, 2, generator=generator, dtype=torch.float64)
        along = polynomial(order, sigma if is_of_derivative else -math.log(sigma))
        made.append(Exact(sigma, x, x - sigma * along if is_of_derivative else along, 0))
    return made


@every_way
@pytest.mark.parametrize("sigma", [1.7, 0.9, 0.2])
def test_every_way_is_exact_on_what_its_order_says(way, sigma):
    """At equal steps and at unequal ones, with the latent that the sampler is at."""
    x = torch.full((1, 1, 2, 2), 0.3, dtype=torch.float64)
    # What is damped is exact on what does not change.
    order = way.order if way.damping == 1 else 0
    along = polynomial(order, sigma if way.is_of_derivative else -math.log(sigma))
    exact = x - sigma * along if way.is_of_derivative else along
    for sigmas in ([2.0, 3.0, 4.0, 5.0], [2.0, 2.3, 7.0, 14.6]):
        history = history_of(order, sigmas, way.is_of_derivative)
        assert torch.allclose(way.foretell(sigma, x, history), exact, rtol=1e-12, atol=1e-12)
        # And on no more than that.
        beyond = history_of(way.order + 1, sigmas, way.is_of_derivative)
        along = polynomial(way.order + 1, sigma if way.is_of_derivative else -math.log(sigma))
        missed = x - sigma * along if way.is_of_derivative else along
        assert not torch.allclose(way.foretell(sigma, x, beyond), missed, rtol=1e-3)


@every_way
def test_the_weights_are_of_one_whole_and_give_back_what_is_known(way):
    sigmas = [2.0, 2.3, 7.0]
    assert sum(way.coefficients(0.8, sigmas)) == pytest.approx(1)
    assert way.coefficients(2.0, sigmas) == pytest.approx([1, *[0] * way.order])
    assert len(way.coefficients(0.8, sigmas)) == way.order + 1


def test_half_linear_is_half_way_between_held_and_linear():
    x, history = torch.zeros(1, 1, 2, 2, dtype=torch.float64), history_of(2, [2.0, 2.3, 7.0], False)
    held, half, linear = (
        BY_NAME[name].foretell(0.8, x, history) for name in ("x0 held", "x0 half linear", "x0 linear")
    )
    assert torch.allclose(half, (held + linear) / 2)
    assert not torch.allclose(held, linear)


@every_way
def test_foretelling_writes_into_nothing_that_is_kept(way):
    x, history = torch.ones(1, 1, 2, 2, dtype=torch.float64), history_of(2, [2.0, 2.3, 7.0], False)
    kept = [tensor for made in history for tensor in (made.x, made.denoised)]
    before = [tensor.clone() for tensor in (x, *kept)]
    value = way.foretell(0.8, x, history)
    value.zero_()
    assert all(torch.equal(*pair) for pair in zip((x, *kept), before, strict=True))


# What each way achieved.


HELD, PARABOLA = BY_NAME["d held"], BY_NAME["d parabola"]


def scored(*measured: tuple[float, float], way=HELD) -> Scores:
    scores = Scores()
    for gap, error in measured:
        scores.add(way, gap, error)
    return scores


def test_a_score_is_the_mean_of_the_last():
    errors = [0.9, *(0.1 * (i + 1) for i in range(MEMORY))]
    error, way = scored(*((0.2, error) for error in errors)).best(0.2, 3)
    assert way is HELD
    assert error == pytest.approx(sum(errors[-MEMORY:]) / MEMORY)


@every_way
def test_an_error_grows_with_the_gap_by_one_order_more_and_shrinks_with_it_as_the_lowest_would(way):
    scores = scored((0.2, 0.01), way=way)
    assert scores.best(0.2, 3)[0] == pytest.approx(0.01)
    assert scores.best(0.4, 3)[0] == pytest.approx(0.01 * 2 ** (way.order + 2))
    assert scores.best(0.1, 3)[0] == pytest.approx(0.005)


def test_the_best_changes_with_the_gap():
    """A parabola that is better nearby is not trusted far out."""
    scores = scored((0.2, 0.01), way=PARABOLA)
    scores.add(HELD, 0.2, 0.02)
    assert scores.best(0.2, 3)[1] is PARABOLA
    assert scores.best(0.8, 3)[1] is HELD


def test_of_equals_the_lowest_order_is_taken():
    scores = scored((0.2, 0.01), way=PARABOLA)
    scores.add(HELD, 0.2, 0.01)
    assert scores.best(0.2, 3)[1] is HELD


def test_a_way_needs_as_many_evaluations_as_its_order_says():
    scores = scored((0.2, 0.01), way=PARABOLA)
    assert [scores.best(0.2, depth) is None for depth in (1, 2, 3)] == [True, True, False]
    assert Scores().best(0.2, 3) is None


def test_the_same_noise_level_is_a_matter_of_its_own():
    scores = scored((0.2, 0.01))
    assert scores.best(0.0, 3) is None
    scores.add(HELD, SAME_LEVEL / 2, 0.5)
    assert scores.best(0.0, 3) == (0.5, HELD)
    assert scores.best(0.2, 3) == (0.01, HELD)
    assert scored((0.0, 0.5)).best(0.2, 3) is None


@pytest.mark.parametrize("error", [math.inf, math.nan])
def test_what_is_not_finite_is_never_good(error):
    scores = scored((0.2, error), (0.2, 0.01))
    assert scores.best(0.2, 3)[0] == math.inf
    scores.add(PARABOLA, 0.2, 0.3)
    assert scores.best(0.2, 3)[1] is PARABOLA


# Settings.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"error_budget": -0.01}, r"Forecast: error_budget must be from 0\.0 to 0\.5, but is -0\.01"),
        ({"error_budget": 0.6}, r"Forecast: error_budget must be from 0\.0 to 0\.5, but is 0\.6"),
        ({"error_budget": math.nan}, "Forecast: error_budget .* is nan"),
        ({"max_skips": 0}, "Forecast: max_skips must be from 1 to 10, but is 0"),
        ({"max_skips": 11}, "Forecast: max_skips must be from 1 to 10, but is 11"),
        ({"start_percent": -0.1}, "Forecast: start_percent must be from 0"),
        ({"end_percent": 1.1}, "Forecast: end_percent must be from 0"),
        ({"start_percent": 0.6, "end_percent": 0.4}, r"Forecast: .*0\.6 is above 0\.4"),
    ],
)
def test_settings_that_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Forecast(**settings)


def test_settings_that_do_nothing():
    assert Forecast(0.0).off() == "error_budget is 0, every evaluation is made"
    assert Forecast(start_percent=0.3, end_percent=0.3).off() == "start_percent equals end_percent"
    assert Forecast().off() is None


def test_models_that_another_cache_is_on_are_refused_and_no_other():
    with pytest.raises(RuntimeError, match=r"^Forecast: this model already has EasyCache on it.*Remove or bypass"):
        Forecast().check(Model("SD15", "SD1", 320, 12, 25, caches=("EasyCache",)))
    Forecast().check(ANY)


# Whole runs.

Predict = Callable[[torch.Tensor, float], torch.Tensor]
"""The prediction for a latent at a noise level."""


@dataclass
class Call:
    """What `methods.method.ConditionsCall` is, over planted predictions, one for each condition."""

    x: torch.Tensor
    sigma: float
    predicts: dict[str, Predict]
    states: tuple[object, ...]
    weights: tuple[float, ...] | None
    evaluation: Evaluation
    is_cached: bool = False

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.predicts)

    def evaluate(self) -> list[torch.Tensor]:
        self.evaluation.is_cached = self.is_cached
        return [predict(self.x, self.sigma) for predict in self.predicts.values()]


def weighed(weights: Sequence[float], predictions: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(
        (weight * one for weight, one in zip(weights, predictions, strict=True)), torch.zeros(1, dtype=torch.float64)
    )


@dataclass
class Euler:
    """A run of Euler's method by a guider that weighs its conditions.

    Attributes:
        predicts: each condition's prediction.
        weights: of each.
        steps: how many.
        knows_weights: whether the guider tells them.
        state: what is in force of all conditions at a noise level.
        asked: which of the conditions are asked for in a step; all by default.
        cached: steps in which a part of the model was reused.
    """

    predicts: dict[str, Predict]
    weights: tuple[float, ...] = (1.0,)
    steps: int = 20
    knows_weights: bool = True
    state: Callable[[float], object] = lambda sigma: None
    asked: Callable[[int], Sequence[str]] | None = None
    cached: Sequence[int] = ()
    is_forecast: list[bool] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)

    @property
    def sigmas(self) -> tuple[float, ...]:
        """Evenly in the logarithm, and 0."""
        return (*(14.6 * (0.05 / 14.6) ** (i / max(1, self.steps - 1)) for i in range(self.steps)), 0.0)

    def begin(self, config: Forecast, adapts_steps: bool = False):
        sigmas = self.sigmas
        percent = lambda at: math.inf if at == 0 else 0.0 if at == 1 else sigmas[round(at * (self.steps - 1))]  # noqa: E731
        return config.begin(Run(ANY, Steps(sigmas), percent, adapts_steps=adapts_steps))

    def evaluate(self, run, x: torch.Tensor, step: int, sigma: float) -> torch.Tensor:
        """The guided prediction."""
        evaluation = Evaluation(step, sigma)
        names = list(self.predicts if self.asked is None else self.asked(step))
        weights = self.weights if len(names) == len(self.weights) else (1.0,)
        predicts = {name: self.predicts[name] for name in names}
        state = (self.state(sigma),) * len(names)
        call = Call(x, sigma, predicts, state, weights if self.knows_weights else None, evaluation, step in self.cached)
        found = call.evaluate() if run is None else run.conditions(evaluation, call)
        self.is_forecast.append(evaluation.is_forecast)
        assert len(found) == len(names)
        return weighed(weights, found)

    def sample(self, run=None, batch: int = 1) -> torch.Tensor:
        """The latent (batch, 1, 8, 8) at the end; of the exact run where there is none of Forecast's."""
        self.is_forecast, self.latents = [], []
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(batch, 1, 8, 8, generator=generator, dtype=torch.float64) * self.sigmas[0]
        for step, (sigma, following) in enumerate(itertools.pairwise(self.sigmas)):
            self.latents.append(x)
            x = self.step(x, self.evaluate(run, x, step, sigma), sigma, following)
        return x

    def step(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        return x + (x - denoised) / sigma * (following - sigma)


@dataclass
class SecondOrder(Euler):
    """The multistep method of second order over predictions (dpmpp_2m), with one step that is much smaller.

    Attributes:
        small: after which step the noise level hardly falls; none if negative.
        part: of the step before it.
    """

    small: int = -1
    part: float = 0.01
    before: tuple[torch.Tensor, float] | None = None

    @property
    def sigmas(self) -> tuple[float, ...]:
        found = list(super().sigmas)
        if self.small >= 0:
            found[self.small + 1] = found[self.small] * (1 - self.part)
        return tuple(found)

    def sample(self, run=None, batch: int = 1) -> torch.Tensor:
        self.before = None
        return super().sample(run, batch)

    def step(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        if not following:
            return denoised
        length, target = math.log(sigma / following), denoised
        if self.before is not None:
            other, last = self.before
            target = denoised + (denoised - other) * length / (2 * last)
        self.before = denoised, length
        return following / sigma * x - math.expm1(-length) * target


@dataclass
class Apart(Euler):
    """Each condition is asked for in a call of its own."""

    def evaluate(self, run, x: torch.Tensor, step: int, sigma: float) -> torch.Tensor:
        evaluation, found = Evaluation(step, sigma), []
        for name in self.predicts if self.asked is None else self.asked(step):
            call = Call(x, sigma, {name: self.predicts[name]}, (None,), (1.0,), evaluation)
            found += call.evaluate() if run is None else run.conditions(evaluation, call)
        self.is_forecast.append(evaluation.is_forecast)
        return weighed(self.weights if len(found) == len(self.weights) else (1.0,), found)


def gaussian(spread: float = 0.5, mean: float = 1.0) -> Predict:
    """The exact denoiser of Gaussian pixels, whose spread grows over them."""
    variances = (torch.linspace(0.3, 1.0, 64, dtype=torch.float64).view(8, 8) * spread) ** 2
    means = mean * torch.linspace(-1, 1, 64, dtype=torch.float64).view(8, 8)
    return lambda x, sigma: means + (x - means) * variances / (variances + sigma**2)


def jumping(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """A prediction that no other one tells anything about."""
    generator = torch.Generator().manual_seed(int(sigma * 1e6))
    return torch.randn(x.shape, generator=generator, dtype=x.dtype)


def rows(is_forecast: Sequence[bool]) -> list[tuple[int, int]]:
    """Where each row of skips begins and ends."""
    edges = [i for i, pair in enumerate(itertools.pairwise([False, *is_forecast, False])) if pair[0] != pair[1]]
    return list(zip(edges[::2], edges[1::2], strict=True))


def off(latent: torch.Tensor, exact: torch.Tensor) -> float:
    """The error of the worst of a batch, relative to it."""
    return float(((latent - exact).flatten(1).norm(dim=1) / exact.flatten(1).norm(dim=1)).amax())


def left_by_rows(euler: Euler, after: int = 0) -> list[float]:
    """What each row of skips of the run that was sampled left in the latent, against exact steps from where it began.

    Args:
        after: so many steps behind it.
    """
    found = []
    for begin, end in rows(euler.is_forecast):
        x = euler.latents[begin]
        for sigma, following in itertools.pairwise(euler.sigmas[begin : end + after + 1]):
            predictions = [predict(x, sigma) for predict in euler.predicts.values()]
            x = euler.step(x, weighed(euler.weights, predictions), sigma, following)
        found.append(off(euler.latents[end + after], x))
    return found


GUIDED = {"positive": gaussian(), "negative": gaussian(0.4, 0.5)}
CFG = (5.0, -4.0)


def runs_of(euler: Euler, config: Forecast, batch: int = 1):
    """The run, the latent at its end, and the exact one."""
    exact = euler.sample(batch=batch)
    run = euler.begin(config)
    return run, euler.sample(run, batch), exact


@pytest.mark.parametrize(
    "euler",
    [Euler({"positive": gaussian()}), Euler({"positive": gaussian()}, steps=40), Euler(GUIDED, CFG, steps=40)],
    ids=["20 steps", "40 steps", "40 guided steps"],
)
@pytest.mark.parametrize("budget", [0.01, 0.02, 0.05])
def test_a_smooth_run_is_foretold_within_the_budget(budget, euler):
    run, latent, exact = runs_of(euler, Forecast(budget))
    assert run.skipped == sum(euler.is_forecast) >= 0.4 * euler.steps
    # What is reckoned with is within it to the last digit; what it stands for, by as much as can be known before.
    assert 0 < run.worst <= budget
    left = left_by_rows(euler)
    assert sum(left) / len(left) <= budget
    assert max(left) <= 2 * budget
    assert off(latent, exact) <= 1.5 * budget
    fewer = Euler(euler.predicts, euler.weights, steps=euler.steps - run.skipped)
    assert off(latent, exact) < off(fewer.sample(), exact) / 2
    state, text = run.verdict()
    assert state == "active"
    assert text.startswith(
        f"skipped {run.skipped} of {euler.steps} evaluations (error about {run.worst:.2g} of a budget of {budget:g}), "
        "forecast by "
    )


@pytest.mark.parametrize("predicts", [{"positive": gaussian()}, GUIDED], ids=["alone", "guided"])
def test_a_larger_budget_skips_no_less(predicts):
    euler = Euler(predicts, CFG if len(predicts) > 1 else (1.0,))
    skipped = [runs_of(euler, Forecast(budget))[0].skipped for budget in (0.001, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)]
    assert skipped == sorted(skipped)
    assert skipped[0] < skipped[-1]


@pytest.mark.parametrize("knows_weights", [True, False])
def test_what_nothing_fits_is_exact_to_the_last_bit(knows_weights):
    euler = Euler({"positive": jumping, "negative": gaussian()}, CFG, knows_weights=knows_weights)
    run, latent, exact = runs_of(euler, Forecast(0.001))
    assert torch.equal(latent, exact)
    assert not any(euler.is_forecast)
    state, text = run.verdict()
    assert state == "inert"
    assert "the least that a skip would leave is about" in text
    assert text.endswith("and error_budget is 0.001. Raise it, or take more steps")


@pytest.mark.parametrize("steps", [1, 2, 5, 6])
def test_of_few_steps_all_are_made_and_it_says_so(steps):
    euler = Euler({"positive": gaussian()}, steps=steps)
    run, latent, exact = runs_of(euler, Forecast(0.5))
    assert torch.equal(latent, exact)
    state, text = run.verdict()
    assert state == "inert"
    assert f"of {steps} evaluations the first 4 and the last 2 are made in any case" in text


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 10])
def test_rows_are_as_long_as_allowed_and_the_first_and_last_evaluations_made(limit):
    """Of a prediction that never changes, all is skipped that may be."""
    euler = Euler({"positive": lambda x, sigma: torch.ones_like(x)}, steps=30)
    run, latent, exact = runs_of(euler, Forecast(0.001, max_skips=limit))
    assert torch.allclose(latent, exact)
    assert not any(euler.is_forecast[:FIRST] + euler.is_forecast[-LAST:])
    between = euler.steps - FIRST - LAST
    full, rest = divmod(between, limit + 1)
    assert [end - begin for begin, end in rows(euler.is_forecast)] == [limit] * full + [rest] * bool(rest)
    assert run.made["after as many skips as are allowed"] == full
    assert run.made["first"] == FIRST
    assert run.made["last"] == LAST


def test_outside_the_range_all_is_made():
    euler = Euler({"positive": lambda x, sigma: torch.ones_like(x)}, steps=21)
    run, _, _ = runs_of(euler, Forecast(0.1, start_percent=0.4, end_percent=0.8))
    assert {i for i, skipped in enumerate(euler.is_forecast) if skipped} <= set(range(8, 17))
    assert run.skipped
    assert run.made["outside the range"] == 8 + 4


def test_a_sampler_that_chooses_its_own_steps_is_left_alone():
    euler = Euler({"positive": gaussian()})
    run = euler.begin(Forecast(0.5), adapts_steps=True)
    assert torch.equal(euler.sample(run), euler.sample())
    assert run.verdict()[0] == "inert"
    assert "chooses its own steps" in run.verdict()[1]


@pytest.mark.parametrize("budget", [0.02, 0.1, 0.5])
def test_what_was_foretold_wrongly_is_taken_back_at_the_next_evaluation(budget):
    """Where the truth is a parabola no way knows it, but the next evaluation tells all that lies between."""
    euler = Euler({"positive": lambda x, sigma: 3 + polynomial(2, -math.log(sigma)).repeat(1, 1, 4, 4)})
    run = euler.begin(Forecast(budget))
    euler.sample(run)
    left, taken_back = left_by_rows(euler), left_by_rows(euler, after=1)
    assert len(left) >= 4
    assert min(left) > 1e-3
    # Where it is not known yet that the sampler adds no noise, nothing is taken back.
    assert sum(error < 1e-12 for error in taken_back) >= len(left) / 2


class Ancestral(Euler):
    """With noise of the sampler's own."""

    def step(self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float) -> torch.Tensor:
        up = min(following, following * math.sqrt(1 - (following / sigma) ** 2))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(self.latents)), dtype=x.dtype)
        return super().step(x, denoised, sigma, math.sqrt(following**2 - up**2)) + up * noise


def test_ways_of_the_derivative_lose_where_the_sampler_adds_noise():
    """Nothing is known of the sampler: they are what it spoils."""
    run, _, _ = runs_of(Ancestral({"positive": gaussian()}), Forecast(0.1))
    of_derivatives = sum(count for name, count in run.ways.items() if BY_NAME[name].is_of_derivative)
    assert run.skipped >= 8
    assert of_derivatives <= run.skipped / 4


def test_of_a_batch_the_worst_decides():
    """One that jumps keeps the others from being foretold, and a batch of smooth ones is foretold as each alone."""
    smooth = gaussian()

    def mixed(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return torch.cat([smooth(x[:-1], sigma), jumping(x[-1:], sigma)])

    assert runs_of(Euler({"positive": smooth}), Forecast(0.05), batch=3)[0].skipped >= 8
    assert not runs_of(Euler({"positive": jumping}), Forecast(0.05))[0].skipped
    assert not runs_of(Euler({"positive": mixed}), Forecast(0.05), batch=3)[0].skipped


def test_with_guidance_the_error_is_that_of_the_combination():
    """What both conditions have in common cancels out: the parts can't be foretold, what the sampler gets can. Where
    the guider's arithmetic is not known, the worst part decides, and the verdict says so."""
    common = {
        "positive": lambda x, sigma: gaussian()(x, sigma) + 4 * jumping(x, sigma),
        "negative": lambda x, sigma: gaussian()(x, sigma) + 5 * jumping(x, sigma),
    }
    known, latent, exact = runs_of(Euler(common, CFG), Forecast(0.05))
    assert known.skipped >= 8
    assert off(latent, exact) <= 0.05
    assert "worst condition" not in known.verdict()[1]
    unknown, _, _ = runs_of(Euler(common, CFG, knows_weights=False), Forecast(0.05))
    assert not unknown.skipped
    unknown, _, _ = runs_of(Euler(GUIDED, CFG, knows_weights=False), Forecast(0.05))
    assert unknown.skipped
    assert "the error is that of the worst condition" in unknown.verdict()[1]


# What comes in between.


def test_what_is_in_force_of_a_condition_may_change():
    """The prediction jumps with it: no forecast crosses the change."""
    other = gaussian(0.5, -3.0)
    euler = Euler({"positive": lambda x, sigma: (gaussian() if sigma > 1 else other)(x, sigma)}, steps=30)
    euler.state = lambda sigma: sigma > 1
    run, latent, exact = runs_of(euler, Forecast(0.1, max_skips=10))
    first = next(i for i, sigma in enumerate(euler.sigmas) if sigma <= 1)
    assert not any(euler.is_forecast[first : first + 2])
    assert any(euler.is_forecast[first + 2 :])
    assert off(latent, exact) <= 0.1
    assert run.skipped == sum(euler.is_forecast)
    assert sum(run.made.values()) == euler.steps - run.skipped


@dataclass
class Watched(Euler):
    """Keeps what the sampler got beside what the model would have given."""

    got: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def evaluate(self, run, x: torch.Tensor, step: int, sigma: float) -> torch.Tensor:
        (predict,) = self.predicts.values()
        self.got.append((super().evaluate(run, x, step, sigma), predict(x, sigma)))
        return self.got[-1][0]


@pytest.mark.parametrize("step", range(5, 14))
def test_what_was_foretold_of_other_prompts_is_not_taken_back_from_these(step):
    change = Euler({"a": gaussian()}).sigmas[step]
    watched = Watched({"a": gaussian()}, state=lambda sigma: sigma > change * 1.01)
    watched.sample(watched.begin(Forecast(0.2)))
    assert not watched.is_forecast[step]
    got, exact = watched.got[step]
    assert torch.equal(got, exact)


def test_a_condition_that_is_left_out_from_some_step_on_forces_nothing():
    """As CFG Cutoff does: the other one's history and scores go on."""
    euler = Euler(GUIDED, CFG, steps=30)
    euler.asked = lambda step: ("positive", "negative") if step < 15 else ("positive",)
    run, latent, exact = runs_of(euler, Forecast(0.05))
    assert any(euler.is_forecast[15:18])
    assert set(run.made) <= {"first", "last", "by the budget", "after as many skips as are allowed"}
    assert off(latent, exact) <= 0.05


def test_nothing_is_learned_from_what_another_method_shortened():
    """It is no exact evaluation: what the sampler gets of it is what came, and history and scores stay as they are."""
    euler = Euler({"positive": gaussian()}, cached=range(4, 17))
    run, _, _ = runs_of(euler, Forecast(0.05))
    reused = [step for step in euler.cached if not euler.is_forecast[step]]
    assert run.cached == len(reused)
    assert f"nothing was learned from {run.cached} that DeepCache shortened" in run.verdict()[1]
    (known,) = run.known.values()
    assert not {made.number for made in known.history} & set(reused)


def test_nothing_is_kept_of_what_was_handed_out():
    """The sampler may write into what it gets, and into the latent that it handed in."""

    class Rude(Euler):
        def evaluate(self, run, x, step, sigma):
            given = x.clone()
            guided = super().evaluate(run, given, step, sigma).clone()
            given.fill_(math.nan)
            return guided

    polite, rude = (kind({"positive": gaussian()}) for kind in (Euler, Rude))
    expected = runs_of(polite, Forecast(0.05))[1]
    assert torch.equal(runs_of(rude, Forecast(0.05))[1], expected)


class Heun(Euler):
    """Two evaluations a step, the second at the next step's noise level."""

    def sample(self, run=None, batch=1):
        self.is_forecast, self.latents = [], []
        x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        x = x * self.sigmas[0]
        for step, (sigma, following) in enumerate(itertools.pairwise(self.sigmas)):
            d = (x - self.evaluate(run, x, step, sigma)) / sigma
            there = x + d * (following - sigma)
            if following:
                d = (d + (there - self.evaluate(run, there, step + 1, following)) / following) / 2
            x = x + d * (following - sigma)
        return x


def test_of_two_evaluations_a_step_one_is_made():
    euler = Heun({"positive": gaussian()})
    run, latent, exact = runs_of(euler, Forecast(0.05))
    assert run.skipped >= 10
    # The second one belongs to the step that it is at the noise level of.
    assert (True, True) not in zip(euler.is_forecast[1:-1:2], euler.is_forecast[2::2], strict=True)
    assert off(latent, exact) <= 0.05


def test_a_noise_level_that_goes_up_begins_anew():
    """A restart: nothing of before it is foretold from."""

    class Restarting(Euler):
        def sample(self, run=None, batch=1):
            self.is_forecast, x = [], torch.ones(1, 1, 8, 8, dtype=torch.float64)
            for step in (*range(10), *range(4, 19)):
                sigma, following = self.sigmas[step : step + 2]
                x = x + (x - self.evaluate(run, x, step, sigma)) / sigma * (following - sigma)
            return x

    euler = Restarting({"positive": lambda x, sigma: torch.ones_like(x)}, steps=20)
    run = euler.begin(Forecast(0.1))
    euler.sample(run)
    assert any(euler.is_forecast[:10])
    assert euler.is_forecast[10:12] == [False, False]
    assert any(euler.is_forecast[12:])
    assert run.made["for a noise level that went up"] == 1


@pytest.mark.parametrize("small", range(5, 17))
def test_an_error_is_not_taken_back_in_a_step_that_would_have_to_make_far_too_much_of_it(small, monkeypatch):
    """Of a hand-written list of noise levels: the solver draws a line through what it was given there."""
    config = Forecast(0.05)
    _, latent, exact = runs_of(SecondOrder(GUIDED, CFG), config)
    usual = off(latent, exact)
    run, latent, exact = runs_of(SecondOrder(GUIDED, CFG, small=small), config)
    assert run.skipped >= 8
    assert off(latent, exact) <= 1.5 * usual
    monkeypatch.setattr(forecast, "MOST_AMPLIFIED", 0.0)
    _, without, _ = runs_of(SecondOrder(GUIDED, CFG, small=small), config)
    assert off(latent, exact) <= 1.5 * off(without, exact)


def test_scores_that_are_not_finite_let_nothing_be_skipped():
    """A method that had the evaluation made again found that it was not."""
    euler = Euler({"positive": gaussian()})
    run = euler.begin(Forecast(0.05))
    euler.evaluate(run, torch.full((1, 1, 8, 8), math.nan, dtype=torch.float64), 0, euler.sigmas[0])
    for step, sigma in enumerate(euler.sigmas[1:12], 1):
        euler.evaluate(run, torch.full((1, 1, 8, 8), math.nan, dtype=torch.float64), step, sigma)
    assert not any(euler.is_forecast)


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_an_endless_error_is_none_whatever_the_step(share):
    assert ForecastRun._left_by((math.inf, HELD_PREDICTION), share) == math.inf


def test_in_part_is_told_and_counted_once():
    """A second condition that comes back too late for a history."""
    asked = lambda step: ["positive", "negative"] if step < 3 or step > 9 else ["positive"]  # noqa: E731
    euler = Apart(GUIDED, CFG, asked=asked)
    run, _, _ = runs_of(euler, Forecast(0.5, max_skips=2))
    assert run.partly
    assert sum(run.ways.values()) == run.skipped == sum(euler.is_forecast)
    was = "was" if run.partly == 1 else "were"
    assert f"{run.partly} of those skipped {was} made in part, for what could not be foretold" in run.verdict()[1]
