"""Few lines for many runs: what a node is told in one prompt, however often it takes part in it.

Some nodes sample hundreds of times in a prompt: tile by tile, region by region, in a loop. Equal lines become one that
says how often; of differing ones some are shown and the others counted. The worst is never among those only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ...methods.method import State

LineState = State | Literal["running", "off", "failed", "interrupted"]

HANDFUL = 5
"""Differing lines of one method that a node shows."""
MOST = 24
"""Lines that a node shows in all."""
STORED = 50
"""Differing lines that are remembered, beside those that may yet change."""
WORST_FIRST: tuple[LineState, ...] = ("running", "failed", "interrupted", "inert", "off", "active")
NAMES = {"inert": "without effect"}
"""What to call a state that has no name of its own in a sentence."""


class Told(NamedTuple):
    """One line of a node.

    Attributes:
        stem: the method that it is of.
        sampler: the node that sampled; empty if these were several.
        state: its colour and symbol.
        text: what it says.
    """

    stem: str
    sampler: str
    state: LineState
    text: str

    def as_dict(self, times: int) -> dict[str, Any]:
        """As it is sent, with how many runs it is the line of."""
        return {"sampler": self.sampler, "state": self.state, "text": self.text, "times": times}


@dataclass(frozen=True)
class Folded:
    """Lines, each with how often it was told, in the order of their first time; and how many others of each state."""

    lines: Mapping[Told, int] = field(default_factory=dict)
    others: Counter[LineState] = field(default_factory=Counter)

    def shown(self, newer: Iterable[Told]) -> list[dict[str, Any]]:
        """What a node shows of these and newer ones, as it is sent."""
        folded = self.plus(newer, HANDFUL, MOST)
        return [line.as_dict(times) for line, times in folded.lines.items()] + folded._summary()

    def plus(self, newer: Iterable[Told], handful: int = STORED, most: int = STORED) -> Folded:
        """These and newer ones, folded anew.

        Args:
            handful: how many may be of one method.
            most: how many in all.
        """
        lines = dict(self.lines)
        for line in newer:
            lines[line] = lines.get(line, 0) + 1
        lines = _across_samplers(lines, handful)
        chosen = _chosen(lines, handful, most)
        # A summary of one takes as much room as that one.
        if len(chosen) == len(lines) or (len(chosen) == len(lines) - 1 and not self.others):
            return Folded(lines, self.others)
        others = Counter(self.others)
        for line, times in lines.items():
            if line not in chosen:
                others[line.state] += times
        return Folded({line: times for line, times in lines.items() if line in chosen}, others)

    def _summary(self) -> list[dict[str, Any]]:
        if not self.others:
            return []
        states = [state for state in WORST_FIRST if self.others[state]]
        counts = ", ".join(f"{self.others[state]} {NAMES.get(state, state)}" for state in states)
        text = f"and {self.others.total()} more, which differ: {counts}"
        return [Told("", "", states[0], text).as_dict(1)]


def _across_samplers(lines: dict[Told, int], handful: int) -> dict[Told, int]:
    """The lines, of methods that have too many, or had once: what several samplers got alike is one, of no sampler."""
    count = Counter(line.stem for line in lines)
    several = {line.stem for line in lines if count[line.stem] > handful or not line.sampler}
    if not several:
        return lines
    samplers = Counter((line.stem, line.state, line.text) for line in lines)
    merged: dict[Told, int] = {}
    for line, times in lines.items():
        if line.stem in several and samplers[line.stem, line.state, line.text] > 1:
            line = line._replace(sampler="")
        merged[line] = merged.get(line, 0) + times
    return merged


def _chosen(lines: dict[Told, int], handful: int, most: int) -> set[Told]:
    """The lines to keep: the newest of each method in each state, then the worst, of these the newest."""
    newer: Counter[tuple[str, LineState]] = Counter()
    ranked = []
    for line in reversed(lines):
        rank = newer[line.stem, line.state]
        newer[line.stem, line.state] += 1
        ranked.append(((rank > 0, WORST_FIRST.index(line.state), rank), line))
    chosen: set[Told] = set()
    taken: Counter[str] = Counter()
    for _, line in sorted(ranked, key=lambda pair: pair[0]):
        if taken[line.stem] < handful and len(chosen) < most:
            taken[line.stem] += 1
            chosen.add(line)
    return chosen
