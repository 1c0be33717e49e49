"""What users get: the files that `comfy node pack` takes, as `.comfyignore` says."""

from __future__ import annotations

import ast
import hashlib
import re
import struct
from pathlib import PurePosixPath
from urllib.parse import unquote
from xml.etree import ElementTree

import pytest
from loading import ROOT, packed_files

PACKED = set(packed_files())


def test_what_is_packed():
    tops = {PurePosixPath(name).parts[0] for name in PACKED} - {"locales", "subgraphs"}
    folders = {"nodes", "web", "weights", "workflows", "training"}
    pages = {"README.md", "WORKS-WITH.md", "SEVERAL-GPUS.md", "SEVERAL-GPUS.zh.md", "CHANGELOG.md"}
    assert tops == folders | pages | {"__init__.py", "pyproject.toml", "LICENSE"}
    sheets = {f"training/results/{name}.jpg" for name in ("sheet", "sheet-transformer")}
    assert {name for name in PACKED if name.startswith("training/")} == sheets
    kinds = {PurePosixPath(name).suffix for name in PACKED} - {""}
    assert kinds <= {".py", ".js", ".mjs", ".json", ".md", ".jpg", ".png", ".webp", ".safetensors", ".toml"}
    # Its names go through git's listing, which quotes others.
    assert all(name.isascii() for name in PACKED)


def test_what_is_packed_imports_nothing_of_the_repository_that_is_not():
    left_out = {path.stem for path in ROOT.iterdir()} - {PurePosixPath(name).parts[0] for name in PACKED}
    left_out |= {path.stem for folder in ("demo", "tests", "training") for path in (ROOT / folder).glob("*.py")}
    for name in (name for name in PACKED if name.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not {alias.name.split(".")[0] for alias in node.names} & left_out, name
            elif isinstance(node, ast.ImportFrom) and not node.level:
                assert node.module.split(".")[0] not in left_out, name
            elif isinstance(node, ast.ImportFrom):
                base = PurePosixPath(name).parents[node.level - 1].joinpath(*(node.module or "").split("."))
                assert PACKED & {f"{base}.py", f"{base}/__init__.py"}, f"{name} imports {base}"


CONNECTING = {
    "asyncore",
    "ftplib",
    "http",
    "httpx",
    "multiprocessing",
    "requests",
    "smtplib",
    "socket",
    "ssl",
    "subprocess",
}
CONNECTING |= {"telnetlib", "urllib", "urllib3", "websocket", "websockets", "xmlrpc", "huggingface_hub"}
RUNNING = {"exec", "eval", "system", "popen", "spawnl", "spawnv", "fork", "execv", "execl", "urlopen"}


def test_nodes_open_no_connection_start_no_process_and_run_no_text():
    """As the README says. aiohttp is there for the route alone."""
    found = set()
    for name in (name for name in PACKED if name.endswith(".py")):
        for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {(name, alias.name.split(".")[0]) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add((name, node.module.split(".")[0]))
            elif isinstance(node, ast.Call):
                called = node.func
                is_own = isinstance(called, ast.Attribute) and ast.unparse(called.value) not in ("os", "builtins")
                word = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
                if word in RUNNING and not is_own:
                    found.add((name, word))
    assert not {(name, word) for name, word in found if word in CONNECTING | RUNNING}
    assert {name for name, word in found if word == "aiohttp"} == {"nodes/engine/telling/verdicts.py"}
    assert {name for name, word in found if word == "ctypes"} == {"nodes/engine/host/machine.py"}


def test_what_is_vendored_is_what_is_said_beside_it():
    folder = ROOT / "web" / "vendor"
    told = (folder / "README.md").read_text(encoding="utf-8")
    vendored = (folder / "echarts" / "echarts.esm.min.mjs").read_bytes()
    assert re.search(r"`(\w{64})`", told)[1] == hashlib.sha256(vendored).hexdigest()
    assert f'"{re.search(r"npm `echarts@([0-9.]+)`", told)[1]}"'.encode() in vendored


@pytest.mark.parametrize(("name", "width", "height"), [("icon", 400, 400), ("banner", 1680, 720)])
def test_the_registry_s_pictures_have_its_sizes(name, width, height):
    """A square of at most 400 pixels, and 21:9."""
    data = (ROOT / "art" / f"{name}.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", data[16:24]) == (width, height)
    drawn = ElementTree.parse(ROOT / "art" / f"{name}.svg").getroot()
    assert drawn.get("viewBox") == f"0 0 {width} {height}"


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_pictures_of_a_page_come_with_it(name):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert {unquote(picture) for picture in pictures if "://" not in picture} <= PACKED


def test_the_changelog_begins_with_the_version_of_the_pack():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == version
