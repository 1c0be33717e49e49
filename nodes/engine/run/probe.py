"""Watches the runs of a model that is being measured, with a plan or without one, and counts by itself.

The engine's own record would not do: a model without a plan has none, and what is measured must not
be what measures.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP

from ...methods.method import Steps
from ..host.machine import clock
from ..plan.record import StepClock
from ..telling.teller import AUDIENCE, Audience

KEY = "slipstream.probe"


def compiled() -> tuple[int, float]:
    """Graphs that torch.compile made in this process so far, and the seconds that took."""
    # Not imported where nobody compiles: that takes seconds.
    dynamo: Any = sys.modules.get("torch._dynamo.utils")
    if dynamo is None:
        return 0, 0.0
    return dynamo.counters["stats"]["unique_graphs"], dynamo.calculate_time_spent().get("total_wall_time", 0.0)


class Probe:
    """One run's counts; a new one for each run.

    Attributes:
        loading_s: seconds that the host took to bring weights to the device.
        evaluations, predictions, rows: see `measuring.report.Measured`.
    """

    def __init__(self, device: torch.device):
        self.loading_s = 0.0
        self.evaluations = 0
        self.predictions = 0
        self.rows = 0
        self._device = device
        self._steps = Steps(())
        self._clock = StepClock()
        # The host samples on several GPUs in threads, which share the counts.
        self._lock = threading.Lock()

    @property
    def step_s(self) -> tuple[float, ...]:
        """Seconds of each step, in the order they ran."""
        return self._clock.step_s

    def on(self, patcher: Any, audience: Audience) -> Any:
        """A clone of a model that this probe watches."""
        clone = patcher.clone()
        clone.set_attachments(AUDIENCE, audience)
        # Added last, they stand innermost: what loading takes is the host's own share, and the engine has begun.
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self._outer_sample)
        clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, self._prepare_sampling)
        return clone

    def _outer_sample(self, executor: Any, noise: Any, latent_image: Any, sampler: Any, sigmas: Any, *args, **kwargs):
        self._steps = Steps(tuple(sigmas.tolist()))
        wrappers = executor.class_obj.model_options["transformer_options"].setdefault("wrappers", {})
        # The sampler's questions are counted outermost, and innermost what goes through the network.
        for kind, wrapper in (
            (WrappersMP.SAMPLER_SAMPLE, self._sampler_sample),
            (WrappersMP.PREDICT_NOISE, self._predict_noise),
        ):
            wrappers[kind] = {KEY: [wrapper], **wrappers.get(kind, {})}
        wrappers.setdefault(WrappersMP.APPLY_MODEL, {})[KEY] = [self._apply_model]
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _prepare_sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        began = clock(self._device)
        prepared = executor(*args, **kwargs)
        self.loading_s += clock(self._device) - began
        return prepared

    def _sampler_sample(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        samples = executor(*args, **kwargs)
        self._clock.end(clock(self._device))
        return samples

    def _predict_noise(self, executor: Any, x: Any, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        step = self._steps.at(float(timestep.flatten()[0]), self._clock.step)
        self._clock.evaluation(step, lambda: clock(self._device))
        self.evaluations += 1
        return executor(x, timestep, *args, **kwargs)

    def _apply_model(self, executor: Any, x: Any, t: Any, c_concat: Any = None, c_crossattn: Any = None,
                     control: Any = None, transformer_options: Any = None, **kwargs: Any) -> Any:  # fmt: skip
        options = {} if transformer_options is None else transformer_options
        with self._lock:
            self.predictions += len(options.get("cond_or_uncond", (0,)))
            self.rows += x.shape[0]
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
