"""The last run of each plan, for who asks after it: the Report node."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from . import verdicts
from .plan import Entry, Plan
from .record import Record

KEPT = 100


@dataclass(frozen=True)
class LastRun:
    """A run that is over, as plain data.

    Attributes:
        prompt_id: of the prompt that it was part of.
        sampler: the node that sampled, such as ``KSampler 3``.
        record: its counts.
        told: each method's title and line.
    """

    prompt_id: str | None
    sampler: str
    record: dict[str, Any]
    told: tuple[tuple[str, verdicts.Line], ...]


_kept: OrderedDict[tuple[str | None, Plan], LastRun] = OrderedDict()
_lock = threading.Lock()


def keep(where: verdicts.Prompt, plan: Plan, record: Record, told: list[tuple[Entry, verdicts.Line]]) -> None:
    """Keep a run as the last one of its plan in its workflow."""
    lines = tuple((entry.config.title, line) for entry, line in told)
    with _lock:
        key = (where.workflow, plan)
        _kept[key] = LastRun(where.id, where.sampler, record.as_dict(), lines)
        _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def last_run(where: verdicts.Prompt, plan: Plan) -> LastRun | None:
    """The last run of a plan: in this workflow, or else in any, since the host's cache, which knows no
    workflows, may answer for a sampler with what another one's run made."""
    with _lock:
        anywhere = (run for (_, other), run in reversed(_kept.items()) if other == plan)
        return _kept.get((where.workflow, plan)) or next(anywhere, None)
