"""Puts a plan, or one more part of it, on a MODEL: what nodes do, and what needs no node and no server."""

from __future__ import annotations

from typing import Any

from .host import machine
from .plan import models
from .plan.plan import Entry, Plan, plan_of
from .run.sampling import with_plan


def apply(plan: Plan, patcher: Any, suggested: bool = False) -> Any:
    """A MODEL with a plan on it, merged into the one that it has as nodes merge theirs. The model that came in is not
    touched; where no method of the plan does anything by its settings, it is what comes out.

    Args:
        plan: the methods. Which nodes asked for them, and whether as suggestions, does not come along.
        patcher: ModelPatcher.
        suggested: a node that sets one of the methods wins, and a method that can't serve the model is left out: each
            run tells so. Without it that is an error.

    Raises:
        ValueError: settings do not fit the model, or its plan has the method with other ones.
        RuntimeError: the model cannot be served.
    """
    entries = [Entry(entry.config, (), suggested) for entry in plan.entries if entry.config.off() is None]
    return with_entries(patcher, entries) if entries else patcher


def with_entries(model: Any, entries: list[Entry]) -> Any:
    """A MODEL with more entries in its plan; see `apply`."""
    plan = plan_of(model)
    for entry in entries:
        plan = plan.adding(entry)
        try:
            entry.config.check(models.describe(model, model.model_options))
            if entry.config.phase == "compile":
                model = machine.without_dynamic_vram(model, entry.config.title)
        except (ValueError, RuntimeError) as error:
            # Of a suggestion the run decides, whichever way the graph is wired.
            if entry.suggested:
                continue
            if entry.nodes:
                raise
            raise type(error)(f"{error} ({entry.config.title} was added by {entry}.)") from error
    return with_plan(model, plan)
