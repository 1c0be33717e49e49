"""The last runs of each plan, for who asks after them: the Report node."""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from ..plan.plan import Entry, Plan
from ..plan.record import Record
from . import verdicts

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


_kept: OrderedDict[tuple[str | None, str, Plan], LastRun] = OrderedDict()
_lock = threading.Lock()


def keep(where: verdicts.Prompt, plan: Plan, record: Record, told: list[tuple[Entry, verdicts.Line]]) -> None:
    """Keep a run as the last one that its sampler made with its plan in its workflow."""
    lines = tuple((entry.config.title, line) for entry, line in told)
    with _lock:
        key = (where.workflow, where.sampler, plan)
        _kept[key] = LastRun(where.id, where.sampler, record.as_dict(), lines)
        _kept.move_to_end(key)
        while len(_kept) > KEPT:
            _kept.popitem(last=False)


def last_runs(where: verdicts.Prompt, plan: Plan) -> list[LastRun]:
    """This prompt's runs of a plan, one for each sampler, in the order they ended. If there are none, the last one of
    an earlier prompt: in this workflow, or else in any, since the host's cache, which knows no workflows,
    may answer for a sampler with what another one's run made."""
    with _lock:
        runs = [(workflow, run) for (workflow, _, other), run in _kept.items() if other == plan]
    of_this_prompt = [run for workflow, run in runs if (workflow, run.prompt_id) == (where.workflow, where.id)]
    of_this_workflow = [run for workflow, run in runs if workflow == where.workflow]
    return of_this_prompt or of_this_workflow[-1:] or [run for _, run in runs[-1:]]
