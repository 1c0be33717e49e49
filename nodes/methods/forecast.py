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
    MOST_AMPLIFIED,
    SAME_LEVEL,
    ConditionsCall,
    Configuration,
    Evaluation,
    MethodRun,
    Model,
    Run,
    State,
    check_number,
    check_only_cache,
    check_range,
)

MAX_BUDGET = 0.5
MAX_SKIPS = 10
KEPT = 3
"""Evaluations that are remembered: a parabola needs as many."""

FIRST = 4
"""The first evaluations, which are made in any case: what is scored needs a history, and one score may be luck."""

LAST = 2
"""The last steps, which are: detail is made there, and nothing after them would take an error back."""

MEMORY = 2
"""How many scores of each way count."""

OTHER_HALF = "for the other half of a step"
CHANGED = "for a changed prompt"
NEW = "for conditions that are new"
RISEN = "for a noise level that went up"
"""Why an evaluation is made."""

Group = tuple[Hashable, ...]
"""Conditions that are asked for at once."""


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
        check_only_cache(self.title, model)

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

    def terms(self, sigma: float, sigmas: Sequence[float]) -> tuple[float, list[float], list[float]]:
        """The prediction at `sigma` as a sum: the weights of its latent, of latents and of predictions before."""
        weights = self.coefficients(sigma, sigmas)
        if not self.is_of_derivative:
            return 0.0, [0.0] * len(weights), weights
        shares = [sigma * weight / one for weight, one in zip(weights, sigmas, strict=False)]
        return 1.0, [-share for share in shares], shares

    def foretell(self, sigma: float, x: Tensor, history: Sequence[Exact]) -> Tensor:
        """The prediction for a latent `x` at `sigma`, from a history, newest first."""
        of_x, of_latents, of_predictions = self.terms(sigma, [one.sigma for one in history])
        terms = [(of_x, x)]
        for one, latent, prediction in zip(history, of_latents, of_predictions, strict=False):
            terms += [(latent, one.x), (prediction, one.denoised)]
        return _sum((weight, tensor) for weight, tensor in terms if weight)


HELD_DERIVATIVE, HELD_PREDICTION = Way("d held", 0, True), Way("x0 held", 0, False)
WAYS = (
    HELD_DERIVATIVE,
    Way("d linear", 1, True),
    Way("d parabola", 2, True),
    HELD_PREDICTION,
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
class Exact:
    """What an evaluation that was made gave of one condition.

    Attributes:
        number: which of the run's evaluations it was.
    """

    sigma: float
    x: Tensor
    denoised: Tensor
    number: int


@dataclass
class Condition:
    """What is remembered of one condition.

    Attributes:
        state: what is in force of it; with another one it is another condition.
        history: newest first.
    """

    state: Hashable
    history: list[Exact] = field(default_factory=list)


@dataclass
class Foretold:
    """One call that was foretold.

    Attributes:
        weight: by how much its step moves x / sigma, for each unit of the prediction.
        denoised: of each condition.
    """

    sigma: float
    weight: float
    denoised: list[Tensor]


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
        """Whether the derivative was held about as well as the prediction, at last: it is not where noise is added."""
        last = {way: measured[0][1] for (way, is_same), measured in self._measured.items() if not is_same}
        return last.get(HELD_DERIVATIVE, math.inf) <= 2 * last.get(HELD_PREDICTION, 0.0)


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _growth(way: Way, ratio: float) -> float:
    """What an error grows by with the gap. Wider, by one order more than its own: what no score reached is not known.
    Narrower, as the lowest order's would: measured errors of high orders shrink less than theirs should."""
    return ratio ** (way.order + 2) if ratio > 1 else ratio


class ForecastRun(MethodRun):
    """Decides for each evaluation whether it is made, and fills those that are not. Conditions that are asked for at
    once are a group: they are foretold in one way, and scored by what the sampler gets of them."""

    def __init__(self, config: Forecast, run: Run):
        self.config = config
        self.steps = run.steps
        self.adapts_steps = run.adapts_steps
        self.in_range = run.sigma_range(config.start_percent, config.end_percent)
        # What is remembered.
        self.known: dict[Hashable, Condition] = {}
        self.scores: dict[Group, Scores] = {}
        self.unread: list[tuple[list[Group], float, list[Way], Tensor]] = []
        self.foretold: dict[Group, list[Foretold]] = {}
        self.to_take_back: dict[Group, list[Foretold]] = {}
        # The evaluation that is made or skipped.
        self.evaluation: Evaluation | None = None
        self.groups: list[Group] = []
        self.is_skipping = False
        self.is_partly_made = False
        self.number = -1
        self.sigma = math.inf
        self.step = -1
        self.row = 0
        self.error = 0.0
        self.added = 0.0
        # What the sampler is like.
        self.is_multistage = False
        self.has_pairs = False
        # For the verdict.
        self.skipped = 0
        self.partly = 0
        self.made: Counter[str] = Counter()
        self.ways: Counter[str] = Counter()
        self.cached = 0
        self.worst = 0.0
        self.least: float | None = None
        self.bytes = 0
        self.is_combination_known = True
        self.devices = 1

    def conditions(self, evaluation: Evaluation, call: ConditionsCall) -> Sequence[Tensor]:
        if evaluation is not self.evaluation:
            self._begin(evaluation)
        group = tuple(call.keys)
        if not group:
            return call.evaluate()
        is_changed = False
        for key, state in zip(call.keys, call.states, strict=True):
            known = self.known.get(key)
            if known is None or known.state != state or (known.history and known.history[0].x.shape != call.x.shape):
                is_changed |= known is not None
                self.known[key] = Condition(state)
        self.groups.append(group)
        if self.is_skipping:
            best = self._best(group, call.sigma)
            if best is not None:
                return self._foretell(best[1], evaluation, call, group)
            if len(self.groups) == 1:
                self._make(CHANGED if is_changed else NEW)
            elif not self.is_partly_made:
                # What another call of this evaluation was given stands.
                self.is_partly_made = True
                self.partly += 1
        return self._evaluate(evaluation, call, group)

    # Whether it is made.

    def _begin(self, evaluation: Evaluation) -> None:
        """The sampler asks for the next prediction."""
        if evaluation.is_again:
            self._begin_again(evaluation)
            return
        self._read()
        sigma, is_same_step = evaluation.sigma, evaluation.step == self.step
        goes_up = sigma > self.sigma * (1 + self.steps.TOLERANCE)
        self.number += 1
        # What is too old is of no use any more: windows that move on leave much of it.
        self.known = {key: known for key, known in self.known.items() if self._is_recent(known.history)}
        self.is_multistage |= is_same_step
        self.has_pairs |= is_same_step and self.steps.gap(sigma, self.sigma) < SAME_LEVEL
        if goes_up:
            self.foretold.clear()
            for known in self.known.values():
                known.history.clear()
        before = self.evaluation
        if before is not None and before.is_reused:
            # It was made with the guidance of earlier ones: what that left is not gone.
            self.error += before.error
            self.worst = max(self.worst, self.error)
        elif before is None or not before.is_forecast:
            self.error = 0.0
        why = self._why_made(evaluation, is_same_step, goes_up)
        self.evaluation, self.sigma, self.step, self.groups = evaluation, sigma, evaluation.step, []
        self.is_skipping = evaluation.is_forecast = why is None
        self.is_partly_made = False
        self.devices = evaluation.devices
        if why is None:
            self.skipped += 1
            self.row += 1
        else:
            self._note_made(evaluation, why)

    def _begin_again(self, evaluation: Evaluation) -> None:
        """What came of the evaluation was not accepted: nothing is kept of it, and it is made."""
        self.evaluation, self.groups = evaluation, []
        self.unread.clear()
        for known in self.known.values():
            known.history = [exact for exact in known.history if exact.number != self.number]
        if self.is_skipping:
            self._make("since a forecast was not finite")
        else:
            evaluation.budget = self._left()

    def _left(self) -> float:
        """Of the budget."""
        return max(0.0, self.config.error_budget - self.error)

    def _note_made(self, evaluation: Evaluation, why: str) -> None:
        self.made[why] += 1
        self.row = 0
        evaluation.budget = self._left()
        self.to_take_back, self.foretold = self.foretold, {}

    def _make(self, why: str) -> None:
        """An evaluation that was to be skipped is made after all."""
        assert self.evaluation is not None
        self.is_skipping = self.evaluation.is_forecast = False
        self.skipped -= 1
        self.error -= self.added
        self._note_made(self.evaluation, why)

    def _why_made(self, evaluation: Evaluation, is_same_step: bool, goes_up: bool) -> str | None:
        """Why an evaluation is made; None if it need not be."""
        if self.adapts_steps:
            return "since the sampler chooses its own steps"
        if not self.in_range(evaluation.sigma) or evaluation.sigma <= 0:
            return "outside the range"
        if self.number < FIRST:
            return "first"
        if goes_up:
            return RISEN
        if self._is_last(evaluation, is_same_step):
            return "last"
        if self.is_skipping and is_same_step:
            return OTHER_HALF
        if self.row >= self.config.max_skips:
            return "after as many skips as are allowed"
        share = self._share(evaluation, is_same_step)
        errors = [self._left_by(self._best(group, evaluation.sigma), share) for group in self.groups]
        if not errors or any(error is None for error in errors):
            return "to learn"
        error = max(error for error in errors if error is not None)
        self.least = error if self.least is None else min(self.least, error)
        if not self.error + error <= self.config.error_budget:
            return "by the budget"
        if self._is_better_for_the_next(evaluation, is_same_step, error):
            return OTHER_HALF
        self.added = error
        self.error += error
        return None

    def _is_last(self, evaluation: Evaluation, is_same_step: bool) -> bool:
        """Whether it is one of the last. Of two at one noise level the second is, and the first may be skipped."""
        left = len(self.steps) - evaluation.step
        return (left <= 1 and is_same_step) if self.has_pairs else left <= LAST

    def _is_better_for_the_next(self, evaluation: Evaluation, is_same_step: bool, error: float) -> bool:
        """Whether skipping the second of two evaluations at one noise level leaves less than skipping the first."""
        if not self.has_pairs or is_same_step or evaluation.step == len(self.steps) - 1:
            return False
        found = [self.scores[group].best(0.0, 1) if group in self.scores else None for group in self.groups]
        errors = [self._left_by(best, self._share(evaluation, True)) for best in found]
        return all(other is not None and other < error for other in errors)

    def _best(self, group: Group, sigma: float) -> tuple[float, Way] | None:
        """The nearest way to foretell a group's conditions at a noise level, and the error that is expected; None where
        one of them has too little history, or one that is too old."""
        histories = [self.known[key].history for key in group if key in self.known]
        scores = self.scores.get(group)
        if scores is None or len(histories) < len(group) or not all(map(self._is_enough, histories)):
            return None
        gap = max(self.steps.gap(history[0].sigma, sigma) for history in histories)
        return scores.best(gap, min(map(len, histories)))

    def _is_enough(self, history: Sequence[Exact]) -> bool:
        return len(history) > 1 and self._is_recent(history)

    def _is_recent(self, history: Sequence[Exact]) -> bool:
        return bool(history) and self.number - history[0].number <= self.config.max_skips + 1

    @staticmethod
    def _left_by(best: tuple[float, Way] | None, share: float) -> float | None:
        """What a skip leaves in the latent, relative to it."""
        return None if best is None else best[0] * share if math.isfinite(best[0]) else math.inf

    def _share(self, evaluation: Evaluation, is_same_step: bool) -> float:
        """By what share a step makes the latent the prediction. Of two evaluations at one noise level, the first ends
        the step to it and the second begins the one from it: each is one half of its step."""
        after = self.steps.reach_of(evaluation.step, evaluation.sigma)
        if not self.has_pairs:
            return after
        before = self.steps.sigmas[evaluation.step - 1] if evaluation.step else math.inf
        return (after if is_same_step else self.steps.share(before, evaluation.sigma)) / 2

    # What is given.

    def _foretell(self, way: Way, evaluation: Evaluation, call: ConditionsCall, group: Group) -> list[Tensor]:
        found = [way.foretell(call.sigma, call.x, self.known[key].history) for key in group]
        if not self.is_multistage:
            kept = Foretold(
                call.sigma, self.steps.weight(evaluation.step, evaluation.sigma), [value.clone() for value in found]
            )
            self.foretold.setdefault(group, []).append(kept)
        # Evaluations are told of, whatever calls they have.
        self.ways[way.name] += len(self.groups) == 1
        self.worst = max(self.worst, self.error)
        return found

    def _evaluate(self, evaluation: Evaluation, call: ConditionsCall, group: Group) -> list[Tensor]:
        results = list(call.evaluate())
        if evaluation.is_cached or call.sigma <= 0:
            # DeepCache's are further from exact ones than forecasts are: nothing is learned from them.
            self.cached += evaluation.is_cached and len(self.groups) == 1
            return results
        self._score(call, group, results)
        outputs = self._with_errors_taken_back(evaluation, call, group, results)
        x = call.x.clone()
        for key, result in zip(group, results, strict=True):
            known = self.known[key]
            # Two at one noise level: the later one stands for both.
            others = [exact for exact in known.history if self.steps.gap(exact.sigma, call.sigma) >= SAME_LEVEL]
            known.history = [Exact(call.sigma, x, result.clone(), self.number), *others][:KEPT]
        self._weigh()
        return outputs

    def _with_errors_taken_back(
        self, evaluation: Evaluation, call: ConditionsCall, group: Group, results: list[Tensor]
    ) -> list[Tensor]:
        """Predictions that also move the latent back by what those foretold since the last evaluation moved it wrongly.
        What lies between two evaluations is known from both, unless the sampler adds noise of its own."""
        weight, scores = self.steps.weight(evaluation.step, evaluation.sigma), self.scores.get(group)
        foretold = self.to_take_back.pop(group, None)
        if not foretold or not weight or self.is_multistage or scores is None or not scores.are_derivatives_as_good:
            return results
        if any(one.weight > MOST_AMPLIFIED * weight for one in foretold):
            return results
        if not all(self.known[key].history for key in group):
            # Another prompt by now.
            return results
        outputs = []
        for place, (key, result) in enumerate(zip(group, results, strict=True)):
            nodes = [(call.sigma, result), *((one.sigma, one.denoised) for one in self.known[key].history[:2])]
            way, output = Way("between", len(nodes) - 1, False), result.clone()
            for one in foretold:
                coefficients = way.coefficients(one.sigma, [sigma for sigma, _ in nodes])
                should_be = _sum(zip(coefficients, (denoised for _, denoised in nodes), strict=True))
                output.add_(should_be.sub_(one.denoised[place]), alpha=one.weight / weight)
            outputs.append(output)
        return outputs

    # What is learned.

    def _score(self, call: ConditionsCall, group: Group, results: Sequence[Tensor]) -> None:
        """Score every way by what it would have foretold here: together, and each condition by itself, for when it is
        asked for alone."""
        histories = [self.known[key].history for key in group]
        if not all(map(self._is_enough, histories)):
            return
        gap = max(self.steps.gap(history[0].sigma, call.sigma) for history in histories)
        depth = 1 if gap < SAME_LEVEL else min(map(len, histories))
        ways = [way for way in WAYS if way.order < depth]
        # All ways and conditions in one product: on a GPU it is the number of operations that costs.
        given = [
            [call.x, *(one.x for one in some[:depth]), *(one.denoised for one in some[:depth])] for some in histories
        ]
        values = torch.stack([torch.stack(some) for some in given]).flatten(3).float()
        sums = [[_row(way, call.sigma, history, depth) for way in ways] for history in histories]
        foretold = torch.einsum("cwt,ctbn->cwbn", _beside(values, sums), values)
        exact = torch.stack(list(results)).flatten(2).float()
        errors = [_errors(foretold, exact)]
        groups: list[Group] = [(key,) for key in group]
        if len(group) > 1:
            groups.append(group)
            if call.weights is None:
                errors.append(errors[0].amax(0, keepdim=True))
            else:
                weights = _beside(values, call.weights)
                combined = [torch.einsum("c,c...->...", weights, one)[None] for one in (foretold, exact)]
                errors.append(_errors(*combined))
        self.is_combination_known &= call.weights is not None
        self.unread.append((groups, gap, ways, torch.cat(errors)))

    def _read(self) -> None:
        """Scores that are still on the device, all at once: now that they are needed, and it had to wait anyway."""
        if not self.unread:
            return
        values = iter(torch.cat([errors.flatten() for *_, errors in self.unread]).tolist())
        for groups, gap, ways, _ in self.unread:
            for group in groups:
                scores = self.scores.setdefault(group, Scores())
                for way in ways:
                    scores.add(way, gap, next(values))
        self.unread.clear()

    def _weigh(self) -> None:
        """The memory that all of this takes."""
        kept = [one for known in self.known.values() for exact in known.history for one in (exact.x, exact.denoised)]
        kept += [one for some in self.foretold.values() for foretold in some for one in foretold.denoised]
        self.bytes = max(self.bytes, sum({id(one): one.nbytes for one in kept}.values()))

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
        notes = [f"{self.bytes / 2**20:.1f} MiB of memory" if self.bytes > 2**17 else "little memory"]
        if self.partly:
            was = "was" if self.partly == 1 else "were"
            notes.append(f"{self.partly} of those skipped {was} made in part, for what could not be foretold")
        if self.cached:
            notes.append(f"nothing was learned from {self.cached} that DeepCache shortened")
        if not self.is_combination_known:
            notes.append("the error is that of the worst condition, since how the guider combines them is its own")
        if self.devices > 1:
            notes.append(f"all {self.devices} devices had nothing to do in those that were skipped")
        return notes

    def _why_inert(self) -> str:
        if self.adapts_steps:
            return "this sampler chooses its own steps by what the model gives, which a forecast would mislead"
        if self.made[RISEN]:
            return "the noise level goes up in this run, where nothing can be foretold from what was before"
        budget = f"error_budget is {self.config.error_budget:g}"
        if self.least is not None:
            least = f"the least that a skip would leave is about {self.least:.2g}"
            return f"{least}, and {budget}. Raise it, or take more steps"
        made = sum(self.made.values())
        if made <= FIRST + LAST + 1:
            return (
                f"of {made} evaluations the first {FIRST} and the last {LAST} are made in any case. In runs of so few "
                "steps there is nothing to save but whole steps"
            )
        return "no evaluation could be foretold: each had other prompts, another size or a noise level out of the range"


def _row(way: Way, sigma: float, history: Sequence[Exact], depth: int) -> list[float]:
    """A way's weights of the latent, of `depth` latents before and of as many predictions."""
    of_x, of_latents, of_predictions = way.terms(sigma, [one.sigma for one in history[:depth]])
    return [of_x, *(weight for some in (of_latents, of_predictions) for weight in [*some, *[0.0] * depth][:depth])]


def _beside(values: Tensor, numbers: Sequence[float] | Sequence[Sequence[Sequence[float]]]) -> Tensor:
    """Numbers where `values` are. On a GPU by way of pinned memory: from any other it would be waited for."""
    return torch.tensor(numbers, dtype=values.dtype, pin_memory=values.is_cuda).to(values.device, non_blocking=True)


def _errors(foretold: Tensor, exact: Tensor) -> Tensor:
    """How far (conditions, ways, B, N) is off (conditions, B, N), relative to it, in the worst of a batch: (conditions,
    ways)."""
    off, size = (foretold - exact[:, None]).norm(dim=-1), exact.norm(dim=-1)
    worst: Tensor = (off / size[:, None].clamp(min=1e-12)).amax(-1)
    return worst
