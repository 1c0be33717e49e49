"""What users get: the files that `comfy node pack` takes, as `.comfyignore` says."""

from __future__ import annotations

import ast
import re
from pathlib import PurePosixPath
from urllib.parse import unquote

import pytest
from loading import ROOT, packed_files

PACKED = set(packed_files())


def test_what_is_packed():
    tops = {PurePosixPath(name).parts[0] for name in PACKED} - {"locales", "subgraphs"}
    folders = {"nodes", "web", "weights", "workflows", "training"}
    assert tops == folders | {"__init__.py", "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE"}
    assert [name for name in PACKED if name.startswith("training/")] == ["training/results/sheet.jpg"]
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


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md"])
def test_the_pictures_of_a_page_come_with_it(name):
    pictures = re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", (ROOT / name).read_text(encoding="utf-8"))
    assert {unquote(picture) for picture in pictures if "://" not in picture} <= PACKED


def test_the_changelog_begins_with_the_version_of_the_pack():
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert next(name for name in sections if name != "Unreleased") == version
