"""Forecast: evaluations of the model foretold from those before, within an error that is measured.

What a model predicts changes smoothly over a run. Between two evaluations its prediction can be
extrapolated from the last few, at no cost but a few additions, for any model and any sampler. Which
way is best differs by sampler, model and noise level: every way is scored at each evaluation that is
made, against what the model really gave, and the best one fills those that are skipped. What a skip
leaves in the latent is estimated from these scores and held under a budget. When the next evaluation
shows what a skipped one should have been, its error is taken back by as much as it moved the latent.

Source: an own design. Held and extrapolated derivatives are Adams and Bashforth's (1883); predictions
extrapolated over log noise levels are DPM-Solver++'s (Lu et al., 2022, arXiv:2211.01095).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .method import (
    ConditionsCall,
    Configuration,
    Evaluation,
    MethodRun,
    Model,
    Run,
    State,
    check_number,
    check_range,
)

MAX_BUDGET = 0.5
MAX_SKIPS = 10
KEPT = 3
"""Evaluations that are remembered: a parabola needs as many."""

FIRST = 3
"""The first evaluations, which are made in any case: what is scored needs a history."""

LAST = 2
"""The last steps, which are: detail is made there, and nothing after them would take an error back."""

MEMORY = 2
"""How many scores of each way count."""

SAME_LEVEL = 1e-3
"""Up to which gap in log sigma two evaluations are at one noise level."""


@dataclass(frozen=True)
class Forecast(Configuration):
    """Attributes:
    error_budget: what a row of skipped evaluations may leave in the latent, relative to it, 0.0 to 0.5; 0 is off.
    max_skips: how many evaluations in a row may be skipped, 1 to 10.
    start_percent: fraction of the training timesteps before which nothing is skipped.
    end_percent: fraction after which nothing is skipped.
    """

    error_budget: float = 0.05
    max_skips: int = 3
    start_percent: float = 0.0
    end_percent: float = 1.0

    stem = "forecast"
    title = "Forecast"
    phase = "evaluate"
    is_exact = False

    def __post_init__(self) -> None:
        check_number(self.title, "error_budget", self.error_budget, 0.0, MAX_BUDGET)
        check_number(self.title, "max_skips", self.max_skips, 1, MAX_SKIPS)
        check_range(self.title, self.start_percent, self.end_percent)

    def off(self) -> str | None:
        if self.error_budget == 0:
            return "error_budget is 0, every evaluation is made"
        if self.start_percent == self.end_percent:
            return "start_percent equals end_percent"
        return None

    def check(self, model: Model) -> None:
        if model.caches:
            raise RuntimeError(
                f"{self.title}: this model already has {' and '.join(model.caches)} on it, and two caches would each "
                "skip what the other needs. Remove or bypass one of them."
            )

    def begin(self, run: Run) -> ForecastRun:
        return ForecastRun(self, run)


@dataclass(frozen=True)
class Way:
    """One way to foretell a prediction.

    Attributes:
        name: as the verdict has it.
        order: degree of the polynomial through the last order + 1 evaluations.
        is_of_derivative: whether it is one of the derivative (x - D) / sigma over sigma, as solvers step along it; else
            of the prediction D over -log sigma.
        damping: what its slope is multiplied with.
    """

    name: str
    order: int
    is_of_derivative: bool
    damping: float = 1.0

    def coefficients(self, sigma: float, sigmas: Sequence[float]) -> list[float]:
        """Weights of the last evaluations, newest first, in the value at `sigma`."""
        place = (lambda s: s) if self.is_of_derivative else (lambda s: -math.log(s))
        at, nodes = place(sigma), [place(one) for one in sigmas[: self.order + 1]]
        weights = [
            math.prod((at - other) / (node - other) for j, other in enumerate(nodes) if j != i)
            for i, node in enumerate(nodes)
        ]
        held = [1.0, *[0.0] * self.order]
        return [self.damping * weight + (1 - self.damping) * hold for weight, hold in zip(weights, held, strict=True)]

    def foretell(self, sigma: float, x: Tensor, history: Sequence[Made]) -> Tensor:
        """The prediction for a latent `x` at `sigma`, from a history, newest first."""
        weights = self.coefficients(sigma, [made.sigma for made in history])
        if not self.is_of_derivative:
            return _sum((weight, made.denoised) for weight, made in zip(weights, history, strict=False))
        derivative = _sum(
            (weight / made.sigma, made.x - made.denoised) for weight, made in zip(weights, history, strict=False)
        )
        return torch.sub(x, derivative, alpha=sigma)


WAYS = (
    Way("d held", 0, True),
    Way("d linear", 1, True),
    Way("d parabola", 2, True),
    Way("x0 held", 0, False),
    Way("x0 half linear", 1, False, 0.5),
    Way("x0 linear", 1, False),
)


def _sum(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """The sum of tensors by their weights."""
    total = None
    for weight, tensor in terms:
        total = tensor * weight if total is None else total.add_(tensor, alpha=weight)
    assert total is not None
    return total


@dataclass
class Made:
    """What an evaluation that was made gave of one condition."""

    sigma: float
    x: Tensor
    denoised: Tensor
    number: int


@dataclass
class Condition:
    """What is remembered of one condition.

    Attributes:
        history: newest first.
        state: what is in force of it; with another one it is another condition.
        skipped: what was foretold since, and where: the weight of the step, the noise level, the prediction.
    """

    state: Hashable
    history: list[Made] = field(default_factory=list)
    skipped: list[tuple[float, float, Tensor]] = field(default_factory=list)


class Scores:
    """What each way achieved, and from that what it would. At the noise level of the evaluation before, where heun and
    the like evaluate again, it is a matter of its own."""

    def __init__(self) -> None:
        self._measured: dict[tuple[Way, bool], list[tuple[float, float]]] = {}

    def add(self, way: Way, gap: float, error: float) -> None:
        """It was off by this at a gap in log sigma."""
        measured = self._measured.setdefault((way, gap < SAME_LEVEL), [])
        measured.insert(0, (gap, error if math.isfinite(error) else math.inf))
        del measured[MEMORY:]

    def best(self, gap: float, depth: int) -> tuple[float, Way] | None:
        """The way that would be nearest at a gap, with what it would be off by; None if none was scored.

        Args:
            depth: how many evaluations there are to foretell from.
        """
        is_same = gap < SAME_LEVEL
        found = [
            (_mean(error * (1 if is_same else _growth(way, gap / at)) for at, error in measured), way.order, way)
            for (way, kind), measured in self._measured.items()
            if kind == is_same and way.order < depth
        ]
        return min(found, key=lambda one: one[:2])[::2] if found else None

    @property
    def are_derivatives_as_good(self) -> bool:
        """Whether a derivative foretold about as well as predictions did, at last."""
        last = {True: math.inf, False: math.inf}
        for (way, is_same), measured in self._measured.items():
            if not is_same:
                last[way.is_of_derivative] = min(last[way.is_of_derivative], measured[0][1])
        return last[True] <= 2 * last[False]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _growth(way: Way, ratio: float) -> float:
    """What an error grows by with the gap. Wider, as the order says. Narrower, as the lowest order's would: measured
    errors of high orders shrink less than theirs should."""
    return ratio ** (way.order + 1) if ratio > 1 else ratio


class ForecastRun(MethodRun):
    """Decides for each evaluation whether it is made, and fills those that are not."""

    def __init__(self, config: Forecast, run: Run):
        self.config = config
        self.steps = run.steps
        self.adapts_steps = run.adapts_steps
        self.in_range = run.sigma_range(config.start_percent, config.end_percent)
        self.conditions_seen: dict[Hashable, Condition] = {}
        self.scores: dict[tuple[Hashable, ...], Scores] = {}
        # Scores that are still on the device: their group, gap and ways.
        self.unread: list[tuple[tuple[Hashable, ...], float, list[Way], Tensor]] = []
        self.evaluation: Evaluation | None = None
        self.groups: list[tuple[Hashable, ...]] = []
        self.groups_before: list[tuple[Hashable, ...]] = []
        self.is_skipping = False
        self.number = -1
        self.row = 0
        self.error = 0.0
        self.sigma = math.inf
        self.step = -1
        self.is_multistage = False
        self.has_pairs = False
        self.is_combination_known = True
        # For the verdict.
        self.skipped = 0
        self.made: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.cached = 0
        self.worst = 0.0
        self.least: float | None = None
        self.bytes = 0

    def conditions(self, evaluation: Evaluation, call: ConditionsCall) -> Sequence[Tensor]:
        if evaluation is not self.evaluation:
            self._begin(evaluation)
        group = tuple(call.keys)
        self.groups.append(group)
        for key, state in zip(call.keys, call.states, strict=True):
            self._known(key, state, call.x)
        if self.is_skipping:
            gap = self._gap(group, call.sigma)
            choice = None if gap is None else self._choose(group, call.weights, gap)
            if choice is not None:
                return self._foretell(choice[1], evaluation, call)
            self._make(evaluation, "for a changed prompt")
        return self._evaluate(evaluation, call, group)

    # Whether.

    def _begin(self, evaluation: Evaluation) -> None:
        """The sampler asks for the next prediction: will it be made?"""
        self._read()
        self.number += 1
        sigma = evaluation.sigma
        self.is_multistage |= evaluation.step == self.step
        self.has_pairs |= 0 < sigma and self.sigma < math.inf and abs(math.log(sigma / self.sigma)) < SAME_LEVEL
        goes_up = sigma > self.sigma * (1 + self.steps.TOLERANCE)
        if goes_up:
            self._forget()
        self.groups_before, self.groups = self.groups, []
        why = self._why_made(evaluation, goes_up)
        # Never both evaluations of a step.
        was_skipped, same_step = self.is_skipping, evaluation.step == self.step
        if why is None and was_skipped and same_step:
            why = "for the other half of a step"
        self.evaluation, self.sigma, self.step = evaluation, sigma, evaluation.step
        self.is_skipping = why is None
        evaluation.is_forecast = self.is_skipping
        if why is None:
            self.skipped += 1
            self.row += 1
        else:
            self.made[why] += 1
            self.row, self.error = 0, 0.0

    def _why_made(self, evaluation: Evaluation, goes_up: bool) -> str | None:
        """Why an evaluation is made; None if it need not be."""
        if self.adapts_steps:
            return "since the sampler chooses its own steps by what they give"
        if not self.in_range(evaluation.sigma) or evaluation.sigma <= 0:
            return "outside the range"
        if self.number < FIRST:
            return "first"
        if goes_up:
            return "for a noise level that went up"
        if self._is_last(evaluation):
            return "last"
        if self.row >= self.config.max_skips:
            return "after as many skips as are allowed"
        found = [self._expected(group, evaluation) for group in self.groups_before]
        if not found or any(one is None for one in found):
            return "to learn"
        error = max(one for one in found if one is not None)
        self.least = error if self.least is None else min(self.least, error)
        if self.error + error > self.config.error_budget:
            return "by the budget"
        if self.has_pairs and evaluation.step not in (self.step, len(self.steps) - 1):
            after = [self._expected(group, evaluation, at_same_level=True) for group in self.groups_before]
            if all(one is not None and one < error for one in after):
                return "for the other half of a step"
        self.error += error
        self.worst = max(self.worst, self.error)
        return None

    def _is_last(self, evaluation: Evaluation) -> bool:
        """Whether it is one of the last. Of two at one noise level the second is made there, if one may be skipped."""
        left = len(self.steps) - evaluation.step
        return left <= LAST if not self.has_pairs else left == 1 and evaluation.step == self.step

    def _expected(
        self, group: tuple[Hashable, ...], evaluation: Evaluation, at_same_level: bool = False
    ) -> float | None:
        """What skipping leaves in the latent, relative to it; None if nothing is known yet.

        Args:
            at_same_level: of a second evaluation there, if this one is made.
        """
        gap = 0.0 if at_same_level else self._gap(group, evaluation.sigma)
        best = None if gap is None else self._choose(group, None, gap)
        if best is None:
            return None
        following = self.steps.sigmas[evaluation.step + 1]
        return best[0] * (1 - following / evaluation.sigma) if following < evaluation.sigma else best[0]

    def _gap(self, group: tuple[Hashable, ...], sigma: float) -> float | None:
        """How far it is from the last evaluation, in log sigma; None where a condition has too little history."""
        newest = []
        for key in group:
            known = self.conditions_seen.get(key)
            if (
                known is None
                or len(known.history) < 2
                or self.number - known.history[0].number > self.config.max_skips + 1
            ):
                return None
            newest.append(known.history[0].sigma)
        return max(abs(math.log(one / sigma)) for one in newest)

    def _choose(
        self, group: tuple[Hashable, ...], weights: Sequence[float] | None, gap: float
    ) -> tuple[float, Way] | None:
        depth = min(len(self.conditions_seen[key].history) for key in group)
        scores = self.scores.get(group)
        return None if scores is None else scores.best(gap, depth)

    # What.

    def _foretell(self, way: Way, evaluation: Evaluation, call: ConditionsCall) -> list[Tensor]:
        found = []
        weight = self._step_weight(evaluation)
        for key in call.keys:
            known = self.conditions_seen[key]
            value = way.foretell(call.sigma, call.x, known.history)
            known.skipped.append((weight, call.sigma, value))
            found.append(value.clone())
        self.ways[way.name] += 1
        return found

    def _evaluate(self, evaluation: Evaluation, call: ConditionsCall, group: tuple[Hashable, ...]) -> list[Tensor]:
        results = list(call.evaluate())
        if evaluation.is_cached:
            # No exact evaluation, and further from one than a forecast is: nothing is learned from it.
            self.cached += 1
            return results
        self._score(call, group, results)
        x, outputs = call.x.clone(), []
        for key, result in zip(call.keys, results, strict=True):
            known = self.conditions_seen[key]
            outputs.append(self._taken_back(group, known, evaluation, call.sigma, result))
            known.skipped.clear()
            # Two evaluations at one noise level, as heun makes them: the later one stands for both.
            kept = [made for made in known.history if abs(math.log(made.sigma / call.sigma)) > SAME_LEVEL]
            known.history = [Made(call.sigma, x, result.clone(), self.number), *kept][:KEPT]
        self._count_bytes()
        return outputs

    def _step_weight(self, evaluation: Evaluation) -> float:
        """By how much the prediction of an evaluation moves x / sigma, as any solver's step does in the end."""
        following = self.steps.sigmas[evaluation.step + 1]
        return 1 / following - 1 / evaluation.sigma if 0 < following < evaluation.sigma else 0.0

    def _taken_back(
        self, group: tuple[Hashable, ...], known: Condition, evaluation: Evaluation, sigma: float, result: Tensor
    ) -> Tensor:
        """A prediction that also takes back what was foretold wrongly since the last one."""
        weight = self._step_weight(evaluation)
        if not known.skipped or not known.history or not weight or self.is_multistage or not self._is_smooth(group):
            return result
        now = Made(sigma, result, result, 0)
        nodes = [now, *known.history[:2]]
        way = Way("", len(nodes) - 1, False)
        total = result.clone()
        for skipped_weight, at, foretold in known.skipped:
            share = skipped_weight / weight
            should = _sum(
                (coefficient, made.denoised)
                for coefficient, made in zip(way.coefficients(at, [made.sigma for made in nodes]), nodes, strict=True)
            )
            total.add_(should, alpha=share).sub_(foretold, alpha=share)
        return total

    def _is_smooth(self, group: tuple[Hashable, ...]) -> bool:
        """Whether the sampler adds no noise of its own, as the derivatives tell: what lies between two evaluations is
        then known from both."""
        scores = self.scores.get(group)
        return scores is not None and scores.are_derivatives_as_good

    def _score(self, call: ConditionsCall, group: tuple[Hashable, ...], results: Sequence[Tensor]) -> None:
        """Score every way on what it would have foretold here; read from the device when it is needed."""
        gap = self._gap(group, call.sigma)
        if gap is None:
            return
        histories = [self.conditions_seen[key].history for key in call.keys]
        depth = min(map(len, histories))
        ways = [way for way in WAYS if way.order < (1 if gap < SAME_LEVEL else depth)]
        parts = [[way.foretell(call.sigma, call.x, history) for way in ways] for history in histories]
        if call.weights is not None:
            combined = _sum(zip(call.weights, results, strict=True))
            foretold = [_sum(zip(call.weights, values, strict=True)) for values in zip(*parts, strict=True)]
            self._note(group, gap, ways, [_error(value, combined) for value in foretold])
        self.is_combination_known &= call.weights is not None
        each = [[_error(value, result) for value in values] for values, result in zip(parts, results, strict=True)]
        if call.weights is None:
            self._note(group, gap, ways, [torch.stack(errors).amax(0) for errors in zip(*each, strict=True)])
        if len(group) > 1:
            for key, errors in zip(group, each, strict=True):
                self._note((key,), gap, ways, errors)

    def _note(self, group: tuple[Hashable, ...], gap: float, ways: list[Way], errors: list[Tensor]) -> None:
        self.unread.append((group, gap, ways, torch.stack(errors)))

    def _read(self) -> None:
        """All scores that are still on the device, at once."""
        if not self.unread:
            return
        values = iter(torch.cat([errors for *_, errors in self.unread]).tolist())
        for group, gap, ways, _ in self.unread:
            scores = self.scores.setdefault(group, Scores())
            for way in ways:
                scores.add(way, gap, next(values))
        self.unread.clear()

    # What is remembered.

    def _known(self, key: Hashable, state: Hashable, x: Tensor) -> None:
        """A condition's memory; a new one if it is not what it was."""
        known = self.conditions_seen.get(key)
        if known is None or known.state != state or (known.history and known.history[0].x.shape != x.shape):
            self.conditions_seen[key] = Condition(state)

    def _forget(self) -> None:
        for known in self.conditions_seen.values():
            known.history.clear()
            known.skipped.clear()

    def _make(self, evaluation: Evaluation, why: str) -> None:
        """An evaluation that was to be skipped is made after all."""
        self.is_skipping = evaluation.is_forecast = False
        self.skipped -= 1
        self.row, self.error = 0, 0.0
        self.made[why] += 1

    def _count_bytes(self) -> None:
        tensors = {
            id(tensor): tensor.nbytes
            for known in self.conditions_seen.values()
            for made in known.history
            for tensor in (made.x, made.denoised)
        }
        self.bytes = max(self.bytes, sum(tensors.values()))

    def verdict(self) -> tuple[State, str]:
        evaluations = self.skipped + sum(self.made.values())
        if not evaluations:
            return "inert", "skipped nothing: the model was not evaluated"
        if not self.skipped:
            return "inert", f"skipped nothing: {self._why_inert()}"
        ways = ", ".join(f"{name} {count}" for name, count in self.ways.most_common())
        made = ", ".join(f"{why} {count}" for why, count in self.made.most_common())
        text = (
            f"skipped {self.skipped} of {evaluations} evaluations (error about {self.worst:.2g} of a budget of "
            f"{self.config.error_budget:g}), forecast by {ways}; made: {made}"
        )
        return "active", "; ".join([text, *self._notes()])

    def _notes(self) -> list[str]:
        notes = [f"{self.bytes / 2**20:.1f} MiB of memory"]
        if self.cached:
            notes.append(f"nothing was learned from {self.cached} that DeepCache shortened")
        if not self.is_combination_known:
            notes.append("the error is that of the worst condition, since how the guider combines them is its own")
        return notes

    def _why_inert(self) -> str:
        if self.adapts_steps:
            return "this sampler chooses its own steps by what the model gives, which a forecast would mislead"
        budget = f"error_budget is {self.config.error_budget:g}"
        if self.least is not None:
            return f"the least that a skip would leave is about {self.least:.2g}, and {budget}. Raise it, or take more steps"
        needed = FIRST + LAST
        if sum(self.made.values()) <= needed + 1:
            return (
                f"of {sum(self.made.values())} evaluations the first {FIRST} and the last {LAST} are made in any case. "
                "In runs of so few steps there is nothing to save but whole steps"
            )
        return "no evaluation could be foretold: each had other prompts, another size or a noise level out of the range"


def _error(value: Tensor, exact: Tensor) -> Tensor:
    """Of a batch (B, ...), relative to it: that of the worst."""
    off, size = (one.flatten(1).float().norm(dim=1) for one in (value - exact, exact))
    return (off / size.clamp(min=1e-12)).amax()
