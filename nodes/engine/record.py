"""The record of one sampling run: who ran, what was counted, how it ended. Plain data once it ended."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["running", "finished", "failed", "interrupted"]


@dataclass
class Record:
    """Counts of one run.

    Attributes:
        steps: steps that the sampler was given.
        evaluations: times the sampler asked the guider for a prediction.
        predictions: conditions that went through the network; one in a batch of two counts two.
        model_calls: batches that went through the network.
        status: how it ended.
        reason: what ended it, if it failed.
        step: the step of the last evaluation.
        elapsed_s: wall time from begin to end, loading of the model included.
    """

    steps: int
    evaluations: int = 0
    predictions: int = 0
    model_calls: int = 0
    status: Status = "running"
    reason: str = ""
    step: int = 0
    elapsed_s: float = 0.0
    _began: float = field(default_factory=time.perf_counter, repr=False)

    def end(self, error: BaseException | None) -> None:
        """Close the record. An interrupt is told from a failure by the class's name, as the host
        derives it from Exception or from BaseException, depending on its version."""
        self.elapsed_s = time.perf_counter() - self._began
        if error is None:
            self.status = "finished"
        elif type(error).__name__ == "InterruptProcessingException":
            self.status = "interrupted"
        else:
            self.status = "failed"
            self.reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}
