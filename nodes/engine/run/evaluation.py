"""The evaluation that a run is in, which every point inside it reads."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Hashable

import torch

from ...methods.method import Evaluation, Steps
from ..plan.record import Record

OBSERVED = "a method looks at what layers are given in the first evaluation"
"""Why something did not run compiled."""


class Now:
    """Where a run stands.

    Args:
        steps: the run's.
        record: its counts, which the points share.

    Attributes:
        evaluation: the one that is being made, or was last; None before the first and after the run.
        latent: shape of the latent in it, (B, C, H, W).
        timestep: its noise level, as the host has it.
        occurrences: how often each condition came so far in it, in a call of the UNet.
        occurrences_of_conditions: how often, in a call of all that a guider asks for at once.
        lock: for the counts: the host samples on several GPUs in threads.
    """

    def __init__(self, steps: Steps, record: Record):
        self.record = record
        self.evaluation: Evaluation | None = None
        self.latent = torch.Size()
        self.timestep: torch.Tensor | None = None
        self.occurrences: dict[Hashable, int] = {}
        self.occurrences_of_conditions: Counter[Hashable] = Counter()
        self.lock = threading.Lock()
        self._steps = steps
        self._most = 0

    def begin_evaluation(self, latent: torch.Size, timestep: torch.Tensor, devices: int) -> Evaluation:
        """The sampler asks for a prediction of a latent at a noise level, which is read from the device here alone.

        Args:
            devices: on how many the host samples.
        """
        sigma = float(timestep.flatten()[0])
        step = self._steps.at(sigma, self.record.step)
        self.evaluation = Evaluation(step, sigma, devices=devices)
        self.latent = latent
        self.timestep = timestep
        self.occurrences.clear()
        self.occurrences_of_conditions.clear()
        self.record.evaluation(step)
        return self.evaluation

    def begin_again(self) -> Evaluation:
        """The same evaluation is made once more. What went through the network stays counted."""
        before = self.evaluation
        assert before is not None
        self.evaluation = Evaluation(before.step, before.sigma, is_again=True, devices=before.devices)
        self.occurrences.clear()
        self.occurrences_of_conditions.clear()
        return self.evaluation

    def end_evaluation(self) -> None:
        """The sampler gets its prediction."""
        assert self.evaluation is not None
        self._most = max(self._most, self.evaluation.predictions)
        self.record.full_predictions = self._most * self.record.evaluations
        self.record.reused += self.evaluation.is_cached

    @property
    def share(self) -> float:
        """By what share the step of this evaluation makes the latent the prediction."""
        assert self.evaluation is not None
        return self._steps.share_of(self.evaluation.step, self.evaluation.sigma)

    @property
    def compiles(self) -> bool:
        """Whether what is compiled may run: in an evaluation of which no method looks inside."""
        return self.evaluation is not None and not self.evaluation.is_observed

    def count_call(self, conditions: int, model: Hashable) -> None:
        """A batch of conditions goes through the network: through one of its copies, if it has several."""
        with self.lock:
            self.record.model_calls += 1
            self.record.predictions += conditions
            if self.evaluation is not None:
                self.evaluation.predictions += conditions
                self.evaluation.working.add(model)
