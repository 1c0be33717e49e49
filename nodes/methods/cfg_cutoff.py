"""CFG Cutoff: classifier-free guidance where it matters, and what it was before in between.

Guidance matters while the image takes shape and hardly afterwards, and at the very beginning, where there is only
noise, it may do harm. Without it each evaluation needs the positive prediction alone, half the work. In between, what
it adds changes slower than the predictions that it is made of: the positive is evaluated each time, and how the other
conditions differ from it may be that of the last evaluations, held or drawn on. Which of these is nearer is scored at
each evaluation that has all of them.

Source: "Applying guidance in a limited interval improves sample and distribution quality" (Kynkaanniemi et al., 2024,
arXiv:2404.07724); "Adaptive guidance" (Castillo et al., 2023, arXiv:2312.12487) for an end that is measured;
diffusers' `callback_on_step_end` recipe for a dynamic guidance scale, whose step rule, `int(cutoff * steps)`, this one
is. Reuse is an own design.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .method import (
    MOST_AMPLIFIED,
    SAME_LEVEL,
    ConditionsCall,
    Configuration,
    Evaluation,
    Guidance,
    MethodRun,
    Model,
    Run,
    State,
    Steps,
    check_choice,
    check_number,
)

UNITS = ("steps", "timesteps")
MAX_REUSE = 5

FIRST = 3
"""The first guided evaluations, which are made in any case: what guidance adds turns fastest there, and what is scored
needs a history."""

MOST = 0.1
"""What a row of reuse may leave in the latent, relative to it, where Forecast holds it under no other budget."""

MEMORY = 2
"""How many scores of each way count."""

WAYS = {"held": 0.0, "half linear": 0.5, "linear": 1.0}
"""How the derivatives' difference goes on: by this much of its slope over sigma, as solvers step along it."""


@dataclass(frozen=True)
class CFGCutoff(Configuration):
    """Attributes:
    cutoff: fraction of the run after which only the positive is evaluated, 0.0 to 1.0; 1.0 is never.
    unit: ``steps``: from step ``int(cutoff * steps)`` of this run on, but not from its first unless
        cutoff is 0; ``timesteps``: from that
        fraction of the training timesteps on, so that an image-to-image run, which begins late,
        is cut off at the same noise level as a full one.
    start: fraction of the run, in the same unit, before which only the positive is evaluated.
    reuse_every: of how many guided evaluations in a row one is made in full, 1 to 5; 1 is each.
    adaptive: what guidance still adds to the latent, relative to it, under which it ends before the cutoff; 0 is never.
    """

    cutoff: float = 0.75
    unit: str = "steps"
    start: float = 0.0
    reuse_every: int = 1
    adaptive: float = 0.0

    stem = "cfg_cutoff"
    title = "CFG Cutoff"
    phase = "evaluate"
    is_exact = False

    def __post_init__(self) -> None:
        check_number(self.title, "cutoff", self.cutoff, 0.0, 1.0)
        check_choice(self.title, "unit", self.unit, UNITS)
        check_number(self.title, "start", self.start, 0.0, 1.0)
        check_number(self.title, "reuse_every", self.reuse_every, 1, MAX_REUSE)
        check_number(self.title, "adaptive", self.adaptive, 0.0, 1.0)
        if self.start > 0 and self.start >= self.cutoff:
            raise ValueError(
                f"{self.title}: start must lie before cutoff, but {self.start} does not lie before {self.cutoff}. "
                "Lower start, or raise cutoff."
            )

    def off(self) -> str | None:
        if self.cutoff < 1.0 or self.start > 0 or self.reuse_every > 1 or self.adaptive > 0:
            return None
        return "cutoff is 1.0, the whole run is guided"

    def check(self, model: Model) -> None:
        """Any model can be sampled without guidance."""

    def begin(self, run: Run) -> CFGCutoffRun:
        is_measured = self.reuse_every > 1 or self.adaptive > 0
        return MeasuredRun(self, run) if is_measured else CFGCutoffRun(self, run)


class CFGCutoffRun(MethodRun):
    """Evaluates the positive alone outside an interval and counts what that saved."""

    def __init__(self, config: CFGCutoff, run: Run):
        self.config = config
        self.steps = run.steps
        self.start_step = int(config.start * len(run.steps))
        # A node that samples step by step (Impact Pack's regional sampler) would have no guidance at all.
        self.first_step = max(int(config.cutoff > 0), int(config.cutoff * len(run.steps)))
        self.sigma = run.percent_to_sigma(config.cutoff) if config.unit == "timesteps" else None
        self.start_sigma = run.percent_to_sigma(config.start) if config.unit == "timesteps" else None
        self.evaluations = 0
        self.is_guided = False
        self.left_out: set[str] = set()
        self.alone = 0
        self.began_at: int | None = None
        self.until: int | None = None
        self.foretold = 0
        self.predictions = 0
        self.saved = 0
        self.still_evaluated = 0
        self.guided_predictions: int | None = None
        self.idle: tuple[int, int] | None = None

    def is_before(self, evaluation: Evaluation) -> bool:
        if self.config.start == 0:
            return False
        if self.start_sigma is None:
            return evaluation.step < self.start_step
        return evaluation.sigma > self.start_sigma

    def is_past(self, evaluation: Evaluation) -> bool:
        if self.config.cutoff == 1:
            return False
        if self.sigma is None:
            return evaluation.step >= self.first_step
        return evaluation.sigma <= self.sigma

    def predict_noise(self, evaluation: Evaluation, guidance: Guidance) -> Tensor:
        self.evaluations += not evaluation.is_again
        is_guided = guidance.is_guided
        self.is_guided |= is_guided
        is_before = self.is_before(evaluation)
        is_alone = is_guided and (is_before or self.is_past(evaluation))
        denoised = guidance.positive_alone() if is_alone else self._guided(evaluation, guidance)
        self.left_out.update(guidance.left_out)
        if evaluation.is_forecast:
            # Nothing was evaluated, or only what could not be foretold: Forecast tells of it.
            self.foretold += is_alone
            self.evaluations -= 1
            self.predictions += evaluation.predictions
            if is_alone:
                self._note_place(evaluation, is_before)
            return denoised
        if not is_alone and not evaluation.is_reused:
            if is_guided:
                self.guided_predictions = evaluation.predictions
        elif not evaluation.is_again:
            # A guided evaluation of this very run says what one takes, with every patch on the
            # model that evaluates more; without one, the guider's prompts do.
            would_be = self.guided_predictions or guidance.conditions
            self.saved += max(0, would_be - evaluation.predictions)
            self.still_evaluated = max(self.still_evaluated, evaluation.predictions)
            if 0 < len(evaluation.working) < evaluation.devices:
                self.idle = evaluation.devices - len(evaluation.working), evaluation.devices
            if is_alone:
                self.alone += 1
                self._note_place(evaluation, is_before)
        self.predictions += evaluation.predictions
        return denoised

    def _guided(self, evaluation: Evaluation, guidance: Guidance) -> Tensor:
        return guidance.guided()

    def _note_place(self, evaluation: Evaluation, is_before: bool) -> None:
        if is_before:
            self.until = max(self.until or 0, evaluation.step + 1)
        elif self.began_at is None:
            self.began_at = evaluation.step

    def verdict(self) -> tuple[State, str]:
        done = self._done()
        if not done:
            return "inert", f"saved nothing: {self._why_inert()}"
        if not self.saved:
            return "inert", (f"saved nothing: {'; '.join(done)}, but other nodes on this model evaluated as much again")
        whole = self.predictions + self.saved
        text = f"{self._where()}{'; '.join(done)}, {self.predictions} of {whole} predictions evaluated"
        return "active", "; ".join([text, *self._notes()])

    def _done(self) -> list[str]:
        return [f"{self.alone} of {self.evaluations} evaluations ran on the positive alone"] if self.alone else []

    def _where(self) -> str:
        """Which part of the run was not guided."""
        parts = [] if self.until is None else [f"before step {self.until}"]
        parts += [] if self.began_at is None else [f"from step {self.began_at}"]
        return f"no guidance {' and '.join(parts)} of {len(self.steps)}: " if parts else ""

    def _notes(self) -> list[str]:
        notes = []
        if self.still_evaluated > 1:
            notes.append(
                f"up to {self.still_evaluated} predictions an evaluation remained "
                "(regional prompts, or a node such as PAG that evaluates more by itself)"
            )
        if self.idle is not None:
            notes.append("{} of {} devices had nothing to do in them".format(*self.idle))
        if self.foretold:
            notes.append(f"{self.foretold} more were skipped by Forecast")
        if self.left_out:
            notes.append(f"left out with the guidance: {', '.join(sorted(self.left_out))}")
        return notes

    def _why_inert(self) -> str:
        if not self.evaluations:
            return "the model was not evaluated"
        if not self.is_guided:
            return "this run is not guided anyway (cfg 1.0, or a guider without a negative prompt)"
        if self.foretold:
            return "Forecast skipped every evaluation past the cutoff"
        return "; ".join(self._why_guided())

    def _why_guided(self) -> list[str]:
        """Why every evaluation was guided."""
        why = []
        if self.config.cutoff < 1:
            why.append(f"the cutoff, at {self._place(self.first_step, self.config.cutoff)}, was not reached")
        if self.config.start > 0:
            why.append(f"the run begins no earlier than start, at {self._place(self.start_step, self.config.start)}")
        return why

    def _place(self, step: int, fraction: float) -> str:
        is_by_steps = self.config.unit == "steps"
        return f"step {step} of {len(self.steps)}" if is_by_steps else f"{fraction:.0%} of the timesteps"


@dataclass
class Difference:
    """How a condition differs from the positive.

    Attributes:
        state: what is in force of both; with another one it is another difference.
        number: which of the full evaluations saw it last.
        history: noise level and difference of the derivatives (x - D) / sigma, newest first.
        foretold: since then: noise level, difference of the predictions, and by how much its step moves x / sigma for
            each unit of them.
    """

    state: Hashable
    number: int = 0
    history: list[tuple[float, Tensor]] = field(default_factory=list)
    foretold: list[tuple[float, Tensor, float]] = field(default_factory=list)

    def foretell(self, damping: float, sigma: float) -> Tensor:
        """What the positive's prediction is above the condition's at a noise level."""
        (newest, held), *older = self.history
        if damping and older:
            ((before, other),) = older
            held = held + (held - other) * (damping * (sigma - newest) / (newest - before))
        return held * sigma

    def add(self, steps: Steps, sigma: float, difference: Tensor, number: int) -> None:
        self.number = number
        # Two at one noise level: the later one stands for both.
        others = [one for one in self.history if steps.gap(one[0], sigma) >= SAME_LEVEL]
        self.history = [(sigma, difference / sigma), *others][:2]
        self.foretold = []

    def missed(self, sigma: float, difference: Tensor, most: float) -> Tensor | None:
        """By what those foretold moved x / sigma wrongly, now that the next one is known; None if it is nothing, or
        what a step with a weight above `most` left. What lies between two evaluations is known from both."""
        if not self.foretold or any(weight > most for *_, weight in self.foretold):
            return None
        nodes = [(sigma, difference / sigma), *self.history]
        total = torch.zeros_like(difference)
        for at, foretold, weight in self.foretold:
            for place, (node, value) in enumerate(nodes):
                others = [other for i, (other, _) in enumerate(nodes) if i != place]
                total.add_(value, alpha=weight * at * math.prod((at - other) / (node - other) for other in others))
            total.sub_(foretold, alpha=weight)
        return total


@dataclass(frozen=True)
class Standing:
    """Where a run stands with the guidance that is reused: what an attempt that is not accepted must leave as it was.

    Attributes:
        known: the differences by their conditions.
        full: guided evaluations that were made in full.
        since_full: those that were not, after the last of them.
        row_error: what these left in the latent.
        reused: all that were not made in full.
        over_budget: those that could not be reused.
        worst: the most that a row of them left.
        ways: how often each way was taken.
    """

    known: dict[Hashable, Difference]
    full: int
    since_full: int
    row_error: float
    reused: int
    over_budget: int
    worst: float
    ways: Counter[str]

    @classmethod
    def of(cls, run: MeasuredRun) -> Standing:
        found = {name: getattr(run, name) for name in cls.__dataclass_fields__}
        known = {key: replace(one, history=[*one.history], foretold=[*one.foretold]) for key, one in run.known.items()}
        return cls(**{**found, "known": known, "ways": Counter(run.ways)})

    def give_to(self, run: MeasuredRun) -> None:
        for name in self.__dataclass_fields__:
            setattr(run, name, getattr(self, name))


@dataclass
class Measured:
    """What one call of an evaluation with all conditions showed.

    Attributes:
        weights: of the conditions that differ from the positive, in what the sampler gets; None if that is not known.
        positive: its prediction.
        differences: of the positive's prediction from each condition's.
        errors: of each way, by how much it would have missed each of these.
    """

    weights: tuple[float, ...] | None
    positive: Tensor
    differences: list[Tensor]
    errors: list[list[Tensor]]

    def of(self, denoised: Tensor) -> Tensor | None:
        """What guidance adds, and what each way would be off by, relative to what the sampler gets: (1 + ways,), the
        worst of a batch; None where it can't be told.

        Args:
            denoised: what the guider made of it, which says how much it makes of the differences where no weights do.
        """
        if self.weights is not None:
            added = _weighed(self.weights, self.differences)
            # Their weights are those of the negatives, and the positive's is what is left of one.
            size = _norms(self.positive - added)
            return torch.stack([(_norms(one) / size).amax() for one in [added, *self._weighed_errors()]])
        if denoised.shape != self.positive.shape:
            return None
        added, size = _norms(denoised - self.positive), _norms(denoised)
        strength = added / torch.stack([_norms(one) for one in self.differences]).amax(0).clamp(min=1e-12)
        worst = [torch.stack([_norms(one) for one in some]).amax(0) * strength for some in self.errors]
        return torch.stack([(one / size).amax() for one in [added, *worst]])

    def _weighed_errors(self) -> list[Tensor]:
        assert self.weights is not None
        return [_weighed(self.weights, some) for some in self.errors]


def _weighed(weights: Sequence[float], tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([weight * tensor for weight, tensor in zip(weights, tensors, strict=True)]).sum(0)


def _norms(value: Tensor) -> Tensor:
    """Of each in a batch."""
    norms: Tensor = value.flatten(1).float().norm(dim=1).clamp(min=1e-12)
    return norms


class MeasuredRun(CFGCutoffRun):
    """Measures what guidance adds, reuses it in between, and ends it where it adds little."""

    def __init__(self, config: CFGCutoff, run: Run):
        super().__init__(config, run)
        self.adapts_steps = run.adapts_steps
        # What is remembered.
        self.known: dict[Hashable, Difference] = {}
        self.scores: dict[bool, list[tuple[float, list[float]]]] = {}
        self.unread: tuple[float, Tensor] | None = None
        self.gap = math.inf
        self.amount: float | None = None
        # The evaluation that is made.
        self.evaluation: Evaluation | None = None
        self.is_guiding = False
        self.is_reusing = False
        self.takes_back = False
        self.way = ""
        self.positives: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
        self.measured: list[Measured] = []
        self.needing_negative: set[str] = set()
        # Where the run stands.
        self.is_multistage = False
        self.step_before = -1
        self.sigma_before = math.inf
        self.full = 0
        self.since_full = 0
        self.row_error = 0.0
        self.has_ended = False
        self.before: Standing | None = None
        # For the verdict.
        self.guided = 0
        self.reused = 0
        self.ways: Counter[str] = Counter()
        self.worst = 0.0
        self.ended_with: float | None = None
        self.least: float | None = None
        self.over_budget = 0

    # Whether guidance is over.

    def is_past(self, evaluation: Evaluation) -> bool:
        return super().is_past(evaluation) or self._has_ended(evaluation)

    def _has_ended(self, evaluation: Evaluation) -> bool:
        if evaluation.is_again and self.before is not None:
            # Nothing is kept of what was not accepted.
            self.unread = None
            self.before.give_to(self)
        self.before = None
        self._read()
        if evaluation.sigma > self.sigma_before * (1 + self.steps.TOLERANCE):
            self._forget()
        self.is_multistage |= evaluation.step == self.step_before and not evaluation.is_again
        self.sigma_before, self.step_before = evaluation.sigma, evaluation.step
        if not self.has_ended and self.config.adaptive and self.amount is not None:
            # Were all that is left of the run one step.
            adds = self.amount * self.steps.share(evaluation.sigma, self.steps.sigmas[-1])
            self.least = adds if self.least is None else min(self.least, adds)
            if adds < self.config.adaptive:
                self.has_ended, self.ended_with = True, adds
        return self.has_ended

    def _forget(self) -> None:
        """The noise level went up."""
        self.known.clear()
        self.full, self.amount, self.has_ended = 0, None, False

    # One guided evaluation.

    def _guided(self, evaluation: Evaluation, guidance: Guidance) -> Tensor:
        self.is_guiding = guidance.is_guided
        self.guided += self.is_guiding and not evaluation.is_again
        self.before = Standing.of(self)
        self.needing_negative |= set(guidance.needing_negative) if self.is_guiding else set()
        self.evaluation, self.positives, self.measured = None, {}, []
        try:
            denoised = guidance.guided()
        finally:
            self.is_guiding = False
        self._conclude(evaluation, denoised)
        self.positives, self.measured = {}, []
        return denoised

    def conditions(self, evaluation: Evaluation, call: ConditionsCall) -> Sequence[Tensor]:
        if not self.is_guiding or call.sigma <= 0 or evaluation.is_forecast:
            # In one that is skipped it is of what can't be foretold, and no part of a whole.
            return call.evaluate()
        if evaluation is not self.evaluation:
            self._begin(evaluation)
        own = [place for place, is_positive in enumerate(call.are_positive) if is_positive]
        others = [place for place, is_positive in enumerate(call.are_positive) if not is_positive]
        if not others:
            results = call.evaluate()
            if own:
                self.positives.setdefault(call.window, (call.x, results[0]))
            return results
        if not own:
            # A guider that asks for each apart; what other nodes evaluate of another latent is their own.
            x, _ = self.positives.get(call.window, (None, None))
            if x is None or (x is not call.x and not call.window):
                return call.evaluate()
        known = self._known(call, own, others)
        if self.is_reusing and all(one.number == self.full for one in known):
            return self._reuse(evaluation, call, own, others, known)
        results = list(call.evaluate())
        differences = self._learn(call, own, others, known, results)
        weight = self.steps.weight(evaluation.step, evaluation.sigma)
        for place, one, difference in zip(others, known, differences, strict=True):
            missed = one.missed(call.sigma, difference, MOST_AMPLIFIED * weight) if weight and self.takes_back else None
            if missed is not None:
                results[place] = results[place] - (missed / weight).to(results[place].dtype)
            one.add(self.steps, call.sigma, difference, self.full + 1)
        return results

    def _begin(self, evaluation: Evaluation) -> None:
        """Decide whether the evaluation is made in full."""
        self.evaluation, self.is_reusing = evaluation, False
        # Forecast learns from what is evaluated, and takes back errors of its own.
        self.takes_back = evaluation.budget is None and not self.is_multistage
        due = self.since_full + 1 >= self.config.reuse_every or self.full < FIRST
        if due or evaluation.is_again or self.adapts_steps or self.needing_negative or not self.scores:
            return
        error, self.way = self._best(evaluation)
        budget = MOST - self.row_error if evaluation.budget is None else evaluation.budget
        if not error <= budget:
            self.over_budget += 1
            return
        self.is_reusing, evaluation.error = True, error

    def _known(self, call: ConditionsCall, own: Sequence[int], others: Sequence[int]) -> list[Difference]:
        found = []
        for place in others:
            key, state = call.keys[place], (call.states[place], *(call.states[one] for one in own))
            if key not in self.known or self.known[key].state != state:
                self.known[key] = Difference(state)
            found.append(self.known[key])
        return found

    def _best(self, evaluation: Evaluation) -> tuple[float, str]:
        """What the nearest way leaves in the latent, and which it is. At the noise level of the evaluation before,
        where heun and the like evaluate again, that is a matter of its own."""
        latest = [one for one in self.known.values() if one.number == self.full]
        gap = min((self.steps.gap(one.history[0][0], evaluation.sigma) for one in latest), default=math.inf)
        scores = self.scores.get(gap < SAME_LEVEL) or next(iter(self.scores.values()))
        expected = []
        for place, (name, damping) in enumerate(WAYS.items()):
            scored = [errors[place] * (1 if gap < SAME_LEVEL else _growth(gap / at, damping)) for at, errors in scores]
            expected.append((sum(scored) / len(scored), place, name))
        error, _, way = min(expected)
        return error * self.steps.reach_of(evaluation.step, evaluation.sigma), way

    def _reuse(
        self,
        evaluation: Evaluation,
        call: ConditionsCall,
        own: Sequence[int],
        others: Sequence[int],
        known: Sequence[Difference],
    ) -> list[Tensor]:
        fresh = dict(zip(own, call.only(own).evaluate(), strict=True)) if own else {}
        positive = fresh[own[0]] if own else self.positives[call.window][1]
        if own:
            self.positives.setdefault(call.window, (call.x, positive))
        weight = self.steps.weight(evaluation.step, evaluation.sigma)
        for place, one in zip(others, known, strict=True):
            difference = one.foretell(WAYS[self.way], call.sigma)
            fresh[place] = positive - difference.to(positive.dtype)
            if self.takes_back:
                one.foretold.append((call.sigma, difference, weight))
        evaluation.is_reused = True
        return [fresh[place] for place in range(len(call.keys))]

    def _learn(
        self,
        call: ConditionsCall,
        own: Sequence[int],
        others: Sequence[int],
        known: Sequence[Difference],
        results: Sequence[Tensor],
    ) -> list[Tensor]:
        """Score every way by what it would have given. Returns by what the positive is above each of the others."""
        positive = results[own[0]] if own else self.positives[call.window][1]
        differences = [positive - results[place] for place in others]
        weights = None if call.weights is None else tuple(call.weights[place] for place in others)
        has_history = all(one.history for one in known)
        self.gap = max(self.steps.gap(one.history[0][0], call.sigma) if one.history else math.inf for one in known)
        errors = [
            [difference - one.foretell(damping, call.sigma) for difference, one in zip(differences, known, strict=True)]
            for damping in (WAYS.values() if has_history else ())
        ]
        self.measured.append(Measured(weights, positive, differences, errors))
        return differences

    def _conclude(self, evaluation: Evaluation, denoised: Tensor) -> None:
        """The guider has made something of it."""
        if evaluation.is_forecast:
            return
        if evaluation.is_reused:
            self.since_full += 1
            self.reused += 1
            self.ways[self.way] += 1
            self.row_error += evaluation.error
            self.worst = max(self.worst, self.row_error)
            return
        evaluation.error = 0.0
        found = [one.of(denoised) for one in self.measured]
        known = [one for one in found if one is not None]
        if known and len({one.shape for one in known}) == 1:
            self.unread = self.gap, torch.stack(known).amax(0)
        if self.measured:
            self.full += 1
            # What is too old is of no use any more: windows that move on leave much of it.
            self.known = {key: one for key, one in self.known.items() if one.number == self.full}
        self.since_full, self.row_error = 0, 0.0

    def _read(self) -> None:
        """What was measured and is still on the device: now that it is needed, and it had to wait anyway."""
        if self.unread is None:
            return
        gap, values = self.unread
        self.unread = None
        amount, *errors = (value if math.isfinite(value) else math.inf for value in values.tolist())
        self.amount = amount if amount < math.inf else None
        if errors:
            scores = self.scores.setdefault(gap < SAME_LEVEL, [])
            scores.insert(0, (gap, errors))
            del scores[MEMORY:]

    # What is told.

    def _done(self) -> list[str]:
        done = super()._done()
        if self.reused:
            done.append(f"{self.reused} of {self.evaluations} evaluations reused the guidance of those before")
        return done

    def _notes(self) -> list[str]:
        notes = []
        if self.reused:
            ways = ", ".join(f"{name} {count}" for name, count in self.ways.most_common())
            notes.append(f"reused by {ways}, error about {self.worst:.2g}")
        if self.ended_with is not None:
            notes.append(f"it ended where it still added {self.ended_with:.2g} (adaptive {self.config.adaptive:g})")
        return [*notes, *self._why_not_reused(), *self._why_not_ended(), *super()._notes()]

    def _why_guided(self) -> list[str]:
        return [*self._why_not_reused(), *self._why_not_ended(), *super()._why_guided()]

    def _why_not_reused(self) -> list[str]:
        if self.config.reuse_every == 1:
            return []
        if self.needing_negative:
            names = ", ".join(sorted(self.needing_negative))
            return [f"no guidance was reused, since {names} needs the negative evaluated each time"]
        if self.adapts_steps:
            return ["no guidance was reused, since this sampler chooses its own steps by what the model gives"]
        if self.over_budget:
            was = "was" if self.over_budget == 1 else "were"
            return [f"{self.over_budget} more {was} made in full, as reuse would have missed by too much"]
        if self.guided and not self.full:
            return ["no guidance was reused, since the positive prompt is not told apart in what is evaluated"]
        if not self.reused and self.guided:
            return [f"no guidance was reused, since the first {FIRST} guided evaluations are made in full in any case"]
        return []

    def _why_not_ended(self) -> list[str]:
        if not self.config.adaptive or self.ended_with is not None:
            return []
        if self.least is None:
            return ["what guidance adds was not measured"]
        return [f"it added at least {self.least:.2g}, which is not under adaptive ({self.config.adaptive:g})"]


def _growth(ratio: float, damping: float) -> float:
    """What an error grows by with the gap: wider, as the order says; narrower, as the lowest order's would."""
    return ratio**2 if damping and ratio > 1 else ratio
