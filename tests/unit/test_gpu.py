"""The program for a GPU, with stand-ins for its parts: what each may do to the others, and to the time."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import pytest
from loading import ROOT

PROGRAM = ROOT / "benchmarks" / "gpu.py"

STANDINS = """
import os, signal, subprocess, sys, time
from collections import namedtuple

Part = namedtuple("Part", "name title seconds")
PARTS = (
    Part("good", "Good", 2), Part("failing", "Failing", 2), Part("hanging", "Hanging", 2), Part("dying", "Dying", 2),
    Part("full", "Full", 2), Part("partly", "Partly", 2), Part("late", "Late", 2), Part("much", "Much", 600),
)


def prepare(is_tiny):
    print("a package prints this")


def about():
    return {"device": "none", "tiny": "--tiny" in sys.argv}


def clean_up():
    pass


def good(bench):
    print("and this")
    bench.keep("figure", 1)
    bench.keep("figure", 2)
    bench.leave_out("another", "it is not here")


def failing(bench):
    bench.keep("before", 1)
    raise ValueError("broken\\nand a second line")


def hanging(bench):
    bench.keep("before", 1)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    bench.keep("child", child.pid)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)


def dying(bench):
    bench.keep("before", 1)
    os.kill(os.getpid(), signal.SIGKILL)


def full(bench):
    raise MemoryError("out of memory")


def partly(bench):
    for name in ("one", "two", "three"):
        with bench.trying(name):
            bench.keep(name, 1 / (name != "two"))


def late(bench):
    bench.keep("has_time", bench.left() > 0)


def much(bench):
    bench.keep("begun", True)


def page(data):
    return f"{len(data['parts'])} parts\\n"
"""


@pytest.fixture
def standins(tmp_path):
    path = tmp_path / "standins.py"
    path.write_text(STANDINS)
    return path


def run(standins, *options, minutes=0.7):
    folder = standins.parent / "results"
    command = [sys.executable, PROGRAM, "--parts", standins, "--minutes", str(minutes), "--output", folder, *options]
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True)
    return done, json.loads((folder / "figures.json").read_text()), time.monotonic() - began


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split(") ")[1][0] != "Z"
    except OSError:
        return False


def test_what_one_part_does_costs_that_part_only_and_all_of_it_ends_in_time(standins):
    # Of the time a part may have what those after it don't need: the one that hangs would take most of it.
    standins.write_text(STANDINS.replace('Part("hanging", "Hanging", 2)', 'Part("hanging", "Hanging", 2.5)'))
    done, data, took = run(standins)
    assert done.returncode == 0, done.stderr
    assert took < 60 * 0.7 + 5
    parts = data["parts"]
    assert {name: part["status"] for name, part in parts.items()} == {
        "good": "done",
        "failing": "failed",
        "hanging": "hung",
        "dying": "died",
        "full": "failed",
        "partly": "done",
        "late": "done",
        "much": "left out",
    }
    assert parts["good"]["figures"] == {"figure": 2}
    assert parts["good"]["left_out"] == {"another": "it is not here"}
    assert parts["failing"]["figures"] == {"before": 1}
    assert parts["failing"]["why"].startswith("ValueError: broken (standins.py:")
    assert parts["hanging"]["why"] == "it went on past its share of the time"
    assert not is_running(parts["hanging"]["figures"]["child"])
    assert parts["dying"]["figures"] == {"before": 1}
    assert "ended with code -9" in parts["dying"]["why"]
    assert parts["full"]["why"].startswith("MemoryError: out of memory")
    assert parts["partly"]["figures"] == {"one": 1.0, "three": 1.0}
    assert parts["partly"]["failed"]["two"].startswith("ZeroDivisionError: ")
    assert parts["late"]["figures"] == {"has_time": True}
    assert "were left, and it needs 600" in parts["much"]["why"]
    assert data["about"] == {"device": "none", "tiny": False}
    assert sorted(path.name for path in (standins.parent / "results").iterdir()) == [
        "README.md",
        "figures.json",
        "log.txt",
    ]
    assert "a package prints this" in (standins.parent / "results" / "log.txt").read_text()


def test_one_part_again_leaves_what_is_known_of_the_others(standins):
    run(standins, "--only", "good", "partly")
    _, data, _ = run(standins, "--only", "failing", "--tiny")
    assert {name: part["status"] for name, part in data["parts"].items()} == {
        "good": "done",
        "partly": "done",
        "failing": "failed",
    }
    assert data["about"]["tiny"]
    assert (standins.parent / "results" / "README.md").read_text() == "3 parts\n"


def test_a_part_that_is_none_is_told(standins):
    folder = standins.parent / "results"
    command = [sys.executable, PROGRAM, "--parts", standins, "--only", "nothing", "--output", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("gpu: --only takes good, failing, hanging, ")
    assert not folder.exists()


def test_where_nothing_can_begin_it_says_so_once(standins):
    standins.write_text(STANDINS.replace('print("a package prints this")', 'raise RuntimeError("no GPU here")'))
    done, data, took = run(standins, "--only", "good", "failing")
    assert done.returncode == 1
    assert took < 10
    assert {name: part["status"] for name, part in data["parts"].items()} == {"good": "unable", "failing": "left out"}
    for part in data["parts"].values():
        assert part["why"].startswith("nothing could begin: RuntimeError: no GPU here (standins.py:")
    assert "Traceback" in (standins.parent / "results" / "log.txt").read_text()
