"""Every method, by stem, in the canonical order in which the engine runs them.

The order decides what encloses what where two methods take part at the same point; it is never
the order of wiring.
"""

from __future__ import annotations

from ..methods.method import Configuration

METHODS = ("sequential_offload", "precision", "attention_backend", "compile_model", "cfg_cutoff", "deepcache", "freeu")


def rank(config: Configuration) -> int:
    """The place of a configuration's method in the canonical order."""
    return METHODS.index(config.stem)
