"""Verdicts: what each node did in the last run, told to the page and kept as plain data.

A verdict is one line for each sampling run that the node took part in during one prompt; of many runs, few lines. It
goes to the client that queued the prompt as the event ``slipstream.verdict``, a complete snapshot each time, and stays
here for that client to fetch after a reload or a prompt that was cached whole.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from comfy_execution.utils import get_executing_context

from ...methods.method import State
from ..host import machine
from ..plan.plan import Node
from ..plan.record import Record
from .folding import Folded, LineState, Told

logger = logging.getLogger(__name__)

EVENT = "slipstream.verdict"
ROUTE = "/slipstream/verdicts"
KEPT = 1000
LATEST = 64
"""Lines of a node that may yet be written anew."""
SUMMED = ("evaluations", "predictions", "full_predictions", "reused", "elapsed_s")
"""Counts of a run that are added up for a prompt."""
OF_ITSELF = 0
"""In the place of a run's number, for what a node says of itself: such a line is never one of many."""
NOT_RUN = (OF_ITSELF, "")
TOLD = (OF_ITSELF, "told")
"""The key of what a node says of itself."""

Key = tuple[Hashable, str]
"""What tells a line from the others of its node: the run, and the method's stem."""


@dataclass(frozen=True)
class Prompt:
    """The prompt that is being executed.

    Attributes:
        id: its id; None outside the server.
        workflow: the id of the workflow on display that it was queued from, if it says so.
        node: the id of the executing node: the sampler, while sampling.
        client: the client that queued it.
        graph: its nodes by id, as the host got them.
        part: which of the node's samplings, if it makes several.
    """

    id: str | None = None
    workflow: str | None = None
    node: str | None = None
    client: str | None = None
    graph: dict[str, dict[str, Any]] = field(default_factory=dict)
    part: str = ""

    @property
    def shown(self) -> str:
        """The id that the executing node is shown under. One that another node expanded into, as a loop does each time
        around, is no part of the graph; its id begins with that one's."""
        node = str(self.node)
        return node if node in self.graph else node.split(".")[0]

    @property
    def sampler(self) -> str:
        """What to call the executing node, such as ``KSampler 3``."""
        name = f"{self.graph.get(self.shown, {}).get('class_type', 'node')} {self.shown}"
        return f"{name}, {self.part}" if self.part else name


@dataclass(frozen=True)
class Line:
    """One run's verdict on one node. `state` decides its colour and symbol."""

    state: LineState
    text: str


@dataclass
class Verdict:
    """All that is known of one node.

    Attributes:
        inputs: its own, then.
        lines: what it says of itself, and its latest runs' lines in order.
        earlier: the lines of the runs before these.
        record: the counts of the latest run.
        report: what the node itself measured, which no run of its methods replaces; empty if it measures nothing.
        totals: of all of the prompt's own runs that are over.
    """

    prompt_id: str | None
    workflow_id: str | None
    node: Node
    inputs: dict[str, Any] | None = None
    lines: OrderedDict[Key, dict[str, Any]] = field(default_factory=OrderedDict)
    earlier: Folded = field(default_factory=Folded)
    record: dict[str, Any] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)
    totals: dict[str, float] = field(default_factory=dict)

    def put(self, key: Key, line: dict[str, Any]) -> None:
        """Set a line. One that is neither among the latest nor still running is no longer known by its key."""
        self.lines[key] = line
        if len(self.lines) > LATEST:
            over = [key for key, line in self.lines.items() if key[0] != OF_ITSELF and line["state"] != "running"]
            self.earlier = self.earlier.plus(Told(key[1], **self.lines.pop(key)) for key in over[:-LATEST])

    def shown(self) -> list[dict[str, Any]]:
        """Its lines as they are sent, as few as say it."""
        of_itself: list[Told] = []
        of_runs: list[Told] = []
        for (run, stem), line in self.lines.items():
            (of_itself if run == OF_ITSELF else of_runs).append(Told(stem, **line))
        return [line.as_dict(1) for line in of_itself] + self.earlier.shown(of_runs)

    def as_dict(self) -> dict[str, Any]:
        """The event's data."""
        return {
            "prompt_id": self.prompt_id,
            "workflow_id": self.workflow_id,
            "node_id": self.node.id,
            "node_type": self.node.type,
            "lines": self.shown(),
            "record": self.report or self.record,
            "totals": self.totals,
        }


_kept: OrderedDict[tuple[str | None, str], Verdict] = OrderedDict()
_clients: set[str] = set()
_lock = threading.Lock()


def line(record: Record, state: State, text: str) -> Line:
    """A method's verdict on itself, as the run's end makes it: an error or an interrupt comes first."""
    if record.status == "finished":
        if record.model_calls and not record.evaluations:
            return Line("inert", "did nothing: the sampler calls the model by itself, past the guider")
        return Line(state, text)
    if record.status == "running":
        return Line("running", "sampling")
    so_far = f"until then: {text}" if record.evaluations else "before the first step"
    at = f"in step {record.step + 1} of {record.steps}"
    if record.status == "interrupted":
        return Line("interrupted", f"interrupted {at}; {so_far}")
    return Line("failed", f"the run failed {at} ({record.reason}); {so_far}")


def host_server() -> Any:
    """The host's server; None in a host that runs without one."""
    module = sys.modules.get("server")
    return getattr(getattr(module, "PromptServer", None), "instance", None)


def current_prompt() -> Prompt:
    """Where we are: the prompt and the node that are being executed."""
    context, server = get_executing_context(), host_server()
    if context is None or server is None:
        return Prompt()
    return _find_prompt(server, context.prompt_id, context.node_id)


def _find_prompt(server: Any, prompt_id: str, node: str | None = None) -> Prompt:
    """A prompt that is running, or ran."""
    running, _ = server.prompt_queue.get_current_queue_volatile()
    item = next((item for item in running if item[1] == prompt_id), None)
    if item is None:
        past = server.prompt_queue.get_history(prompt_id=prompt_id).get(prompt_id)
        if past is None:
            return Prompt(prompt_id, node=node, client=server.client_id)
        item = past["prompt"]
    graph, extra = item[2], item[3]
    # A client of the API may send anything as workflow, also text.
    info = extra.get("extra_pnginfo")
    workflow = info.get("workflow") if isinstance(info, dict) else None
    workflow_id = workflow.get("id") if isinstance(workflow, dict) else None
    return Prompt(prompt_id, workflow_id, node, extra.get("client_id"), graph)


def publish(
    where: Prompt,
    node: Node,
    line: Line,
    record: dict[str, Any],
    run: Key = NOT_RUN,
    report: dict[str, Any] | None = None,
) -> None:
    """Set the line of one run on a node, and tell the client.

    Args:
        line: what to say.
        run: number of the run, or `OF_ITSELF`, and stem of the method: a node has one line for each. Without it
            the line stands until the first run of this prompt.

    Others as with `publish_lines`.
    """
    publish_lines(where, node, {run: line}, record, report=report)


def publish_lines(
    where: Prompt,
    node: Node,
    lines: Mapping[Key, Line],
    record: dict[str, Any],
    is_over: bool = False,
    report: dict[str, Any] | None = None,
) -> None:
    """Set lines on a node, and tell the client.

    Never raises for the server's sake: a verdict that cannot be sent must not cost the image.

    Args:
        where: the prompt, as it was when the run began.
        node: the node that it is about.
        lines: what to say, as with `publish`.
        record: the run's counts.
        is_over: whether the run is over, and one of the prompt's own: its counts belong to the prompt's.
        report: what the node itself measured, if that is what is told.
    """
    with _lock:
        verdict = _kept.get((where.workflow, node.id))
        if verdict is None or where.id is None or verdict.prompt_id != where.id:
            # A node that measured may be cached while a sampler runs what it returned.
            measured = {} if verdict is None or verdict.node.type != node.type else verdict.report
            inputs = where.graph.get(node.id, {}).get("inputs")
            verdict = Verdict(where.id, where.workflow, node, inputs, report=measured)
            if node.told:
                # Here, and not when the node executes: it may be cached while a sampler runs.
                verdict.put(TOLD, {"sampler": "", **asdict(Line("active", node.told))})
        if NOT_RUN not in lines:
            verdict.lines.pop(NOT_RUN, None)
        for run, line in lines.items():
            verdict.put(run, {"sampler": where.sampler, **asdict(line)})
        verdict.record = record
        verdict.report = verdict.report if report is None else report
        if is_over:
            verdict.totals = {name: verdict.totals.get(name, 0) + record[name] for name in SUMMED}
        _keep(verdict)
        data = verdict.as_dict()
    try:
        _send(where, node, data)
    except Exception:
        logger.warning("Slipstream: a verdict could not be sent to the page", exc_info=True)


def _keep(verdict: Verdict) -> None:
    """Keep a verdict as the latest; the oldest ones go."""
    key = (verdict.workflow_id, verdict.node.id)
    _kept[key] = verdict
    _kept.move_to_end(key)
    while len(_kept) > KEPT:
        _kept.popitem(last=False)


def publish_off(node: Node, why: str) -> None:
    """Say that a node does nothing by its own settings."""
    publish(current_prompt(), node, Line("off", f"off: {why}"), {})


def publish_refused(node: Node, error: Exception) -> None:
    """Say that a node could not do its part."""
    publish(current_prompt(), node, Line("failed", str(error)), {})


def compiling(graphs: int, seconds: float) -> Line:
    """That something is being compiled."""
    return Line("running", f"compiling, {seconds:.0f} s so far" + (f", graphs done: {graphs}" if graphs else ""))


def publish_added(node: Node) -> None:
    """Say that a node did its part. Stands only where no sampler runs the model that it returned."""
    publish(current_prompt(), node, Line("inert", "in the model's plan, but no sampler has run it in this prompt"), {})


def _send(where: Prompt, node: Node, data: dict[str, Any]) -> None:
    server = host_server()
    if server is None or where.client is None:
        return
    if where.client in _clients:
        server.send_sync(EVENT, data, where.client)
    else:
        # The host's own text on a node: it can't be told apart by workflow and isn't kept, but needs no script.
        texts = [
            f"{line['times']} times: {line['text']}" if line["times"] > 1 else line["text"] for line in data["lines"]
        ]
        server.send_progress_text("\n".join(texts), node.id, where.client)


def _adopt(where: Prompt) -> None:
    """Give a prompt's nodes the verdicts that equal nodes got when another workflow ran: the host's
    cache, which knows no workflows, answered for them, and there was no run to tell of."""
    for node_id, node in where.graph.items():
        if (where.workflow, node_id) in _kept:
            continue
        equal = (
            verdict
            for verdict in reversed(_kept.values())
            if (verdict.node.id, verdict.node.type, verdict.inputs) == (node_id, node["class_type"], node["inputs"])
        )
        found = next(equal, None)
        if found is not None:
            _keep(replace(found, workflow_id=where.workflow, lines=found.lines.copy()))


def add_routes() -> None:
    """Serve the last verdicts, and the pack's version. Asking for them is how a client of this server says that our
    script is loaded; the page of another server, whose worker this one is, asks without a name."""
    server = host_server()
    # A second copy of the pack: the host would not start with two routes of one path.
    if server is None or any(getattr(route, "path", None) == ROUTE for route in server.routes):
        return
    from aiohttp import web

    @server.routes.get(ROUTE)
    async def get_verdicts(request: web.Request) -> web.Response:
        client, prompt_id = request.query.get("client_id"), request.query.get("prompt_id")
        with _lock:
            if prompt_id is not None:
                _adopt(_find_prompt(server, prompt_id))
            if client is not None and client in server.sockets:
                _clients.intersection_update(server.sockets)
                _clients.add(client)
            told = [verdict.as_dict() for verdict in _kept.values()]
        return web.json_response({"version": machine.versions()["slipstream"], "verdicts": told})
