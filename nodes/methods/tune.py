"""Tune: the settings that are tried, as a table. A new method or setting is a row.

Source: the figures that this project measured of each method; the levels span what keeps a picture nearly the same to
what costs it visible detail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .method import Configuration, Model

EXACT_ONLY, APPROXIMATE, EVERYTHING = "exact only", "exact and approximate", "everything"
MAY_USE = (APPROXIMATE, EXACT_ONLY, EVERYTHING)
"""What a search may use; the first one by default. Everything: also what compiles or quantizes first."""


@dataclass(frozen=True)
class Given:
    """What decides which rows are tried.

    Attributes:
        model: with what other nodes put on it.
        cfg: the scale of guidance.
        taken: stems that are on the model already.
    """

    model: Model
    cfg: float
    taken: frozenset[str] = frozenset()


ALWAYS: Callable[[Given], bool] = lambda given: True  # noqa: E731


def _on_processor(given: Given) -> bool:
    return given.model.device == "cpu"


@dataclass(frozen=True)
class Row:
    """A dial: settings of one method, from the gentlest to the fastest.

    Attributes:
        stem: the method.
        levels: for each, the settings that are not the method's defaults.
        is_exact: whether the picture stays the same up to rounding.
        prepares: whether it compiles or quantizes first.
        excludes: stems that it can't go together with.
        needs: whether it is tried at all; beside that, a level's own check must pass, and it must not be in vain here.
    """

    stem: str
    levels: tuple[Mapping[str, Any], ...]
    is_exact: bool = False
    prepares: bool = False
    excludes: tuple[str, ...] = ()
    needs: Callable[[Given], bool] = ALWAYS


ROWS = (
    Row("attention_backend", ({}, {"fuse_qkv": True}), is_exact=True),
    Row("compile_model", ({},), is_exact=True, prepares=True),
    Row("precision", ({},), needs=_on_processor),
    Row("winograd", ({}, {"bf16": True}), needs=_on_processor),
    Row("quantize", ({}, {"scheme": "fp8 dynamic"}), prepares=True),
    Row(
        "cfg_cutoff",
        (
            {"cutoff": 1.0, "reuse_every": 2},
            {"cutoff": 1.0, "reuse_every": 3},
            {"cutoff": 0.8, "reuse_every": 3},
            {"cutoff": 0.6, "reuse_every": 3},
        ),
        needs=lambda given: given.cfg != 1.0,
    ),
    Row(
        "forecast", ({"error_budget": 0.02}, {}, {"error_budget": 0.1}, {"error_budget": 0.2}), excludes=("deepcache",)
    ),
    Row("deepcache", ({"cache_interval": 2, "schedule": "quadratic"}, {}), excludes=("forecast",)),
)
"""In the order in which the search names them."""


@dataclass(frozen=True)
class Dial:
    """What of a row can be tried here."""

    row: Row
    configs: tuple[Configuration, ...]


def ladder(
    may_use: str, given: Given, kind: Callable[[str], Callable[..., Configuration]]
) -> tuple[list[Dial], list[str]]:
    """The dials for one model on one machine; and what was left out, with why.

    Args:
        may_use: one of `MAY_USE`.
        kind: gives the class of a stem's configurations.
    """
    dials, left_out = [], []
    for row in ROWS:
        if (not row.is_exact and may_use == EXACT_ONLY) or (row.prepares and may_use != EVERYTHING):
            continue
        if not row.needs(given):
            continue
        made: list[Configuration] = []
        for settings in row.levels:
            config = kind(row.stem)(**settings)
            if row.stem in given.taken:
                left_out.append(f"{config.title} is on the model already, and stays as it is")
                break
            try:
                config.check(given.model)
            except (ValueError, RuntimeError) as error:
                left_out.append(str(error))
                continue
            why_not = config.in_vain(given.model.device)
            if why_not is not None:
                left_out.append(f"{config.title}: {why_not}")
            elif config.off() is None and config not in made:
                made.append(config)
        if made:
            dials.append(Dial(row, tuple(made)))
    return dials, left_out
