"""A plan as JSON: what it consists of, without the nodes that asked for it.

::

    {"version": 1, "methods": [{"stem": "deepcache", "settings": {"cache_interval": 3}}]}

A setting that is missing has the default that it had in that version. What is unknown is told, never guessed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, fields
from typing import Any, NoReturn, get_type_hints

from ...methods.method import Configuration
from . import registry
from .plan import Entry, Plan

VERSION = 1
"""What is written. It goes up when a default changes, or a setting's meaning."""

FORMER: Mapping[int, Mapping[str, Mapping[str, Any]]] = {}
"""For each version before this one the defaults that are others today, by stem and setting."""

LONG = 60
MANY = 10**LONG
"""Characters of a value, and the size of a number, that a message tells whole."""

KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


class PlanError(ValueError):
    """A text is no plan, or one that can't be used here."""


def as_data(plan: Plan) -> dict[str, Any]:
    """A plan as JSON-ready data."""
    methods = [{"stem": entry.config.stem, "settings": asdict(entry.config)} for entry in plan.entries]
    return {"version": VERSION, "methods": methods}


def to_json(plan: Plan) -> str:
    """A plan as text: each method's stem and settings, in canonical order."""
    return json.dumps(as_data(plan), indent=2, allow_nan=False)


def from_json(text: str) -> Plan:
    """The plan that a text tells of, with no nodes and no suggestions in it.

    Raises:
        PlanError: it is none, or has something that this version does not know or that can't be set.
    """
    return from_data(_parsed(text))


def from_data(data: Any) -> Plan:
    """The plan that parsed JSON tells of; see `from_json`."""
    data = _object(data, "it", ("version", "methods"), required=("version", "methods"))
    version, methods = data["version"], data["methods"]
    if type(version) is not int or version < 1:
        _refuse(f"version must be a whole number from 1 on, but is {_told(version)}")
    if version > VERSION:
        _refuse(f"it is of version {version}, and this Slipstream reads {VERSION} at most: update Slipstream")
    if not isinstance(methods, list):
        _refuse(f"methods must be a list, but is {_told(methods)}")
    plan = Plan()
    for method in methods:
        config = _configuration(method, version)
        if any(entry.config.stem == config.stem for entry in plan.entries):
            _refuse(f"{config.title} is in it twice")
        plan = plan.adding(Entry(config, ()))
    return plan


def defaults(stem: str, version: int = VERSION) -> dict[str, Any]:
    """The settings of a method that have a default, as it was in a version."""
    found = {field.name: field.default for field in fields(registry.kind(stem)) if field.default is not MISSING}
    return {**found, **FORMER.get(version, {}).get(stem, {})}


def _parsed(text: Any) -> Any:
    if not isinstance(text, str):
        _refuse(f"it must be a text in JSON, but is {_told(text)}")

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                _refuse(f"{name!r} is in one object twice")
            found[name] = value
        return found

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        _refuse(f"it must be JSON, but is not: {error.msg} in line {error.lineno}, column {error.colno}")
    except RecursionError:
        _refuse("it must be JSON of a few levels, but has too many")
    except ValueError as error:
        # Of a number of too many digits, Python says no more than that.
        if isinstance(error, PlanError):
            raise
        _refuse(f"it must be JSON, but is not: {error}")


def _configuration(data: Any, version: int) -> Configuration:
    method = _object(data, "each of its methods", ("stem", "settings"), required=("stem",))
    stem = method["stem"]
    if not isinstance(stem, str) or stem not in registry.METHODS:
        _refuse(f"the method {_told(stem)} is unknown; known are {', '.join(registry.METHODS)}")
    kind = registry.kind(stem)
    known, hints = [field.name for field in fields(kind)], get_type_hints(kind)
    settings = _object(method.get("settings", {}), f"the settings of {kind.title}", known)
    values = {name: _value(f"{name} of {kind.title}", value, hints[name]) for name, value in settings.items()}
    values = {**defaults(stem, version), **values}
    missing = [name for name in known if name not in values]
    if missing:
        _refuse(f"{kind.title} lacks {', '.join(missing)}, for which there is no default")
    try:
        return registry.configuration(stem, **values)
    except ValueError as error:
        _refuse(str(error))


def _object(value: Any, name: str, known: Sequence[str], required: Sequence[str] = ()) -> dict[str, Any]:
    """A JSON object that has no other members than the known ones, and the required ones."""
    if not isinstance(value, dict):
        _refuse(f"{name} must be an object of {', '.join(known)}, but is {_told(value)}")
    unknown = [repr(member) for member in value if member not in known]
    if unknown:
        _refuse(f"{name} must have no other members than {', '.join(known)}, but has {', '.join(unknown)}")
    lacking = [member for member in required if member not in value]
    if lacking:
        _refuse(f"{name} lacks {', '.join(lacking)}")
    return value


def _value(name: str, value: Any, kind: type) -> Any:
    """A setting's value, of the setting's type: JSON's numbers are of one kind."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number and math.isfinite(_float(value)):
        return float(value)
    if kind is int and is_number and _float(value).is_integer():
        return int(value)
    if kind in (bool, str) and type(value) is kind:
        return value
    _refuse(f"{name} must be {KINDS[kind]}, but is {_told(value)}")


def _float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _told(value: Any) -> str:
    """A value in a message: as JSON has it, cut short."""
    kinds = {type(None): "null", dict: "an object", list: "a list"}
    if not isinstance(value, str | int | float):
        return kinds.get(type(value), f"of type {type(value).__name__}")
    # A number of thousands of digits has no text.
    told = "a number of many digits" if isinstance(value, int) and abs(value) >= MANY else repr(value)
    return told if len(told) <= LONG else f"{told[:LONG]}..."


def _refuse(why: str) -> NoReturn:
    raise PlanError(f"The plan can't be used: {why.removesuffix('.')}.") from None
