"""Plans in files: saved under a name, listed, loaded. What comes with the pack, and what users keep.

A plan is small and foreign: it may come from another machine, or from the net. Only what `plan.saved` reads is used of
it, and only from the folders where plans are.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from uuid import uuid4

import folder_paths
from comfy_api.latest import io

from ..methods.method import Configuration
from .inputs import refusing
from .node import node_of, pass_through, suggest
from .plan.plan import Plan, plan_of
from .plan.saved import PlanError, defaults, from_json, to_json
from .telling import verdicts

FOLDER = ("slipstream", "plans")
"""In the host's folder for what belongs to its users."""

OWN = Path(__file__).resolve().parents[1] / "plans"
OWN_NAMED = " (Slipstream)"
"""What the names of those that come with the pack end in."""

SUFFIX = ".json"
MOST_BYTES = 64 * 1024
LONGEST = 100
MOST_NAME_BYTES = 200
"""A file's name may have 255 of them, and a character outside of ASCII takes up to four."""
NONE = "no plans"

NAME = re.compile(r"[^\W_](?:[\w ()+,.=-]*[\w)+=-])?")
"""Letters, digits and a few signs: what is a file's name on every system, and leads nowhere else."""

RESERVED = re.compile(r"(?:CON|PRN|AUX|NUL|COM\d|LPT\d)(?:\..*)?", re.IGNORECASE)
"""What Windows takes for devices."""


def folder() -> Path:
    """Where users' plans are; it may not be there yet."""
    return Path(folder_paths.get_user_directory()).joinpath(*FOLDER)


def names() -> list[str]:
    """The plans that there are: the users' own, then those that come with the pack."""
    own = [name for name in _names(folder()) if not name.endswith(OWN_NAMED)]
    return own + [f"{name}{OWN_NAMED}" for name in _names(OWN)]


def choices() -> list[str]:
    """What a list of plans offers."""
    return names() or [NONE]


def _names(place: Path) -> list[str]:
    return sorted(path.stem for path in place.glob(f"*{SUFFIX}") if path.is_file() and _is_name(path.stem))


def _is_name(name: str) -> bool:
    is_short = len(name) <= LONGEST and len(name.encode(errors="replace")) <= MOST_NAME_BYTES
    return is_short and bool(NAME.fullmatch(name)) and not RESERVED.fullmatch(name)


def path_of(title: str, name: str) -> Path:
    """The file of a plan, which may not be there.

    Args:
        title: of the node that asks.

    Raises:
        ValueError: it is no name.
    """
    is_own = name.endswith(OWN_NAMED)
    place, stem = (OWN, name.removesuffix(OWN_NAMED)) if is_own else (folder(), name)
    if not _is_name(stem):
        raise ValueError(
            f"{title}: a plan's name has letters, digits, spaces and ( ) + , . = - _ in it, begins with a letter or "
            f"digit and is at most {LONGEST} characters and {MOST_NAME_BYTES} bytes long, but {_told(name)} came: "
            "choose another one."
        )
    path = place / f"{stem}{SUFFIX}"
    if path.resolve().parent != place.resolve():
        raise ValueError(f"{title}: the plan {_told(name)} is a link to elsewhere: put the file itself in its place.")
    return path


def path_to_write(title: str, name: str) -> Path:
    """The file that a plan is saved in under a name, as a user may write it.

    Raises:
        ValueError: it is no name, or one of the pack's own plans.
    """
    path = path_of(title, name.strip().removesuffix(SUFFIX))
    if path.parent == OWN:
        raise ValueError(f"{title}: names that end in {OWN_NAMED.strip()} are the pack's own: choose another one.")
    return path


def put_in_place(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a file under another name, and rename it: nobody finds half of it, and a link is replaced, not followed.

    Args:
        write: writes all of it where it is told to.

    Raises:
        OSError: it can't be written.
    """
    part = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(part)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def write(title: str, name: str, plan: Plan) -> Path:
    """Save a plan under a name, in the place of one that has it.

    Raises:
        ValueError: see `path_to_write`.
        RuntimeError: it can't be written.
    """
    path = path_to_write(title, name)
    try:
        put_in_place(path, lambda part: part.write_text(to_json(plan) + "\n", encoding="utf-8"))
    except OSError as error:
        raise RuntimeError(f"{title}: the plan could not be written to {path}: {error.strerror or error}.") from error
    return path


def read(title: str, name: str) -> Plan:
    """The plan of a name.

    Raises:
        ValueError: it is no name, there is no such plan, or its file is none.
    """
    path = path_of(title, name)
    try:
        return from_json(_text(path))
    except FileNotFoundError as error:
        raise ValueError(
            f"{title}: there is no plan {_told(name)}; there are {', '.join(names()) or 'none'}."
        ) from error
    except (PlanError, UnicodeDecodeError, OSError) as error:
        why = "it is no text" if isinstance(error, UnicodeDecodeError) else str(error)
        why = why.removeprefix("The plan can't be used: ").removesuffix(".")
        raise ValueError(f"{title}: {path.name} can't be used: {why}.") from error


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise PlanError(f"it has more than {MOST_BYTES // 1024} KiB, and a plan has a few")
    return data.decode("utf-8")


def fingerprint(name: str) -> str:
    """What changes when the plan of a name does: the host's cache answers for the same one only."""
    try:
        return hashlib.sha256(_text(path_of("Load Plan", name)).encode()).hexdigest()
    except (ValueError, OSError):
        return ""


def _told(name: str) -> str:
    return repr(name if len(name) <= LONGEST else f"{name[:LONGEST]}...")


def described(config: Configuration) -> str:
    """A method and what of its settings is not its default, for a reader: ``CFG Cutoff, cutoff 0.5``."""
    usual: dict[str, Any] = defaults(config.stem)
    settings = [f"{name} {value}" for name, value in asdict(config).items() if usual.get(name) != value]
    return ", ".join([config.title, *settings])


def save(node: type[io.ComfyNode], model: Any, name: str) -> io.NodeOutput:
    """The output of Save Plan: the model as it came, and its plan as JSON."""
    plan = plan_of(model)
    if not plan.entries:
        why = "this model has no Slipstream method on it, so that there is nothing to save"
        return io.NodeOutput(pass_through(node, model, why).result[0], to_json(plan))
    with refusing(node):
        for entry in plan.entries:
            entry.check_agreed()
        path = write("Save Plan", name, plan)
    told = f"saved as {path.stem}: " + "; ".join(described(entry.config) for entry in plan.entries)
    verdicts.publish(verdicts.current_prompt(), node_of(node), verdicts.Line("active", told), {}, (1, "plan"))
    return io.NodeOutput(model, to_json(plan))


def load(node: type[io.ComfyNode], model: Any, name: str) -> io.NodeOutput:
    """The output of Load Plan: the model with the methods of a plan, as suggestions."""
    with refusing(node):
        plan = read("Load Plan", name)
    configs = [entry.config for entry in plan.entries]
    if not configs:
        return pass_through(node, model, f"the plan {name} has no methods in it")
    return suggest(node, model, configs, f"{name}: " + "; ".join(map(described, configs)))
