"""The walls of the design: who imports whom, read from the sources."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NODES = ROOT / "nodes"
HOST = {
    *("comfy", "comfy_api", "comfy_extras", "comfy_execution", "execution", "folder_paths", "latent_preview", "nodes"),
    "server",
}
TOOLS = sorted(path for room in ("compiling", "measuring") for path in (NODES / room).glob("*.py"))
METHODS = sorted(path for path in (NODES / "methods").glob("*.py") if path.stem != "__init__")
NODE_FILES = sorted(path for path in NODES.glob("*.py") if path.stem not in ("__init__", "extension"))

DIRECTIONS = {"vae_decode_tiled": "tiled_vae", "vae_encode_tiled": "tiled_vae"}
"""Nodes that are the two directions of one method share its part of the engine."""


SUGGESTED = {"winograd": "cpu"}
"""Methods that have no node of their own, and the node that adds them along with others."""


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
    assert imports(path) <= {"comfy_api.latest", ".engine", f".engine.{part}", *own}


def in_plans() -> set[str]:
    """The stems of the methods that a model's plan can have: the rows of the registry."""
    registry = ast.parse((NODES / "engine" / "registry.py").read_text())
    (table,) = (node.value for node in registry.body if isinstance(node, ast.Assign))
    return set(ast.literal_eval(table))


@pytest.mark.parametrize("path", sorted((NODES / "engine").glob("*.py")), ids=lambda path: path.stem)
def test_the_engine_imports_of_the_methods_only_what_a_method_is(path):
    """Those in a plan come to it as configurations. A VAE has no plan: its part of the engine imports its method."""
    for name in imports(path):
        assert not name.startswith("..methods.") or name.removeprefix("..methods.") not in in_plans()


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
    assert all((NODES / "engine" / f"{part_of(stem)}.py").exists() for stem in nodes - in_plans())
    assert all((ROOT / "tests" / "unit" / f"test_{stem}.py").exists() for stem in stems)
    used = set().union(*(imports(path) for path in (NODES / "engine").glob("*.py")))
    assert in_plans() <= stems
    assert {f"..methods.{stem}" for stem in stems - in_plans()} <= used
