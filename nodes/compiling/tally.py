"""What compiling did during one run, counted, and told as a sentence."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

EQUAL = 0.05
"""Two speeds that differ by less are told as equal: a few calls can't tell more."""


@dataclass
class Tally:
    """Counts of one run.

    Attributes:
        backend: what compiled.
        unit: what is called: ``UNet call``, ``decode``.
        units: how many blocks, or models, are compiled of all that there are.
        calls: calls that ran compiled, whole or in blocks.
        graphs: graphs that the compiled functions have by now, from earlier runs too.
        new_graphs: graphs made in this run.
        compile_s: seconds of the calls that compiled.
        cached: graphs of this run that inductor found in its disk cache.
        recompiled: what changed when more graphs had to be made, and how many.
        breaks: why graphs broke, and how often.
        outside: operations that the backend left to torch.
        eager: why something ran without its graph, and how often.
        notes: what else to say, once.
        ratio: how many times as fast calls are as without graphs, if this run could tell.
        timed: what it was told by, where that is no call: ``block``.
    """

    backend: str
    unit: str
    units: str = ""
    calls: int = 0
    graphs: int = 0
    new_graphs: int = 0
    compile_s: float = 0.0
    cached: int = 0
    recompiled: Counter[str] = field(default_factory=Counter)
    breaks: Counter[str] = field(default_factory=Counter)
    outside: Counter[str] = field(default_factory=Counter)
    eager: Counter[str] = field(default_factory=Counter)
    notes: dict[str, None] = field(default_factory=dict)
    ratio: float | None = None
    timed: str = ""

    @property
    def is_active(self) -> bool:
        return self.calls > 0

    def sentence(self) -> str:
        """The verdict."""
        why = [*([eager] if (eager := self._eager()) else []), *self.notes]
        if not self.calls:
            return f"compiled nothing: {'; '.join(why) or f'there was no {self.unit}'}"
        parts = [f"{self.backend}: {self.units} in {count(self.graphs, 'graph')}"]
        if self.new_graphs:
            cached = f", {self.cached} from the disk cache" if self.cached else ""
            these = "" if self.new_graphs == self.graphs else f"{self.new_graphs} of them new, "
            parts[0] += f", {these}compiled in {self.compile_s:.0f} s{cached}"
        else:
            parts[0] += ", compiled earlier"
        parts += [f"recompiled {count(n, 'graph')}: {what}" for what, n in self.recompiled.items()]
        if self.ratio is not None:
            if abs(self.ratio - 1) < EQUAL:
                speed = "as fast as without"
            elif self.ratio > 1:
                speed = f"{self.ratio:.2f}x as fast as without"
            else:
                speed = f"slow, {1 / self.ratio:.2f} times as long as without"
            parts.append(f"each {self.timed or self.unit} {speed}")
        parts += [f"{count(n, 'graph break')}: {why}" for why, n in self.breaks.items()]
        if self.outside:
            parts.append("left to torch: " + ", ".join(f"{n} x {name}" for name, n in self.outside.items()))
        return "; ".join([*parts, *why])

    def _eager(self) -> str:
        return "; ".join(f"{why} ({n} times)" if n > 1 else why for why, n in self.eager.items())


def count(number: int, noun: str) -> str:
    """``1 graph``, ``2 graphs``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
