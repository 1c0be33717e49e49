"""A line now and then while something trains."""

from __future__ import annotations

import time

from torch import Tensor


class Progress:
    """Prints the running means of what it is told, ever less often.

    Attributes:
        name: What trains.
        steps: How many steps it will take.
    """

    def __init__(self, name: str, steps: int, lines: int = 40) -> None:
        self.name, self.steps = name, steps
        self._every = max(1, steps // lines)
        self._began = time.monotonic()
        self._values: dict[str, list[float]] = {}

    def __call__(self, step: int, **values: Tensor) -> None:
        for name, value in values.items():
            self._values.setdefault(name, []).append(float(value.detach()))
        if (step + 1) % self._every and step + 1 != self.steps:
            return
        means = "  ".join(f"{name} {sum(told) / len(told):.4f}" for name, told in self._values.items())
        elapsed = time.monotonic() - self._began
        left = elapsed / (step + 1) * (self.steps - step - 1)
        print(f"{self.name} {step + 1}/{self.steps}  {means}  {elapsed:.0f} s, {left:.0f} s left", flush=True)
        self._values.clear()
