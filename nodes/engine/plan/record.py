"""The record of one sampling run: who ran, what was counted, how it ended. Plain data once it ended."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

Status = Literal["running", "finished", "failed", "interrupted"]


def outcome(error: BaseException | None) -> tuple[Status, str]:
    """How a run ended, and why if it failed. An interrupt is told from a failure by the class's name, as
    the host derives it from Exception or from BaseException, depending on its version."""
    if error is None:
        return "finished", ""
    if type(error).__name__ == "InterruptProcessingException":
        return "interrupted", ""
    return "failed", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


class StepClock:
    """When the steps of a run began, in the order they ran.

    A step lasts from the beginning of its first evaluation to that of the next step's, or to the
    end; evaluations belong to steps as in `methods.method.Steps`.
    """

    def __init__(self) -> None:
        self.step = 0
        self._stamps: list[float] = []

    def evaluation(self, step: int, now: Callable[[], float]) -> None:
        """An evaluation of a step begins. The clock is read only if the step is another one."""
        if step != self.step or not self._stamps:
            self._stamps.append(now())
        self.step = step

    def end(self, now: float) -> None:
        """The last step is over."""
        if self._stamps:
            self._stamps.append(now)

    @property
    def step_s(self) -> tuple[float, ...]:
        """Seconds of each step that is over."""
        return tuple(after - before for before, after in pairwise(self._stamps))


@dataclass
class Record:
    """Counts of one run.

    Attributes:
        steps: steps that the sampler was given.
        evaluations: times the sampler asked the guider for a prediction.
        predictions: conditions that went through the network; one in a batch of two counts two.
        model_calls: batches that went through the network.
        full_predictions: what `predictions` would be if each evaluation had made as many as the one that made the most.
        reused: evaluations in which part of the network was left out for what was kept.
        status: how it ended.
        reason: what ended it, if it failed.
        step: the step of the last evaluation.
        elapsed_s: wall time from begin to end, loading of the model included.
        step_s: wall time of each step, in the order they ran.
    """

    steps: int
    evaluations: int = 0
    predictions: int = 0
    model_calls: int = 0
    full_predictions: int = 0
    reused: int = 0
    status: Status = "running"
    reason: str = ""
    step: int = 0
    elapsed_s: float = 0.0
    step_s: tuple[float, ...] = ()
    _clock: StepClock = field(default_factory=StepClock, repr=False)
    _began: float = field(default_factory=time.perf_counter, repr=False)

    def evaluation(self, step: int) -> None:
        """The sampler asks for a prediction."""
        self._clock.evaluation(step, time.perf_counter)
        self.step = step
        self.evaluations += 1

    def end(self, error: BaseException | None) -> None:
        """Close the record."""
        now = time.perf_counter()
        self.elapsed_s = now - self._began
        if error is None:  # else the last step is not over
            self._clock.end(now)
        self.step_s = self._clock.step_s
        self.status, self.reason = outcome(error)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
