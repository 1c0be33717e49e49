"""Every method, by stem, in the canonical order in which the engine runs them.

The order decides what encloses what where two methods take part at the same point; it is never
the order of wiring.
"""

from __future__ import annotations

import importlib

from ..methods.method import Configuration

METHODS: dict[str, str] = {
    "cfg_cutoff": "CFGCutoff",
    "deepcache": "DeepCache",
    "freeu": "FreeU",
}
"""stem -> name of the configuration class in `methods/<stem>.py`."""


def configuration(stem: str) -> type[Configuration]:
    """The configuration class of a method. Imported when asked for: one that is broken breaks itself alone."""
    module = importlib.import_module(f"...methods.{stem}", __name__)
    return getattr(module, METHODS[stem])


def rank(config: Configuration) -> int:
    """The place of a configuration's method in the canonical order."""
    return list(METHODS).index(config.stem)
