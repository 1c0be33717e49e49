"""What a user could do without this pack: fewer steps, and core's EasyCache, with as much work as what is measured."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP

KEY = "slipstream.rival"
WINDOW = {"start_percent": 0.15, "end_percent": 0.95}
"""EasyCache's own defaults."""

FIRST, LEAST, MOST = 0.2, 0.005, 3.0
"""EasyCache's threshold: its default, the least that is tried, and the most that its node takes."""

TRIES = 6


def fewer_steps(steps: int, share: float) -> int:
    """The fewest steps that are no less work than a share of all of them."""
    return max(1, math.ceil(steps * share - 1e-9))


class EasyCache:
    """A model with core's EasyCache on it, and a count of what reaches the network behind it.

    Args:
        model: ModelPatcher, which stays as it is.
        threshold: its `reuse_threshold`.

    Attributes:
        model: the one to sample with.
        rows: that reached the network since they were last taken.

    Raises:
        ImportError: this ComfyUI has none.
    """

    def __init__(self, model: Any, threshold: float):
        node = importlib.import_module("comfy_extras.nodes_easycache").EasyCacheNode
        self.rows = 0
        self.model = node.execute(model, reuse_threshold=threshold, verbose=False, **WINDOW).result[0]
        # Added last, it stands innermost: EasyCache answers without it.
        self.model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, KEY, self._reached)

    def _reached(self, executor: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        self.rows += (x[0] if isinstance(x, list | tuple) else x).shape[0]
        return executor(x, *args, **kwargs)

    def take(self) -> int:
        """The rows since the last time, and begin anew."""
        rows, self.rows = self.rows, 0
        return rows


def matched(rows_at: Callable[[float], float], wanted: float) -> tuple[float, float, int]:
    """The threshold with which about as many rows reach the network as are wanted: of those that were tried, the one
    that comes nearest, and of equals the lowest.

    Args:
        rows_at: makes one run; the higher the threshold, the fewer rows.

    Returns:
        Threshold, its rows, and how many runs it took.
    """
    low, high, threshold = LEAST, MOST, FIRST
    tried: dict[float, float] = {}
    while len(tried) < TRIES and threshold not in tried:
        rows = tried[threshold] = rows_at(threshold)
        if rows == wanted:
            break
        low, high = (threshold, high) if rows > wanted else (low, threshold)
        threshold = round(math.sqrt(low * high), 4)
    best = min(tried, key=lambda one: (abs(tried[one] - wanted), one))
    return best, tried[best], len(tried)
