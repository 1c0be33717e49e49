"""The walls of the design: who imports whom, read from the sources."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "nodes"
ENGINE = NODES / "engine"
HOST = {
    *("comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview", "nodes"),
    "server",
}
TOOLS = sorted(path for room in ("compiling", "measuring") for path in (NODES / room).glob("*.py"))
METHODS = sorted(path for path in (NODES / "methods").glob("*.py") if path.stem != "__init__")
NODE_FILES = sorted(path for path in NODES.glob("*.py") if path.stem not in ("__init__", "extension"))
ENGINE_FILES = sorted(ENGINE.rglob("*.py"))

DIRECTIONS = {
    "vae_decode_tiled": "tiled_vae",
    "vae_encode_tiled": "tiled_vae",
    "save_plan": "saved_plans",
    "load_plan": "saved_plans",
}
"""Nodes that are the two directions of one method share its part of the engine."""


SUGGESTED = {"winograd": "cpu"}
"""Methods that have no node of their own, and the node that adds them along with others."""

FLOORS = (
    ("nodes",),
    ("engine",),
    ("engine/vae",),
    ("engine/inputs.py",),
    ("engine/node.py",),
    ("engine/apply.py",),
    ("engine/run",),
    ("engine/model", "engine/telling"),
    ("engine/host", "engine/plan"),
    ("methods",),
    ("compiling", "measuring"),
)
"""From top to bottom. What is on one floor imports what is below it, never what is beside or above it. `engine` is the
files of single nodes, on top of the rooms; `inputs.py` and `node.py` are what they have in common, `apply.py` what
needs no node."""


def part_of(stem: str) -> str:
    """The stem of a node's method and of its part of the engine."""
    return DIRECTIONS.get(stem, stem)


def imports(path: Path) -> set[str]:
    """What a file imports anywhere in it: absolute names, and relative ones with their dots."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def imported_files(path: Path) -> set[Path]:
    """The files of the pack that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
            for alias in node.names:
                tried = (base / alias.name / "__init__.py", base / f"{alias.name}.py", base / "__init__.py")
                found.add(next((file for file in tried if file.is_file()), base.with_suffix(".py")))
    return found


def floor_of(path: Path) -> tuple[int, str]:
    """The floor of a file of the pack, and the room that it is in."""
    name = path.relative_to(NODES).as_posix()
    room = name if (name,) in FLOORS else path.parent.relative_to(NODES).as_posix()
    room = "nodes" if room == "." else room
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms), room


def wrong_way(path: Path) -> list[str]:
    """The imports of a file that go up, or into the room next door. What a room's own files import of each other, the
    test for circles sees."""
    (floor, room), name = floor_of(path), path.relative_to(NODES).as_posix()
    found = []
    for other in sorted(imported_files(path)):
        other_floor, other_room = floor_of(other)
        if other_room != room and other_floor <= floor:
            found.append(f"{name} ({room}) imports {other.relative_to(NODES).as_posix()} ({other_room})")
    return found


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_methods_import_neither_the_host_nor_each_other_nor_the_engine(path):
    for name in imports(path):
        assert name.split(".")[0] not in HOST
        # What compiles serves a method and the VAE's node, and knows neither.
        assert not name.startswith(".") or name == ".method" or name.startswith("..compiling")


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: f"{path.parent.stem}.{path.stem}")
def test_tools_import_neither_the_host_nor_anything_else_of_the_pack(path):
    for name in imports(path):
        assert name.split(".")[0] not in HOST
        assert name.lstrip(".") in {other.stem for other in path.parent.glob("*.py")} or not name.startswith(".")


@pytest.mark.parametrize("path", NODE_FILES, ids=lambda path: path.stem)
def test_a_node_imports_the_api_the_engine_and_its_own_method_or_part_of_the_engine(path):
    part = part_of(path.stem)
    own = {f".methods.{stem}" for stem in (part, *(stem for stem, node in SUGGESTED.items() if node == part))}
    assert imports(path) <= {"comfy_api.latest", ".engine", f".engine.{part}", f".engine.vae.{part}", *own}


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_imports_in_the_engine_run_one_way(path):
    assert not wrong_way(path)


def test_nothing_in_the_pack_imports_in_a_circle():
    """Not even where only a type is meant."""
    files = [path for path in NODES.rglob("*.py") if path.name != "__init__.py"]
    graph = {path: {other for other in imported_files(path) if other.name != "__init__.py"} for path in files}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" is imported by ".join(path.relative_to(NODES).as_posix() for path in error.args[1]))


@pytest.mark.parametrize(
    "room", [ENGINE, *sorted(path.parent for path in ENGINE.glob("*/__init__.py"))], ids=lambda path: path.name
)
def test_a_room_says_what_it_is_in_one_line(room):
    text = (room / "__init__.py").read_text()
    if room != ENGINE:
        assert ast.get_docstring(ast.parse(text)) == text.strip().strip('"')
        assert len(text.splitlines()) == 1
    assert {f"engine/{path.name}" for path in ENGINE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= {
        name for floor in FLOORS for name in floor
    }


def in_plans() -> set[str]:
    """The stems of the methods that a model's plan can have: the rows of the registry."""
    registry = ast.parse((ENGINE / "plan" / "registry.py").read_text())
    (table,) = (node.value for node in registry.body if isinstance(node, ast.Assign))
    return set(ast.literal_eval(table))


@pytest.mark.parametrize("path", ENGINE_FILES, ids=lambda path: path.relative_to(ENGINE).as_posix())
def test_the_engine_imports_of_the_methods_only_what_a_method_is(path):
    """Those in a plan come to it as configurations. A VAE has no plan: its part of the engine imports its method."""
    methods = {other.stem for other in imported_files(path) if other.parent == NODES / "methods"}
    assert not methods & in_plans()


def test_the_root_imports_nothing_at_module_level():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not any(isinstance(node, (ast.Import, ast.ImportFrom)) for node in tree.body)


def test_one_stem_everywhere():
    """A method in a plan has a node of its name, or is one of several that a node adds; any other node has its part of
    the engine, and any other method is used there. Each method has a test."""
    stems = {path.stem for path in METHODS} - {"method"}
    nodes = {path.stem for path in NODE_FILES}
    assert in_plans() - set(SUGGESTED) < nodes
    assert set(SUGGESTED.values()) < nodes
    parts = {path.stem for path in (*ENGINE.glob("*.py"), *(ENGINE / "vae").glob("*.py"))}
    assert {part_of(stem) for stem in nodes - in_plans()} <= parts
    assert all((ROOT / "tests" / "unit" / f"test_{stem}.py").exists() for stem in stems)
    used = {other.stem for path in ENGINE_FILES for other in imported_files(path) if other.parent.name == "methods"}
    assert in_plans() <= stems
    assert stems - in_plans() <= used
