"""Compile Model without a host: settings, what is missing, what is told, and what compiled functions keep apart."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import sysconfig
import threading
import time

import pytest
import torch
from loading import PACK

backends = importlib.import_module(f"{PACK}.nodes.compiling.backends")
functions = importlib.import_module(f"{PACK}.nodes.compiling.functions")
installs = importlib.import_module(f"{PACK}.nodes.compiling.installs")
settings = importlib.import_module(f"{PACK}.nodes.compiling.settings")
tally = importlib.import_module(f"{PACK}.nodes.compiling.tally")
CompileModel = importlib.import_module(f"{PACK}.nodes.methods.compile_model").CompileModel

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


# Settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backend": "tvm"}, "backend must be one of auto, inductor.*'tvm'"),
        ({"mode": "fast"}, "mode must be one of default, reduce-overhead"),
        ({"scope": "layers"}, "scope must be one of blocks, model"),
        ({"dynamic": "yes"}, "dynamic must be one of auto, on, off"),
        (
            {"backend": "inductor", "mode": "reduce-overhead"},
            "reduce-overhead records CUDA graphs.*scope to model",
        ),
        ({"backend": "inductor", "mode": "max-autotune"}, "max-autotune-no-cudagraphs"),
    ],
)
def test_settings_that_cannot_be_say_what_can(values, message):
    with pytest.raises(ValueError, match=f"Compile Model: .*{message}"):
        CompileModel(**values)


def test_backends_that_take_all_of_a_model_need_no_scope():
    assert all(CompileModel(backend=name).is_whole for name in ("cudagraphs", "onediff", "stable-fast"))
    assert not CompileModel(backend="inductor").is_whole
    assert CompileModel(backend="inductor", scope="model").is_whole


# What is missing


def missing(name, device=CPU, **values):
    return backends.ALL[name].availability(device, CompileModel(backend=name, **values))


def test_every_backend_of_the_settings_is_there():
    assert set(settings.BACKENDS) - {"eager"} == set(backends.ALL) - {"eager"}
    assert set(backends.AUTO) <= set(backends.ALL)


@pytest.mark.parametrize("name", list(installs.INSTALL))
def test_a_package_that_is_not_installed_is_named_with_the_line_that_installs_it(name, monkeypatch):
    found = importlib.util.find_spec
    package = backends.ALL[name].package
    monkeypatch.setattr(importlib.util, "find_spec", lambda wanted, *_: None if wanted == package else found(wanted))
    reason = missing(name, torch.device(backends.ALL[name].devices[0]))
    assert reason == f"{name} is not installed. Install it with: {backends.install_line(name)}"
    assert sys.executable in reason
    assert "{" not in reason


@pytest.mark.parametrize(
    "error", [RuntimeError("OneFlow is not installed"), OSError("libcuda"), Exception("TensorRT"), SystemExit("no GPU")]
)
@pytest.mark.parametrize("name", list(installs.INSTALL))
def test_a_package_that_is_broken_or_a_placeholder_is_one_sentence(name, error, monkeypatch):
    def fail(module):
        raise error

    monkeypatch.setattr(importlib.util, "find_spec", lambda *_: True)
    monkeypatch.setattr(importlib, "import_module", fail)
    reason = missing(name, torch.device(backends.ALL[name].devices[0]))
    assert reason.startswith(f"{name} is installed, but can't be used ({type(error).__name__}: {error}). ")
    assert reason.endswith(backends.install_line(name))


def test_without_a_compiler_inductor_says_how_to_get_one(monkeypatch):
    assert missing("inductor") is None
    monkeypatch.setattr(shutil, "which", lambda _: None)
    assert "needs a C++ compiler" in missing("inductor")
    monkeypatch.undo()
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": "/nowhere"})
    assert "Python.h was not found" in missing("inductor")


def test_without_triton_inductor_says_how_to_get_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "triton" else found(name))
    assert "inductor needs Triton" in missing("inductor", CUDA)
    assert "pip install triton" in missing("inductor", CUDA)


@pytest.mark.skipif(importlib.util.find_spec("onediff") is None, reason="onediff is not installed")
def test_onediffs_placeholder_of_oneflow_is_one_sentence():
    reason = missing("onediff", onediff_backend="oneflow")
    assert reason.startswith("OneDiff's backend oneflow can't be used (")
    assert "set onediff_backend" in reason
    assert "invalid backend" in missing("onediff", onediff_backend="nobody") or "No module" in missing(
        "onediff", onediff_backend="nobody"
    )


def test_auto_says_why_there_is_none(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(backends, "AUTO", ("inductor", "tensorrt"))
    with pytest.raises(RuntimeError, match=r"no backend is available\. inductor needs a C\+\+.*tensorrt"):
        backends.find(CompileModel(), CPU)


# What is told


def test_the_sentence():
    told = tally.Tally(
        "inductor", "UNet call", "38 blocks", calls=20, graphs=18, new_graphs=18, compile_s=62.4, cached=3
    )
    assert told.sentence() == "inductor: 38 blocks in 18 graphs, compiled in 62 s, 3 from the disk cache"
    told = tally.Tally("inductor", "UNet call", "the UNet", calls=20, graphs=1, ratio=1.314)
    assert told.sentence() == "inductor: the UNet in 1 graph, compiled earlier; each UNet call 1.31x as fast as without"
    told.ratio = 0.97
    assert told.sentence().endswith("each UNet call as fast as without")
    told.ratio = 0.8
    assert told.sentence().endswith("each UNet call slow, 1.25 times as long as without")
    told = tally.Tally("openvino", "UNet call", "38 blocks", calls=2, graphs=36, new_graphs=18, compile_s=5)
    told.recompiled["batch 2 to 1"] = 18
    told.outside["attend"] = 8
    told.breaks["a print"] = 2
    told.eager["a hook"] = 3
    assert told.sentence() == (
        "openvino: 38 blocks in 36 graphs, 18 of them new, compiled in 5 s; recompiled 18 graphs: batch 2 to 1; "
        "2 graph breaks: a print; left to torch: 8 x attend; a hook (3 times)"
    )
    assert tally.Tally("inductor", "UNet call").sentence() == "compiled nothing: there was no UNet call"
    told = tally.Tally("inductor", "UNet call")
    told.eager["no block can be compiled"] = 2
    told.notes["a reason"] = None
    assert told.sentence() == "compiled nothing: no block can be compiled (2 times); a reason"


@pytest.mark.parametrize(
    ("without", "steady", "expected"),
    [
        ([2.0, 2.1, 2.0], [1.0, 1.0, 1.1], 2.0),
        ([2.0, 2.1], [1.0, 1.0, 1.1], None),  # too few
        ([2.0, 2.1, 2.0], [1.0, 1.0], None),
        ([2.0, 9.0, 9.5], [1.0, 1.0, 1.1], None),  # they scatter
        ([2.0, 2.1, 2.0], [1.0, 4.0, 4.0], None),
    ],
)
def test_a_ratio_is_told_only_where_there_is_one(without, steady, expected):
    assert functions.ratio(without, steady) == expected


# Compiled functions


class Graphs(backends.Backend):
    """Runs dynamo's graphs as they are."""

    name = "graphs"

    def compile_graph(self, graph, inputs, settings, tally):
        return graph.forward


def double(module, x):
    return module(x) * 2


@pytest.fixture
def compiler():
    torch._dynamo.pgo.reset_code_state()
    made = functions.Compiler(CompileModel(backend="inductor"), Graphs())
    made.begin(tally.Tally("graphs", "call", "a layer"), None)
    return made


def run(compiler, key, module, x):
    return compiler.call({"size": x.shape[0]}, lambda: compiler.function(key, double)(module, x), None)


def test_modules_of_one_kind_share_a_graph_and_each_has_its_own_weights(compiler):
    first, second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(run(compiler, "linear", first, x), first(x) * 2)
        assert torch.equal(run(compiler, "linear", second, x), second(x) * 2)
        first.weight.mul_(3)
        assert torch.equal(run(compiler, "linear", first, x), first(x) * 2)
    assert compiler.graphs == 1


def test_a_kind_learns_nothing_of_another_kinds_sizes(compiler):
    """Dynamo would take the second kind's width for one that changes."""
    with torch.no_grad():
        run(compiler, "narrow", torch.nn.Linear(4, 4), torch.randn(3, 4))
        run(compiler, "wide", torch.nn.Linear(8, 8), torch.randn(5, 8))
        assert compiler.graphs == 2
        run(compiler, "wide", torch.nn.Linear(8, 8), torch.randn(6, 8))
    assert compiler.tally.recompiled == {"size 3 to 5": 1, "size 5 to 6": 1}


def test_dynamos_settings_are_back_after_calls_in_several_threads(compiler):
    """On several GPUs, one thread calls while another one has begun: the first to begin may be the first to end."""
    settings = lambda: (torch._dynamo.config.recompile_limit, torch.fx.experimental._config.use_duck_shape)  # noqa: E731
    before, inside, first_is_over = settings(), [], threading.Event()

    def second():
        compiler.call({}, lambda: (first_is_over.wait(5), inside.append(settings())), None)

    thread = threading.Thread(target=second)

    def first():
        thread.start()
        while functions._inside < 2:
            time.sleep(0.01)

    compiler.call({}, first, None)
    first_is_over.set()
    thread.join()
    assert inside == [(functions.VARIANTS, False)]
    assert settings() == before


def test_modules_are_told_apart_by_their_parts():
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    before = functions.fingerprint(module)
    module[1] = torch.nn.SiLU()
    assert functions.fingerprint(module) != before


def test_weights_are_told_apart_by_what_they_are_and_hold():
    layer = torch.nn.Linear(4, 4)
    before = functions.fingerprint(layer)
    assert functions.fingerprint(layer) == before
    with torch.no_grad():
        layer.weight[0, 0] += 1
    after = functions.fingerprint(layer)
    assert after != before
    layer.weight.data = layer.weight.data.clone()
    assert functions.fingerprint(layer) != after
