"""DeepCache: reuse the UNet's deep features between steps.

Deep features change slowly from step to step. On a full step the UNet runs whole and the features
that enter one output block are kept; on the steps in between only the input blocks above that
point and the output blocks below it run, on the kept features.

Source: "DeepCache: Accelerating Diffusion Models for Free" (Ma, Fang, Wang, 2023,
arXiv:2312.00858), with its two schedules: 1:N uniform, and non-uniform 1:N (section 3.3).
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

from .method import (
    Configuration,
    Evaluation,
    MethodRun,
    Model,
    Run,
    State,
    UNetCall,
    check_choice,
    check_number,
    check_only_cache,
    check_range,
    check_unet,
)

SCHEDULES = ("uniform", "quadratic")
MAX_INTERVAL = 100
MAX_BRANCH = 11
"""The deepest skip connection of any model served: SD 1.x, SD 2.x and the refiner have twelve."""

# The paper's non-uniform schedule for Stable Diffusion: densest at 15 of 50 steps, power 1.4.
CENTER = 0.3
POWER = 1.4


@dataclass(frozen=True)
class DeepCache(Configuration):
    """Attributes:
    cache_interval: one step in this many is a full one, 1 to 100; 1 is off.
    cache_branch_id: the skip connection at which the cached features join, 0 the outermost and
        cheapest, up to the model's depth - 1.
    schedule: ``uniform``: every cache_interval-th step is full; ``quadratic``: as many full
        steps, densest at 30 % of the run, where features change fastest.
    start_percent: fraction of the training timesteps before which every step is full.
    end_percent: fraction after which every step is full.
    """

    cache_interval: int = 3
    cache_branch_id: int = 0
    schedule: str = "uniform"
    start_percent: float = 0.0
    end_percent: float = 1.0

    stem = "deepcache"
    title = "DeepCache"
    phase = "evaluate"
    is_exact = False

    def __post_init__(self) -> None:
        check_number(self.title, "cache_interval", self.cache_interval, 1, MAX_INTERVAL)
        check_number(self.title, "cache_branch_id", self.cache_branch_id, 0, MAX_BRANCH)
        check_choice(self.title, "schedule", self.schedule, SCHEDULES)
        check_range(self.title, self.start_percent, self.end_percent)

    def off(self) -> str | None:
        if self.cache_interval == 1:
            return "cache_interval is 1, every step is a full one"
        if self.start_percent == self.end_percent:
            return "start_percent equals end_percent"
        return None

    def check(self, model: Model) -> None:
        check_unet(self.title, model, "Use Forecast (Slipstream), which skips evaluations of any model.")
        if self.cache_branch_id >= model.depth:
            raise ValueError(
                f"{self.title}: cache_branch_id must be from 0 to {model.depth - 1} on {model.name}, which has "
                f"{model.depth} skip connections, but is {self.cache_branch_id}. Lower it; 0 is the fastest."
            )
        check_only_cache(self.title, model)
        if model.compiler:
            raise RuntimeError(
                f"{self.title}: {model.compiler} on this model compiles the UNet as a whole and takes the graph of a "
                "full step for a cached one. Remove or bypass one of them."
            )

    def begin(self, run: Run) -> DeepCacheRun:
        return DeepCacheRun(self, run)


def full_steps(steps: int, interval: int, schedule: str) -> list[int]:
    """Which of `steps` steps run the whole UNet: ascending, distinct, the first always 0.

    Both schedules have ceil(steps / interval) of them. ``quadratic`` is the paper's non-uniform
    one: the integers of ``sign(u) * |u|**p + c`` for equally spaced u, so that neighbours lie
    closest at c.
    """
    if schedule == "uniform":
        return list(range(0, steps, interval))
    count, center = ceil(steps / interval), CENTER * steps
    low, high = -(center ** (1 / POWER)), (steps - center) ** (1 / POWER)
    chosen: list[int] = []
    for i in range(count):
        u = low + (high - low) * i / count
        at = int(center + (abs(u) ** POWER if u > 0 else -(abs(u) ** POWER)))
        # Where the curve is flat two of them round to one step; the next free one takes its place.
        after = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(at, after), steps - count + i) if i else 0)
    return chosen


class DeepCacheRun(MethodRun):
    """Keeps deep features per condition and decides, step by step, between full and partial."""

    def __init__(self, config: DeepCache, run: Run):
        self.config = config
        self.branch = config.cache_branch_id
        self.blocks = run.model.blocks
        self.steps = len(run.steps)
        in_range = run.sigma_range(config.start_percent, config.end_percent)
        self.range = [i for i, sigma in enumerate(run.steps.sigmas[:-1]) if in_range(sigma)]
        relative = full_steps(len(self.range), config.cache_interval, config.schedule)
        self.full_steps = [self.range[i] for i in relative]
        self.features: dict[Hashable, tuple[int, Tensor]] = {}
        self.calls: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        self.misses = 0
        # The host samples on several GPUs in threads; each has keys of its own, counts are shared.
        self.lock = threading.Lock()

    def source_of(self, step: int) -> int | None:
        """The full step whose features `step` uses; itself if it is one; None outside the range."""
        if not self.range or not self.range[0] <= step <= self.range[-1]:
            return None
        return self.full_steps[bisect_right(self.full_steps, step) - 1]

    def unet(self, evaluation: Evaluation, call: UNetCall) -> Tensor:
        step = evaluation.step
        source = self.source_of(step)
        deep = None if source is None or source == step else self._fresh(call.keys, source, step)
        with self.lock:
            self.calls[step][deep is not None] += 1
            self.misses += deep is None and source not in (None, step)
            # What is older than the full step in force can't be used any more, here or in a later step.
            outdated = [key for key, (kept, _) in self.features.items() if source is None or kept < source]
            for key in outdated:
                del self.features[key]
        if deep is not None:
            evaluation.is_cached = True
            return call.partial(self.branch, deep)
        if source is None or not call.keys:
            return call.full()[0]
        output, captured = call.full(self.branch)
        if captured is not None:
            with self.lock:
                for key, features in zip(call.keys, captured.chunk(len(call.keys)), strict=True):
                    self.features[key] = (step, features)
        return output

    def _fresh(self, keys: tuple[Hashable, ...], source: int, step: int) -> Tensor | None:
        """The features of a batch, joined, if each condition has some that are recent enough.

        None where one has not: a condition that begins here, a sampler that jumped past the full
        step, or back to before it. The step is then a full one for this batch.
        """
        entries = [self.features.get(key) for key in keys]
        if not entries or any(entry is None or not source <= entry[0] <= step for entry in entries):
            return None
        return torch.cat([entry[1] for entry in entries if entry is not None])

    def verdict(self) -> tuple[State, str]:
        reused = sum(1 for full, partial in self.calls.values() if partial and not full)
        partial = sum(counts[1] for counts in self.calls.values())
        calls = sum(sum(counts) for counts in self.calls.values())
        if not partial:
            return "inert", f"reused nothing: {self._why_inert()}"
        return "active", (
            f"reused the deep features in {reused} of {self.steps} steps: "
            f"{partial} of {calls} UNet calls ran {2 * (self.branch + 1)} of {self.blocks} blocks"
        )

    def _why_inert(self) -> str:
        if not self.calls:
            return "the UNet was not called"
        if len(self.range) < 2:
            c = self.config
            return (
                f"{len(self.range)} of this run's steps lie between start_percent {c.start_percent:g} and "
                f"end_percent {c.end_percent:g}, and the first of them is always a full one"
            )
        if self.misses:
            return (
                f"in {self.misses} calls the model was given other conditions, windows or tiles than in the full step "
                "before, or ones that cannot be told apart"
            )
        return f"all {len(self.calls)} steps that ran were full ones"
