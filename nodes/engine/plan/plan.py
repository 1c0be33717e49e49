"""The plan: the configurations that a MODEL carries.

It is immutable and travels with the model's clones, which share it. Nothing else that Slipstream
does is on the model but one wrapper, the same for every model, that starts the engine.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from ...methods.method import Configuration
from . import registry

KEY = "slipstream"


@dataclass(frozen=True)
class Node:
    """The node that added a configuration.

    Attributes:
        id: its id in the graph on display (``7``, or ``12:7`` inside a subgraph).
        type: its node id in the registry, such as ``SlipstreamDeepCache``.
        has_several: whether several methods tell their verdicts on it, as it expands into nodes of ours or adds more
            than one method itself: each names itself.
        told: what it says of itself, above what became of its methods in each run.
    """

    id: str
    type: str
    has_several: bool = False
    told: str = ""


@dataclass(frozen=True)
class Entry:
    """One method of a plan.

    Attributes:
        config: its settings.
        nodes: the nodes that asked for it, with equal settings; none if it came with a plan of its own.
        suggested: whether a node that adds several methods proposed it; an explicit node wins.
        others: suggestions of other settings. Those of an explicit node stand in their place; where there is none, the
            run is refused.
    """

    config: Configuration
    nodes: tuple[Node, ...]
    suggested: bool = False
    others: tuple[Entry, ...] = ()

    def __str__(self) -> str:
        return " and ".join(f"node {node.id}" for node in self.nodes) or "the plan"

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stem": self.config.stem,
            "title": self.config.title,
            "settings": asdict(self.config),
            "nodes": [node.id for node in self.nodes],
        }

    def check_agreed(self) -> None:
        """Raises:
        ValueError: nodes suggest different settings, and none is explicit.
        """
        if self.suggested and self.others:
            raise _differing(self.others[0], self)

    def merged(self, new: Entry) -> Entry:
        """This entry and another one of the same method.

        Raises:
            ValueError: both are explicit, with different settings.
        """
        found: dict[Configuration, Entry] = {}
        for entry in (replace(self, others=()), *self.others, new):
            known = found.get(entry.config)
            if known is not None:
                nodes = (*known.nodes, *(node for node in entry.nodes if node not in known.nodes))
                entry = replace(known, nodes=nodes, suggested=known.suggested and entry.suggested)
            found[entry.config] = entry
        first, *others = sorted(found.values(), key=lambda entry: entry.suggested)
        if any(not other.suggested for other in others):
            raise _differing(new, first if new.config != first.config else others[0])
        return replace(first, others=tuple(others))


def _differing(new: Entry, old: Entry) -> ValueError:
    settings = ", ".join(
        f"{name} {value} against {getattr(old.config, name)}"
        for name, value in asdict(new.config).items()
        if value != getattr(old.config, name)
    )
    both = f"{new} and {old}" if new.nodes or old.nodes else "two plans"
    return ValueError(
        f"{new.config.title}: {both} are on the same model with different settings ({settings}). "
        "Remove or bypass one of them, or give both the same settings."
    )


@dataclass(frozen=True)
class Plan:
    """The methods of a model, one entry each, in canonical order."""

    entries: tuple[Entry, ...] = ()

    def adding(self, new: Entry) -> Plan:
        """This plan with one more entry.

        The same method twice with equal settings is one. A suggestion gives way to an explicit
        node wherever either is wired; so suggestions that differ are refused in the run only.

        Raises:
            ValueError: the method is there with different settings.
        """
        old = next((entry for entry in self.entries if entry.config.stem == new.config.stem), None)
        rest = tuple(entry for entry in self.entries if entry is not old)
        merged = new if old is None else old.merged(new)
        return Plan(tuple(sorted((*rest, merged), key=lambda entry: registry.rank(entry.config))))


def plan_of(model: Any) -> Plan:
    """The plan of a MODEL (ModelPatcher); an empty one if it has none."""
    return model.get_attachment(KEY) or Plan()
