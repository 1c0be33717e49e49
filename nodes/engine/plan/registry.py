"""Every method, by stem, in the canonical order in which the engine runs them.

The order decides what encloses what where two methods take part at the same point; it is never
the order of wiring.
"""

from __future__ import annotations

import importlib
from typing import Any

from ...methods.method import Configuration

METHODS = (
    "sequential_offload",
    "precision",
    "quantize",
    "attention_backend",
    "winograd",
    "compile_model",
    "cfg_cutoff",
    "forecast",
    "deepcache",
    "freeu",
)


def rank(config: Configuration) -> int:
    """The place of a configuration's method in the canonical order."""
    return METHODS.index(config.stem)


def kind(stem: str) -> Any:
    """The class of a method's configurations."""
    found = vars(importlib.import_module(f"...methods.{stem}", __package__)).values()
    (one,) = (one for one in found if isinstance(one, type) and getattr(one, "stem", None) == stem)
    return one


def configuration(stem: str, **settings: Any) -> Configuration:
    """A method's configuration, for a node that adds other nodes' methods."""
    made: Configuration = kind(stem)(**settings)
    return made
