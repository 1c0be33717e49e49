"""CFG Cutoff: no classifier-free guidance after a fraction of the run.

Guidance matters while the image takes shape and hardly afterwards; without it each evaluation
needs the positive prediction alone, half the work.

Source: "Applying guidance in a limited interval improves sample and distribution quality"
(Kynkaanniemi et al., 2024, arXiv:2404.07724); diffusers' `callback_on_step_end` recipe for a
dynamic guidance scale, whose step rule, `int(cutoff * steps)`, this one is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .method import (
    Configuration,
    Evaluation,
    Guidance,
    MethodRun,
    Model,
    Run,
    State,
    check_choice,
    check_number,
)

UNITS = ("steps", "timesteps")


@dataclass(frozen=True)
class CFGCutoff(Configuration):
    """Attributes:
    cutoff: fraction of the run after which only the positive is evaluated, 0.0 to 1.0; 1.0 is off.
    unit: ``steps``: from step ``int(cutoff * steps)`` of this run on, but not from its first unless
        cutoff is 0; ``timesteps``: from that
        fraction of the training timesteps on, so that an image-to-image run, which begins late,
        is cut off at the same noise level as a full one.
    """

    cutoff: float = 0.75
    unit: str = "steps"

    stem = "cfg_cutoff"
    title = "CFG Cutoff"
    phase = "evaluate"
    is_exact = False

    def __post_init__(self) -> None:
        check_number(self.title, "cutoff", self.cutoff, 0.0, 1.0)
        check_choice(self.title, "unit", self.unit, UNITS)

    def off(self) -> str | None:
        return "cutoff is 1.0, the whole run is guided" if self.cutoff == 1.0 else None

    def check(self, model: Model) -> None:
        """Any model can be sampled without guidance."""

    def begin(self, run: Run) -> CFGCutoffRun:
        return CFGCutoffRun(self, run)


class CFGCutoffRun(MethodRun):
    """Evaluates the positive alone past the cutoff and counts what that saved."""

    def __init__(self, config: CFGCutoff, run: Run):
        self.config = config
        self.steps = run.steps
        # A node that samples step by step (Impact Pack's regional sampler) would have no guidance at all.
        self.first_step = max(int(config.cutoff > 0), int(config.cutoff * len(run.steps)))
        self.sigma = run.percent_to_sigma(config.cutoff) if config.unit == "timesteps" else None
        self.evaluations = 0
        self.is_guided = False
        self.left_out: set[str] = set()
        self.alone = 0
        self.began_at: int | None = None
        self.foretold = 0
        self.predictions = 0
        self.saved = 0
        self.still_evaluated = 0
        self.guided_predictions: int | None = None

    def is_past(self, evaluation: Evaluation) -> bool:
        if self.sigma is None:
            return evaluation.step >= self.first_step
        return evaluation.sigma <= self.sigma

    def predict_noise(self, evaluation: Evaluation, guidance: Guidance) -> Tensor:
        self.evaluations += not evaluation.is_again
        is_guided = guidance.is_guided
        self.is_guided |= is_guided
        is_alone = is_guided and self.is_past(evaluation)
        denoised = guidance.positive_alone() if is_alone else guidance.guided()
        self.left_out.update(guidance.left_out)
        if evaluation.is_forecast:
            # Nothing was evaluated, with guidance or without: Forecast tells of it.
            self.foretold += is_alone
            self.evaluations -= 1
            return denoised
        if not is_alone:
            if is_guided:
                self.guided_predictions = evaluation.predictions
        elif not evaluation.is_again:
            self.alone += 1
            if self.began_at is None:
                self.began_at = evaluation.step
            # A guided evaluation of this very run says what one takes, with every patch on the
            # model that evaluates more; without one, the guider's prompts do.
            would_be = self.guided_predictions or guidance.conditions
            self.saved += max(0, would_be - evaluation.predictions)
            self.still_evaluated = max(self.still_evaluated, evaluation.predictions)
        self.predictions += evaluation.predictions
        return denoised

    def verdict(self) -> tuple[State, str]:
        if not self.alone:
            return "inert", f"saved nothing: {self._why_inert()}"
        if not self.saved:
            return "inert", (
                f"saved nothing: {self.alone} of {self.evaluations} evaluations ran on the positive alone, "
                "but other nodes on this model evaluated as much again"
            )
        text = (
            f"no guidance from step {self.began_at} of {len(self.steps)}: {self.alone} of {self.evaluations} "
            f"evaluations ran on the positive alone, {self.predictions} of {self.predictions + self.saved} "
            "predictions evaluated"
        )
        if self.still_evaluated > 1:
            text += (
                f"; up to {self.still_evaluated} predictions an evaluation remained "
                "(regional prompts, or a node such as PAG that evaluates more by itself)"
            )
        if self.foretold:
            text += f"; {self.foretold} more were skipped by Forecast"
        if self.left_out:
            text += f"; left out with the guidance: {', '.join(sorted(self.left_out))}"
        return "active", text

    def _why_inert(self) -> str:
        if not self.evaluations:
            return "the model was not evaluated"
        if not self.is_guided:
            return "this run is not guided anyway (cfg 1.0, or a guider without a negative prompt)"
        if self.foretold:
            return "Forecast skipped every evaluation past the cutoff"
        by_steps = f"step {self.first_step} of {len(self.steps)}"
        where = by_steps if self.sigma is None else f"{self.config.cutoff:.0%} of the timesteps"
        return f"the cutoff, at {where}, was not reached"
