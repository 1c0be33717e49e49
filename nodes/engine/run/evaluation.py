"""The evaluation that a run is in, which every point inside it reads."""

from __future__ import annotations

import threading
from collections.abc import Hashable

import torch

from ...methods.method import Evaluation, Steps
from ..plan.record import Record


class Now:
    """Where a run stands.

    Args:
        steps: the run's.
        record: its counts, which the points share.

    Attributes:
        evaluation: the one that is being made, or was last; None before the first and after the run.
        latent: shape of the latent in it, (B, C, H, W).
        occurrences: how often each condition came so far in it.
        lock: for the counts: the host samples on several GPUs in threads.
    """

    def __init__(self, steps: Steps, record: Record):
        self.record = record
        self.evaluation: Evaluation | None = None
        self.latent = torch.Size()
        self.occurrences: dict[Hashable, int] = {}
        self.lock = threading.Lock()
        self._steps = steps

    def begin_evaluation(self, latent: torch.Size, sigma: float) -> Evaluation:
        """The sampler asks for a prediction of a latent at a noise level."""
        step = self._steps.at(sigma, self.record.step)
        self.evaluation = Evaluation(step, sigma)
        self.latent = latent
        self.occurrences.clear()
        self.record.evaluation(step)
        return self.evaluation

    def begin_again(self) -> Evaluation:
        """The same evaluation is made once more. What went through the network stays counted."""
        before = self.evaluation
        assert before is not None
        self.evaluation = Evaluation(before.step, before.sigma)
        self.occurrences.clear()
        return self.evaluation

    def count_call(self, conditions: int) -> None:
        """A batch of conditions goes through the network."""
        with self.lock:
            self.record.model_calls += 1
            self.record.predictions += conditions
            if self.evaluation is not None:
                self.evaluation.predictions += conditions
