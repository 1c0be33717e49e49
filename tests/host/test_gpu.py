"""The program for a GPU in small: all its parts run, and what is packed for a machine without a network runs there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from loading import ROOT, find_comfyui
from packaging.utils import canonicalize_name

ONE_THREAD = {"OMP_NUM_THREADS": "1"}


PARTS = ("holds", "sdxl", "vae", "transformer", "offload", "sparse", "sync")


def check(folder: Path) -> None:
    """Every part ran to its end, all that is checked holds, and nothing failed."""
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "figures.json", "log.txt"]
    data = json.loads((folder / "figures.json").read_text())
    assert data["about"]["comfyui"]
    ends = {name: (part["status"], part["why"], part["failed"]) for name, part in data["parts"].items()}
    assert ends == dict.fromkeys(PARTS, ("done", "", {}))
    check_that_all_holds(data["parts"]["holds"]["figures"])
    for part in set(PARTS) - {"holds"}:
        figures = [figure for figure in data["parts"][part]["figures"].values() if "seconds" in figure]
        assert figures
        assert all(figure["first_s"] > 0 and min(figure["seconds"]) > 0 for figure in figures)
    # A plan that does nothing, and budgets, change no bit.
    for part in ("offload", "sync"):
        assert {figure.get("error", 0) for figure in data["parts"][part]["figures"].values()} == {0}
    assert "What it gives: a transformer" in (folder / "README.md").read_text()


def check_that_all_holds(figures: dict[str, Any]) -> None:
    broken = {name: figure for name, figure in figures.items() if not figure_holds(figure)}
    assert not broken
    assert len(figures) > 40


def figure_holds(figure) -> bool:
    return not isinstance(figure, dict) or figure["holds"]


@pytest.mark.long
def test_it_runs_in_small(tmp_path):
    command = [sys.executable, ROOT / "slipstream", "gpu", "--tiny", "--output", "results", "--only", *PARTS]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | ONE_THREAD, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(tmp_path / "results")


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("unshare"), reason="a network can't be switched off")
def test_what_is_packed_runs_without_a_network_where_nothing_else_is(tmp_path):
    pack, bare, empty = (tmp_path / name for name in ("pack", "bare", "empty"))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, ROOT / "slipstream", "gpu", "--pack", pack, "--python", version]
    subprocess.run(command, env=os.environ | {"COMFYUI_PATH": str(find_comfyui())}, check=True)
    files = [path for path in pack.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50 * 2**20
    assert (pack / ".gitignore").read_text() == "*\n"

    packed = {canonicalize_name(path.name.split("-")[0]) for path in (pack / "wheels").iterdir()}
    assert {"av", "comfy-aimdo", "comfy-kitchen", "torchsde", "trampoline", "torchao"} <= packed
    venv.create(bare, with_pip=False, symlinks=True)
    python, site = bare / "bin" / "python", bare / "lib" / f"python{version}" / "site-packages"
    link_all_but(packed, site)
    assert subprocess.run([python, "-c", "import torchsde"], capture_output=True).returncode == 1

    empty.mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    variables |= ONE_THREAD | {"HOME": str(empty)}
    command = ["unshare", "--map-root-user", "--net", python, pack / "run.py", "--tiny"]
    done = subprocess.run(command, cwd=empty, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check(empty / "results")


def link_all_but(packages: set[str], site: Path) -> None:
    """Fill an environment with what this one has, less some packages."""
    for distribution in distributions():
        if canonicalize_name(distribution.metadata["Name"]) in packages:
            continue
        tops = {file.parts[0] for file in distribution.files or () if not file.parts[0].startswith("..")}
        for top in tops:
            place = Path(str(distribution.locate_file(top)))
            if place.exists() and not (site / top).exists():
                (site / top).symlink_to(place)
