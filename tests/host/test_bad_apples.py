"""One bad apple: whatever is broken, in the pack or beside it, the nodes that do not need it are there."""

from __future__ import annotations

import importlib
import json
import logging
import subprocess
import sys
from pathlib import Path

import hosted
import pytest
from hosted import NODES
from loading import PACK

BROKEN = {
    "kornia": OSError("a broken DLL"),
    "onediff": Exception("others"),
    "openvino": ImportError("no such name"),
    "sfast": SystemExit("needs a GPU"),
    "torch_tensorrt": RuntimeError("another torch"),
    "torch_xla": OSError("a broken DLL"),
    "torchao": SystemExit("needs a GPU"),
    "triton": OSError("a broken DLL"),
}
"""What a node may import, and what importing it raises. ComfyUI itself does not start without psutil and scipy."""

PROBE = """
import asyncio, importlib, json, logging, sys
from pathlib import Path

tests, stubs = sys.argv[1:]
sys.path.insert(0, tests)
from loading import PACK, load_all

load_all()
import torch
import comfy.sd

# The newest hosts import dynamo, and with it Triton, themselves, and do not start where that is broken; others do not.
sys.path.insert(0, stubs)
broken = ["torch._dynamo", *(path.name for path in Path(stubs).iterdir())]
for name in [name for name in sys.modules if any(f"{name}.".startswith(f"{other}.") for other in broken)]:
    del sys.modules[name]
del torch._dynamo

class Lines(logging.Handler):
    told = []
    def emit(self, record):
        self.told.append(record.getMessage())

def part(name):
    return importlib.import_module(f"{PACK}.nodes.{name}")

def reasons():
    settings = part("methods.compile_model").CompileModel()
    return {
        name: backend.availability(torch.device(backend.devices[0]), settings)
        for name, backend in part("compiling.backends").ALL.items()
    }

logging.getLogger(PACK).addHandler(Lines())
nodes = asyncio.run(part("extension").SlipstreamExtension().get_node_list())
told = {"nodes": [node.GET_SCHEMA().node_id for node in nodes], "log": Lines.told, "compiler": reasons()}
part("compiling.backends").missing_dynamo = lambda: None
told["backends"] = reasons()
told["quantize"] = part("methods.quantize").lacking("int8 dynamic", "cpu")
try:
    part("engine.benchmark").check_kornia("Benchmark")
except RuntimeError as error:
    told["benchmark"] = str(error)
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def beside_broken_packages(tmp_path_factory):
    """What a new process tells in which each optional package is there, and broken."""
    folder = tmp_path_factory.mktemp("broken")
    for name, error in BROKEN.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(f"raise {error!r}")
    command = [sys.executable, "-c", PROBE, str(Path(__file__).parents[1]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def loaded(caplog):
    """Loads the nodes: what the host gets, and the lines of the log."""

    def load():
        caplog.clear()
        with caplog.at_level(logging.INFO, PACK):
            nodes = [node.define_schema().node_id for node in hosted.load_nodes()]
        return nodes, [record.getMessage() for record in caplog.records if record.name.startswith(PACK)]

    return load


@pytest.mark.parametrize(("file", "name"), importlib.import_module(f"{PACK}.nodes").NODES)
def test_each_node_that_cannot_be_imported_leaves_all_others_with_one_line_in_the_log(file, name, loaded, monkeypatch):
    monkeypatch.setitem(sys.modules, f"{PACK}.nodes.{file}", None)  # importing it raises
    nodes, (line,) = loaded()
    assert nodes == [other for other in NODES if other != name]
    assert line.startswith(f"Slipstream: could not load, and leaves out, {name}: ModuleNotFoundError(")


@pytest.mark.parametrize("error", [AttributeError("of another host"), SystemExit("needs\na GPU")])
def test_a_node_whose_schema_fails_is_left_out_alone(error, loaded, monkeypatch):
    def fail():
        raise error

    monkeypatch.setattr(NODES["SlipstreamFreeU"], "define_schema", fail)
    expected = [node for node in NODES if node != "SlipstreamFreeU"]
    nodes, (line,) = loaded()
    assert nodes == expected
    assert "\n" not in line


def test_nodes_that_fail_for_one_reason_are_told_in_one_line(loaded, monkeypatch):
    bad = ("tiled_vae", "vae_decode_tiled", "vae_encode_tiled")
    for name in bad:
        monkeypatch.delitem(sys.modules, f"{PACK}.nodes.{name}", raising=False)
    monkeypatch.setitem(sys.modules, f"{PACK}.nodes.engine.vae.tiled_vae", None)
    nodes, (line,) = loaded()
    assert nodes == [name for name in NODES if "Tiled" not in name]
    assert "SlipstreamVAEDecodeTiled, SlipstreamVAEEncodeTiled: " in line


def test_packages_that_cannot_be_imported_cost_no_node(beside_broken_packages):
    assert beside_broken_packages["nodes"] == list(NODES)
    assert beside_broken_packages["log"] == []


def test_a_node_that_needs_a_broken_package_says_what_it_is_what_happened_and_what_to_do(beside_broken_packages):
    told = beside_broken_packages
    for name, reason in told["compiler"].items():
        assert reason.startswith(f"{name} needs torch's compiler, which can't be imported (OSError: a broken DLL). ")
        assert "pip install" in reason
    # OpenVINO's needs dynamo for its own import.
    packages = {"tensorrt": "torch_tensorrt", "onediff": "onediff", "stable-fast": "sfast", "xla": "torch_xla"}
    for name, package in packages.items():
        error = BROKEN[package]
        assert f"{name} is installed, but can't be used ({type(error).__name__}: {error})" in told["backends"][name]
        assert "pip install" in told["backends"][name]
    assert "torchao is installed, but can't be used" in told["quantize"]
    assert "(SystemExit: needs a GPU). Install it again: " in told["quantize"]
    assert "kornia, which ComfyUI itself installs, can't be imported (OSError: a broken DLL)" in told["benchmark"]
