"""Loads the pack as the host does, and skips what needs a host where there is none."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from loading import ROOT, find_chromium, find_comfyui, find_node, load_host, load_pack
from workers import pytest_xdist_make_scheduler  # noqa: F401, pytest's own hook

COMFYUI = find_comfyui()
MISSING = {
    "host": None if COMFYUI else "no ComfyUI was found (set COMFYUI_PATH)",
    "e2e": None if COMFYUI and find_chromium() else "no ComfyUI or no Chromium was found",
}

# At import: pytest imports the suites' own conftest files, which import the host, before any hook runs.
load_pack()
if COMFYUI is not None:
    load_host(COMFYUI)
    import torch

    # The models are tiny: a second thread gains nothing, and loses all where something else runs.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="what is marked long, and that alone")
    parser.addoption("--quick", action="store_true", help="what a change is usually broken by, in under three minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is long; or, if that is asked for, all else."""
    wanted = []
    for item in items:
        is_long = any(item.get_closest_marker(name) for name in long_marks(item))
        is_left_out = is_long != config.getoption("long") or (config.getoption("quick") and not is_quick(item))
        wanted += [] if is_left_out else [item]
    config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
    items[:] = sorted(wanted, key=place)


EARLY = ("test_engine.py", "test_tune.py", "test_works_with.py")
"""Of the host's suite, the files that take longest: a worker that begins one of them last keeps all others waiting."""


def place(item: pytest.Item) -> int:
    """When a test's turn is: the browser's suite takes longest of all."""
    return 0 if "e2e" in item.path.parts else 1 if item.path.name in EARLY else 2


def long_marks(item: pytest.Item) -> list[str]:
    """The marks that make a test long. The browser's two renderers show the same elements: some of what one draws is
    drawn by the other where there is time."""
    params = getattr(item, "callspec", SimpleNamespace(params={})).params
    return ["long", *(["long_in_vue"] if params.get("renderer") == "vue" else [])]


QUICK = ("cfg_cutoff", "engine", "help_pages", "metadata", "nodes", "plan", "recipe", "report")
"""Files of the host's suite that whatever is changed is held to: what all nodes promise, and what is told."""


def is_quick(item: pytest.Item) -> bool:
    suite, *_, file = item.path.relative_to(ROOT / "tests").with_suffix("").parts
    return suite == "unit" or (suite == "host" and file.removeprefix("test_") in QUICK)


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave out what cannot run here. Not even imported: a host test imports the host at its top."""
    tests = ROOT / "tests"
    if collection_path != tests and collection_path.is_relative_to(tests):
        return True if MISSING.get(collection_path.relative_to(tests).parts[0]) else None
    return None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for suite, reason in MISSING.items():
        if reason:
            terminalreporter.write_line(f"SKIPPED the {suite} suite: {reason}.")
    if COMFYUI and not find_node():
        terminalreporter.write_line("SKIPPED the commands on graphs: no node was found (playwright has one).")
