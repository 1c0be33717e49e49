"""The templates, and a small one to rewire."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
from loading import ROOT

TEMPLATES = {path.stem: json.loads(path.read_text()) for path in sorted((ROOT / "workflows").glob("*.json"))}
SD15 = "2 - SD 1.5 faster - DeepCache, CFG Cutoff and FreeU"
BENCHMARK = "9 - Benchmark - what each optimization gives"
TUNE = "9 - Tune - the fastest plan above a floor"
HANDOFF = "4 - Refiner handoff 0.8"

classic_only = pytest.mark.parametrize("renderer", ["classic"], indirect=True)
"""For what comes out the same whichever renderer draws it: what is queued, and what that does."""

seeds = itertools.count(1000)


class Workflow:
    """A template, small and fixed, to be rewired by a test. Nodes are found by type.

    Args:
        title: the template.
        sampler: its node that samples, with seed, control and steps as its first widgets.
    """

    def __init__(self, title=SD15, sampler="KSampler"):
        self.data = copy.deepcopy(TEMPLATES[title])
        self.set("EmptyLatentImage", 0, 64)
        self.set("EmptyLatentImage", 1, 64)
        # A seed of its own, or the host would answer from what it cached for the test before.
        self.set(sampler, 0, next(seeds))
        self.set(sampler, 1, "fixed")
        self.set(sampler, 2, 8)

    def node(self, kind: str) -> dict:
        return next(node for node in self.data["nodes"] if node["type"] == kind)

    def id(self, kind: str) -> int:
        return self.node(kind)["id"]

    def set(self, kind: str, index: int, value: object) -> None:
        node = self.node(kind)
        node["widgets_values"][index] = value
        # The canvas saves values by position and by name; it prefers the names where they are.
        node.pop("widgets_values_named", None)

    def add(self, kind: str, inputs: dict[str, str], outputs: list[str], values: list) -> dict:
        """A node with inputs (name: type), not wired yet."""
        number = self.data["last_node_id"] = self.data["last_node_id"] + 1
        node = {
            "id": number,
            "type": kind,
            "pos": [40 * number, 1250],
            "size": [300, 120],
            "flags": {},
            "order": number,
            "mode": 0,
            "inputs": [{"name": name, "type": type_, "link": None} for name, type_ in inputs.items()],
            "outputs": [{"name": type_, "type": type_, "links": []} for type_ in outputs],
            "properties": {},
            "widgets_values": values,
        }
        self.data["nodes"].append(node)
        return node

    def link(self, source: dict, output: int, target: dict, name: str) -> None:
        """Wire an output to an input, in place of what was wired to it."""
        position = next(i for i, entry in enumerate(target["inputs"]) if entry["name"] == name)
        old = target["inputs"][position]["link"]
        self.data["links"] = [link for link in self.data["links"] if link[0] != old]
        for node in self.data["nodes"]:
            for entry in node.get("outputs", []):
                entry["links"] = [number for number in entry.get("links") or [] if number != old]
        number = self.data["last_link_id"] = self.data["last_link_id"] + 1
        slot = source["outputs"][output]
        self.data["links"].append([number, source["id"], output, target["id"], position, slot["type"]])
        slot["links"].append(number)
        target["inputs"][position]["link"] = number

    def add_fault(self, fail_at: int = -1, step_s: float = 0.0) -> dict:
        """The test pack's node that slows or breaks sampling, between the last of ours and the sampler."""
        fault = self.add("TestFault", {"model": "MODEL"}, ["MODEL"], [fail_at, step_s])
        self.link(self.node("SlipstreamFreeU"), 0, fault, "model")
        self.link(fault, 0, self.node("KSampler"), "model")
        return fault
