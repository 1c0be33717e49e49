"""What the Report node tells: the last run of a model, in a few lines of text."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from comfy_api.latest import io

from .node import node_of
from .plan.plan import Plan, plan_of
from .telling import verdicts
from .telling.folding import HANDFUL, WORST_FIRST
from .telling.history import LastRun, last_runs


def show_last_run(node: type[io.ComfyNode], model: Any) -> io.NodeOutput:
    """The output of the node: the last runs of a MODEL as text, and that text as the node's verdict."""
    where, plan = verdicts.current_prompt(), plan_of(model)
    runs = last_runs(where, plan)
    if runs:
        told, others = _parted(runs)
        texts = [_text(run, run.prompt_id != where.id) for run in told]
        if others:
            texts.append(_summary(others))
        line = verdicts.Line(_worst(runs), "\n".join(texts))
    else:
        line = verdicts.Line("inert", _why_nothing(plan))
    verdicts.publish(where, node_of(node), line, runs[-1].record if runs else {}, (1, "report"))
    return io.NodeOutput(line.text, ui={"slipstream_run": [line.text]})


def _text(run: LastRun, is_earlier: bool) -> str:
    return "\n".join([_counts(run, is_earlier), *(f"{title}: {line.text}" for title, line in run.told)])


def _why_nothing(plan: Plan) -> str:
    if not plan.entries:
        return (
            "no Slipstream method is on this model, so nothing was recorded. Wire the model that comes out of a "
            "Slipstream node, or measure with the Benchmark node, which needs none"
        )
    return (
        "no sampler has run this model yet. Wire what the sampler made, or an image of it, to after, and to model the "
        "very model that went into the sampler"
    )


def _counts(run: LastRun, is_earlier: bool) -> str:
    record = run.record
    text = f"{run.sampler}: {record['steps']} steps in {record['elapsed_s']:.2f} s"
    if record["status"] != "finished":
        text = f"{run.sampler}: {record['status']} after {record['elapsed_s']:.2f} s"
    steps = record["step_s"]
    if steps:
        usual = f"{median(steps):.3f} s a step ({min(steps):.3f} to {max(steps):.3f})"
        text += f", {usual}, {record['elapsed_s'] - sum(steps):.2f} s before the first one"
    text += f"; {record['evaluations']} evaluations, {record['predictions']} predictions"
    return f"an earlier prompt's run: {text}" if is_earlier else text


def _parted(runs: list[LastRun]) -> tuple[list[LastRun], list[LastRun]]:
    """The runs to tell of one by one, and the others. Of many runs, those that need attention most, of these the
    newest; in their order."""
    if len(runs) <= HANDFUL + 1:
        return runs, []
    last_first = sorted(range(len(runs)), key=lambda index: (WORST_FIRST.index(_worst([runs[index]])), -index))
    told = set(last_first[:HANDFUL])
    return [runs[index] for index in sorted(told)], [run for index, run in enumerate(runs) if index not in told]


def _summary(runs: list[LastRun]) -> str:
    statuses = Counter(run.record["status"] for run in runs)
    told = ", ".join(f"{count} {status}" for status, count in statuses.items())
    return f"and {len(runs)} more runs, {sum(run.record['elapsed_s'] for run in runs):.2f} s in all: {told}"


def _worst(runs: list[LastRun]) -> Any:
    """The state that the whole report is shown in: that of the method that needs attention most."""
    states = {line.state for run in runs for _, line in run.told}
    return min(states, key=WORST_FIRST.index, default="active")
