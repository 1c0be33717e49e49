"""The plan in the metadata of saved images: a file tells which methods, with which settings, took part in making it.

The host hands all nodes of a prompt one dict, `extra_pnginfo`, and SaveImage and its kin write what is in it into their
files. The server shows us each prompt before it is queued: that is where the dict is reached. The runs of a sampler go
into that of its own prompt and of every other one that waits with the same sampler and the same nodes before it, since
the host's cache may answer for these, and nothing of ours runs then. So they are also kept for prompts to come.

Where a prompt is shown without that dict (an API client sends none; ComfyUI-Distributed makes one afterwards), the
prompt itself has them, which is written into the files too: each sampler's node in its `_meta`, free for anything.
"""

from __future__ import annotations

import copy
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any
from weakref import WeakValueDictionary

from comfy_execution.graph_utils import is_link

from ..host import machine
from ..plan.plan import KEY, Plan
from ..plan.saved import as_data
from . import verdicts

logger = logging.getLogger(__name__)

INFO = "extra_pnginfo"
META = "_meta"
OURS = "Slipstream"
"""What the type of every node of ours begins with."""
KEPT = 1000
RUNS = 20
"""Runs of one sampler that are told, each of another plan. An image's file has to hold them."""


class Metadata(dict[str, Any]):
    """A prompt's `extra_pnginfo`, which lives as long as the host needs it: unlike a plain dict it can be held weakly.

    Args:
        info: what the client sent.
        graph: the prompt's nodes by id; the host may yet replace some.
    """

    def __init__(self, info: dict[str, Any], graph: dict[str, dict[str, Any]]):
        # Who sends a file's metadata again sends the plan of that file.
        super().__init__({name: value for name, value in info.items() if name != KEY})
        self._graph = graph

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    @cached_property
    def nodes(self) -> dict[str, list[str]]:
        """The ids of its nodes by signature."""
        return _by_signature(self._graph)

    def put(self, nodes: list[str], sampler: dict[str, Any] | None) -> None:
        """What a sampler did, for each of its nodes; None takes it away."""
        samplers = self.get(KEY, {}).get("samplers", {})
        samplers = {node: other for node, other in samplers.items() if node not in nodes}
        if sampler is not None:
            samplers |= dict.fromkeys(nodes, sampler)
        # New dicts each time, since another thread may be writing the old ones into a file.
        if samplers:
            self[KEY] = {**machine.versions(), "samplers": samplers}
        else:
            self.pop(KEY, None)


class Graph(dict[str, Any]):
    """A prompt's nodes by id, in the place of a `Metadata` where there is none; held weakly too.

    Args:
        graph: what the client sent; the host may yet replace some.
    """

    def __init__(self, graph: dict[str, dict[str, Any]]):
        # Who sends a file's prompt again sends the runs of that file.
        super().__init__({node: _with_meta(entry, None) for node, entry in graph.items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(dict(self), memo)

    @cached_property
    def nodes(self) -> dict[str, list[str]]:
        """The ids of its nodes by signature."""
        return _by_signature(self)

    def put(self, nodes: list[str], sampler: dict[str, Any] | None) -> None:
        """What a sampler did, for each of its nodes; None takes it away."""
        for node in nodes:
            # A new entry each time, since another thread may be writing the old one into a file.
            self[node] = _with_meta(self[node], sampler and {**machine.versions(), **sampler})


def _with_meta(entry: Any, told: dict[str, Any] | None) -> Any:
    """A node of a prompt whose `_meta` has this of ours, and nothing else of ours."""
    meta = entry.get(META) if isinstance(entry, dict) else None
    others = {name: value for name, value in meta.items() if name != KEY} if isinstance(meta, dict) else {}
    if told is not None:
        return {**entry, META: {**others, KEY: told}}
    return {**entry, META: others} if isinstance(meta, dict) and KEY in meta else entry


@dataclass
class Sampler:
    """The last runs of a sampler node.

    Attributes:
        place: the prompt and the node that made them.
        type: of the node, such as ``KSampler``.
        runs: what is told of each, by what tells one from the other.
        left_out: how many more there were, before these.
    """

    place: tuple[str | None, str]
    type: str
    runs: dict[Hashable, dict[str, Any]] = field(default_factory=dict)
    left_out: int = 0

    def put(self, key: Hashable, run: dict[str, Any]) -> None:
        """One more run; the oldest ones go."""
        self.runs[key] = run
        while len(self.runs) > RUNS:
            del self.runs[next(iter(self.runs))]
            self.left_out += 1

    def as_dict(self) -> dict[str, Any]:
        left_out = {"left_out": self.left_out} if self.left_out else {}
        return {"type": self.type, "runs": list(self.runs.values()), **left_out}


_kept: OrderedDict[str, Sampler] = OrderedDict()
_prompts: WeakValueDictionary[int, Metadata | Graph] = WeakValueDictionary()
_lock = threading.Lock()


def keep(where: verdicts.Prompt, plan: Hashable, steps: int, methods: list[dict[str, Any]]) -> None:
    """Record a run that ended well. Never raises: metadata must not cost the image.

    Args:
        where: the prompt and the node that sampled.
        plan: what was run, of which a `Plan` is told too. Another run of it in the same node and prompt takes this
            one's place.
        steps: how many.
        methods: each with its settings, nodes and verdict, as plain data.
    """
    run: dict[str, Any] = {**({"part": where.part} if where.part else {}), "steps": steps, "methods": methods}
    if isinstance(plan, Plan):
        run["plan"] = as_data(plan)
    _set(where, (where.part, plan), run)


def forget(where: verdicts.Prompt) -> None:
    """Take back what a node is said to have made: a run of it failed or was interrupted."""
    _set(where, None, None)


def _set(where: verdicts.Prompt, key: Hashable, run: dict[str, Any] | None) -> None:
    if where.id is None or where.node is None:
        return
    try:
        node = where.shown
        signature = _signature(where.graph, node, {})
        with _lock:
            sampler = None if run is None else _sampler(signature, (where.id, node), where.graph[node]["class_type"])
            if sampler is None:
                _kept.pop(signature, None)
            else:
                sampler.put(key, run or {})
            for place in list(_prompts.values()):
                nodes = place.nodes.get(signature)
                if nodes:
                    place.put(nodes, None if sampler is None else sampler.as_dict())
    except Exception:
        logger.warning("Slipstream: the plan could not be put into the images' metadata", exc_info=True)


def _sampler(signature: str, place: tuple[str, str], kind: str) -> Sampler:
    """The record of a sampler, a new one if it has no run in this prompt yet; the oldest ones go."""
    sampler = _kept.get(signature)
    if sampler is None or sampler.place != place:
        sampler = _kept[signature] = Sampler(place, kind)
    _kept.move_to_end(signature)
    while len(_kept) > KEPT:
        _kept.popitem(last=False)
    return sampler


def on_prompt(data: dict[str, Any]) -> dict[str, Any]:
    """What the host's server calls with each prompt that comes in."""
    graph = data.get("prompt")
    if not isinstance(graph, dict) or not any(_is_ours(node) for node in graph.values()):
        return data
    extra = data.get("extra_data") or {}
    info = extra.get(INFO)
    place: Metadata | Graph
    if isinstance(info, dict):
        place = extra[INFO] = Metadata(info, graph)
    else:
        # It gets none from us: other packs' nodes take its being there for a sign that the page sent the prompt, with
        # its workflow.
        place = data["prompt"] = Graph(graph)
    # Not `place.nodes`: the host may yet replace some.
    nodes = _by_signature(graph)
    with _lock:
        for signature in nodes.keys() & _kept.keys():
            place.put(nodes[signature], _kept[signature].as_dict())
        _prompts[id(place)] = place
    return data


def listen() -> None:
    """Have the server show us its prompts."""
    server = verdicts.host_server()
    if server is not None and on_prompt not in server.on_prompt_handlers:
        server.add_on_prompt_handler(on_prompt)


def _is_ours(node: Any) -> bool:
    return isinstance(node, dict) and str(node.get("class_type")).startswith(OURS)


def _by_signature(graph: dict[str, dict[str, Any]]) -> dict[str, list[str]]:
    found: dict[str, str] = {}
    nodes: dict[str, list[str]] = {}
    for node in graph:
        nodes.setdefault(_signature(graph, node, found), []).append(node)
    return nodes


def _signature(graph: dict[str, dict[str, Any]], node: str, found: dict[str, str]) -> str:
    """What two nodes have in common if they and all before them are equal. Ids don't matter, as they don't to the
    host's cache, but for nodes of ours, which it tells apart by them."""
    if node not in found:
        # In a circle, which the host refuses.
        found[node] = ""
        entry = graph.get(node, {})
        inputs = {
            name: [_signature(graph, value[0], found), value[1]] if is_link(value) else _plain(value)
            for name, value in entry.get("inputs", {}).items()
        }
        parts = [entry.get("class_type"), inputs, node if _is_ours(entry) else None]
        found[node] = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
    return found[node]


def _plain(value: Any) -> Any:
    """An input as it is before the host's validation and after, which makes a float of an integer where one belongs."""
    if isinstance(value, dict) and "__value__" in value:
        value = value["__value__"]
    return int(value) if isinstance(value, float) and value.is_integer() else value
