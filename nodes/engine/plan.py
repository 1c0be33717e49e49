"""The plan: the configurations that a MODEL carries.

It is immutable and travels with the model's clones, which share it. Nothing else that Slipstream
does is on the model but one wrapper, the same for every model, that starts the engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..methods.method import Configuration
from . import registry

KEY = "slipstream"


@dataclass(frozen=True)
class Node:
    """The node that added a configuration.

    Attributes:
        id: its id in the graph on display (``7``, or ``12:7`` inside a subgraph).
        type: its node id in the registry, such as ``SlipstreamDeepCache``.
        is_expanded: whether it stands for a node of ours that it expanded into.
    """

    id: str
    type: str
    is_expanded: bool = False


@dataclass(frozen=True)
class Entry:
    """One method of a plan.

    Attributes:
        config: its settings.
        nodes: the nodes that asked for it, with equal settings.
        suggested: whether a node that adds several methods proposed it; an explicit node wins.
    """

    config: Configuration
    nodes: tuple[Node, ...]
    suggested: bool = False

    def __str__(self) -> str:
        return " and ".join(f"node {node.id}" for node in self.nodes)


@dataclass(frozen=True)
class Plan:
    """The methods of a model, one entry each, in canonical order."""

    entries: tuple[Entry, ...] = ()

    def adding(self, new: Entry) -> Plan:
        """This plan with one more entry.

        The same method twice with equal settings is one. A suggestion gives way to an explicit
        node wherever either is wired.

        Raises:
            ValueError: the method is there with different settings.
        """
        old = next((entry for entry in self.entries if entry.config.stem == new.config.stem), None)
        rest = tuple(entry for entry in self.entries if entry is not old)
        if old is None:
            merged = new
        elif old.config == new.config:
            nodes = (*old.nodes, *(node for node in new.nodes if node not in old.nodes))
            merged = Entry(new.config, nodes, old.suggested and new.suggested)
        elif old.suggested != new.suggested:
            merged = new if old.suggested else old
        else:
            differing = ", ".join(
                f"{name} {value} against {getattr(old.config, name)}"
                for name, value in asdict(new.config).items()
                if value != getattr(old.config, name)
            )
            raise ValueError(
                f"{new.config.title}: {new} and {old} are on the same model with different settings ({differing}). "
                "Remove or bypass one of them, or give both the same settings."
            )
        return Plan(tuple(sorted((*rest, merged), key=lambda entry: registry.rank(entry.config))))


def plan_of(model: Any) -> Plan:
    """The plan of a MODEL (ModelPatcher); an empty one if it has none."""
    return model.get_attachment(KEY) or Plan()
