"""What measured times say, and what they don't: summaries, and ratios with an interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

CONFIDENCE = 0.95
RESAMPLES = 1999


@dataclass(frozen=True)
class Summary:
    """Of one quantity's samples, in the unit of its samples."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Summary | None:
        """None where there are no samples."""
        if not samples:
            return None
        return cls(float(np.median(samples)), min(samples), max(samples))


@dataclass(frozen=True)
class Ratio:
    """How many times faster: the baseline's time over the variant's, with each step at its median over the rounds.

    Attributes:
        value: above 1 the variant is faster.
        low, high: of the 95 % interval; None with a single round, which says nothing about spread.
    """

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def is_difference(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.low is not None and self.high is not None and not self.low <= 1.0 <= self.high

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.2f}x (one round: no interval)"
        interval = f"{self.low:.2f} to {self.high:.2f}"
        if not self.is_difference:
            return f"no measurable difference ({interval})"
        if self.value >= 1.0:
            return f"{self.value:.2f}x faster ({interval})"
        return f"{1 / self.value:.2f}x slower ({1 / self.high:.2f} to {1 / self.low:.2f})"


def speedup(baseline_s: Sequence[Sequence[float]], variant_s: Sequence[Sequence[float]]) -> Ratio:
    """How many times faster a variant is, from interleaved runs, with a bootstrap 95 % interval.

    A run's time is taken apart into its steps, and each step counts with its median over the rounds:
    so a hiccup in one step of one round is no part of the ratio. Rounds are resampled whole, since
    what disturbs one round disturbs its steps and both of its runs. Of a handful of rounds,
    percentiles of the resampled ratio are far too narrow (three rounds of equal runs would show a
    difference in a fifth of all cases), so the bootstrap gives the standard error, of the logarithm,
    and Student's t with n - 1 degrees of freedom makes the interval of it: T. C. Hesterberg, "What Teachers
    Should Know About the Bootstrap", The American Statistician 69 (2015), on t intervals with
    bootstrap standard errors. The error is half the width of the middle 68 % of the resampled ratios,
    as of a normal distribution: their tails are those resamples that drew one disturbed round most often.

    Args:
        baseline_s, variant_s: (rounds, parts) seconds of the parts that make up each run; the same
            rounds in the same order, while the two may have different parts.
    """
    from scipy import stats

    baseline, variant = np.asarray(baseline_s, dtype=float), np.asarray(variant_s, dtype=float)
    rounds = len(baseline)

    def log_ratio(chosen: Any, axis: int = -1) -> Any:
        # (..., rounds) numbers of rounds -> (...): axis is always the last one.
        usual = [np.median(parts[chosen], axis=-2).sum(axis=-1) for parts in (baseline, variant)]
        return np.log(usual[0] / usual[1])

    every = np.arange(rounds)
    value = float(log_ratio(every))
    if rounds < 2:
        return Ratio(math.exp(value))
    resampled = stats.bootstrap(
        (every,), log_ratio, n_resamples=RESAMPLES, method="percentile", random_state=np.random.default_rng(0)
    ).bootstrap_distribution
    low, high = np.quantile(resampled, stats.norm.cdf([-1.0, 1.0]))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, rounds - 1) * (high - low) / 2)
    return Ratio(math.exp(value), math.exp(value - reach), math.exp(value + reach))


LEAST_ERROR = 1e-6
"""An error below this counts as one of it: rounding has no spread worth reckoning with."""


def next_error(errors: Sequence[float]) -> float | None:
    """What the error of one more picture stays under, in 95 of 100 cases, after those of a few pictures.

    Errors of pictures differ by factors, so their logarithms are taken as normal, and Student's t with n - 1 degrees
    of freedom bounds the next one: G. J. Hahn, "Statistical Intervals for a Normal Population", Journal of Quality
    Technology 2 (1970).

    Args:
        errors: one for each picture, 0 for equal ones.

    Returns:
        None for fewer than two pictures, which say nothing about spread.
    """
    if len(errors) < 2:
        return None
    from scipy import stats

    logs = np.log(np.maximum(np.asarray(errors, dtype=float), LEAST_ERROR))
    quantile = float(stats.t.ppf(CONFIDENCE, len(errors) - 1))
    return math.exp(float(logs.mean()) + quantile * float(logs.std(ddof=1)) * math.sqrt(1 + 1 / len(errors)))


def paired(logs: Sequence[float]) -> Ratio:
    """How many times faster, from pairs that ran next to each other.

    Args:
        logs: the logarithm of each pair's ratio, at least one. With Student's t for an interval; the value is the
            median, so that one disturbed pair moves it little.
    """
    value = float(np.median(logs))
    if len(logs) < 2:
        return Ratio(math.exp(value))
    from scipy import stats

    quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1))
    reach = quantile * float(np.std(logs, ddof=1)) / math.sqrt(len(logs))
    return Ratio(math.exp(value), math.exp(value - reach), math.exp(value + reach))
