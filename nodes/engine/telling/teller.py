"""Tells of one sampling run: live on its nodes, and when it is over in the log, the last runs and images' metadata."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from ...methods.method import MethodRun, State
from ..plan.plan import Entry, Node, Plan
from ..plan.record import Record
from . import history, metadata, verdicts

logger = logging.getLogger(__name__)

AUDIENCE = "slipstream.audience"
"""The attachment of a model that one node samples several times, or among several."""

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Audience:
    """Who is told of a model's runs, where one node makes many.

    Attributes:
        hear: called when a run ends, with each entry of the plan and its line. None: it is kept as any sampler's.
        name: what these runs are, on the nodes that take part: ``candidate``. None: they are not told there.
        number: that of all these runs: the line of a later one takes the place of the one before.
    """

    hear: Callable[[list[tuple[Entry, verdicts.Line]]], None] | None
    name: str | None
    number: int = field(default_factory=lambda: next(_numbers))


class LeftOut(MethodRun):
    """In the place of a method that a node suggests, where it cannot serve the model as it is in this run."""

    def __init__(self, why: str):
        self.why = why

    def verdict(self) -> tuple[State, str]:
        return "inert", f"left out: {self.why}"


class Teller:
    """What is told of one run.

    Args:
        plan: that of its model.
        record: its counts.
        audience: who is told in the place of the nodes and the last runs.
    """

    def __init__(self, plan: Plan, record: Record, audience: Audience | None):
        self._plan = plan
        self._record = record
        self._audience = audience
        self._number = next(_numbers) if audience is None else audience.number
        self._where = verdicts.current_prompt()
        if audience is not None:
            self._where = replace(self._where, part=audience.name or "")

    def lines(self, methods: Sequence[MethodRun]) -> list[verdicts.Line]:
        """One line for each entry of the plan, as things stand; also before its method could begin."""
        told = [method.verdict() for method in methods]
        told += [("inert", "")] * (len(self._plan.entries) - len(told))
        return [verdicts.line(self._record, state, text) for state, text in told]

    def compiling(self, methods: Sequence[MethodRun], graphs: int, seconds: float) -> None:
        """Tell that something is being compiled, on the node that asked for it."""
        self.publish(methods, {"compile": verdicts.compiling(graphs, seconds)})

    def publish(self, methods: Sequence[MethodRun], instead: Mapping[str, verdicts.Line] | None = None) -> None:
        """Tell every node its line, or the methods of some phases another one alone."""
        if self._audience is not None and self._audience.name is None:
            return
        told: dict[Node, dict[verdicts.Key, verdicts.Line]] = {}
        for entry, line in zip(self._plan.entries, self.lines(methods), strict=True):
            if instead is not None:
                if entry.config.phase not in instead:
                    continue
                line = instead[entry.config.phase]
            others = line if entry.suggested else verdicts.Line("inert", f"as {entry} sets it")
            lines = [(node, line) for node in entry.nodes]
            lines += [(node, others) for other in entry.others for node in other.nodes]
            for node, line in lines:
                named = replace(line, text=f"{entry.config.title}: {line.text}") if node.has_several else line
                told.setdefault(node, {})[self._number, entry.config.stem] = named
        # One number for each step is for the Report, and too much for each message.
        record = {name: value for name, value in self._record.as_dict().items() if name != "step_s"}
        is_own = self._audience is None or self._audience.hear is None
        is_over = is_own and self._record.status != "running"
        for node, lines_of_it in told.items():
            verdicts.publish_lines(self._where, node, lines_of_it, record, is_over)

    def end(self, methods: Sequence[MethodRun], error: BaseException | None) -> None:
        """The run is over, and its record closed."""
        self.publish(methods)
        told = list(zip(self._plan.entries, self.lines(methods), strict=True))
        logger.info("Slipstream: %s", "; ".join(f"{entry.config.title}: {line.text}" for entry, line in told))
        audience = self._audience
        if audience is None or audience.hear is None:
            history.keep(self._where, self._plan, self._record, told)
        else:
            audience.hear(told)
        if error is not None:
            metadata.forget(self._where)
        elif audience is None or audience.name is not None:
            lines = [{**entry.as_dict(), **asdict(line)} for entry, line in told]
            metadata.keep(self._where, self._plan, self._record.steps, lines)
