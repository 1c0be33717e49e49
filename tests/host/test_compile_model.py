"""Compile Model: the eager image from every graph, and a new graph for whatever needs one; told, shared, freed.

Most tests run dynamo's graphs as they are ("eager" of `hosted`): what can go stale is guarded by dynamo, whichever
backend compiles. `./slipstream test --slow` runs them all with inductor.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import re
import subprocess
import sys
import time
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import hosted
import psutil
import pytest
import torch
from comfy.patcher_extension import WrappersMP
from hosted import (
    add_core_freeu,
    add_lora,
    compile_model,
    controlnet,
    latent,
    prompt,
    run_node,
    sample,
    with_control,
)

SLOW = bool(os.environ.get("SLIPSTREAM_SLOW"))
BACKEND = "inductor" if SLOW else "eager"
SCOPES = ("blocks", "model")
BOUND = 1e-3

long = partial(pytest.param, marks=pytest.mark.long)
every_scope = pytest.mark.parametrize("scope", SCOPES)


@pytest.fixture
def tiniest():
    return hosted.model("tiniest")


@pytest.fixture
def fresh():
    """Nothing compiled is left from another test, so that new graphs can be counted."""
    hosted.engine("host.artifacts")._made.clear()
    torch._dynamo.pgo.reset_code_state()  # which sizes have changed so far


def relative(image: torch.Tensor, expected: torch.Tensor) -> float:
    return float((image - expected).abs().max() / expected.abs().max())


def close(image: torch.Tensor, expected: torch.Tensor) -> bool:
    """The eager bits from dynamo's graphs, and what rounding leaves of them from inductor's."""
    return relative(image, expected) < BOUND if SLOW else torch.equal(image, expected)


@pytest.fixture
def tallies(monkeypatch):
    """Those of the runs that follow, in order."""
    tallies = []
    kind = hosted.engine("model.compile_model").Compiling
    init = kind.__init__

    def recording(self, *args):
        init(self, *args)
        tallies.append(self.tally)

    monkeypatch.setattr(kind, "__init__", recording)
    return tallies


# Changes: what is put on both models, the compiled and the plain one, and how a run differs.


class Scaling:
    """A patch with a value of its own, which a stale graph would keep."""

    def __init__(self, factor):
        self.factor = factor

    def __call__(self, n, extra):
        return n * self.factor


def attention_output(factor):
    def change(patcher):
        clone = patcher.clone()
        clone.set_model_attn1_output_patch(Scaling(factor))
        return clone

    return change


def attention_replaced(factor, name="attn2"):
    def change(patcher):
        clone = patcher.clone()
        replace = lambda q, k, v, extra: q * factor + extra["n_heads"]  # noqa: E731
        (clone.set_model_attn1_replace if name == "attn1" else clone.set_model_attn2_replace)(replace, "input", 1)
        return clone

    return change


def attention_overridden(factor):
    def change(patcher):
        clone = patcher.clone()
        override = lambda function, *args, **kwargs: function(*args, **kwargs) * factor  # noqa: E731
        clone.model_options["transformer_options"]["optimized_attention_override"] = override
        return clone

    return change


def wrapped(factor, kind=WrappersMP.DIFFUSION_MODEL):
    def change(patcher):
        clone = patcher.clone()
        wrapper = lambda executor, *args, **kwargs: executor(*args, **kwargs) * factor  # noqa: E731
        clone.add_wrapper_with_key(kind, "test", wrapper)
        return clone

    return change


def input_patched(factor):
    def change(patcher):
        clone = patcher.clone()
        clone.set_model_input_block_patch(lambda h, options: h * factor)
        return clone

    return change


def deepcache(interval):
    return lambda patcher: run_node("SlipstreamDeepCache", patcher, "2", cache_interval=interval)


def cutoff(at):
    return lambda patcher: run_node("SlipstreamCFGCutoff", patcher, "3", cutoff=at)


def our_freeu(preset):
    return lambda patcher: run_node("SlipstreamFreeU", patcher, "4", preset=preset)


PATCHES = {
    # name: (two changes, one after the other, whether the first of them needs graphs that were not there)
    "LoRA": (add_lora, lambda p: add_lora(p, seed=4), True),
    "LoRA's strength": (lambda p: add_lora(p, strength=0.5), lambda p: add_lora(p, strength=0.9), True),
    "core FreeU": (lambda p: add_core_freeu(p, b1=1.3), lambda p: add_core_freeu(p, b1=1.6), False),
    "FreeU": (our_freeu("SD 1.5"), our_freeu("SDXL"), False),
    "attention's output": (attention_output(0.5), attention_output(2.0), True),
    "cross-attention replaced": (attention_replaced(0.5), attention_replaced(2.0), True),
    "self-attention replaced": (attention_replaced(0.5, "attn1"), attention_replaced(2.0, "attn1"), True),
    "attention overridden": (attention_overridden(0.5), attention_overridden(2.0), False),
    "UNet wrapped": (wrapped(0.9), wrapped(0.5), False),
    "input block patched": (input_patched(0.9), input_patched(0.5), False),
    "DeepCache": (deepcache(2), deepcache(3), False),
    "CFG Cutoff": (cutoff(0.5), cutoff(0.3), True),
}


LIKE_ANOTHER = ("core FreeU", "LoRA's strength", "cross-attention replaced", "input block patched")
"""Of a kind with one that stays in the ordinary suite."""


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *(long(name, "blocks") if name in LIKE_ANOTHER else (name, "blocks") for name in PATCHES),
        *(long(name, "model") for name in PATCHES),
    ],
)
def test_no_graph_is_used_for_what_it_was_not_made_for(name, scope, model, tallies):
    """After a run without it, then with one value, then with another, then without: the eager image each time."""
    first, second, needs_graphs = PATCHES[name]
    compiled, plain = compile_model(model, backend=BACKEND, scope=scope), sample(model)
    assert close(sample(compiled), plain)
    for change in (first, second):
        eager = sample(change(model))
        assert relative(eager, plain) > BOUND
        assert close(sample(change(compiled)), eager)
        if scope == "blocks" and (change is second or not needs_graphs):
            assert not tallies[-1].new_graphs, tallies[-1].sentence()
    assert close(sample(compiled), plain)
    assert not tallies[-1].new_graphs
    assert torch.equal(sample(model), plain)


INPUTS = {
    # name: (the run's arguments, what the verdict calls the change)
    "resolution": (lambda m: {"image": latent(m, 24)}, "resolution 128x128 to 192x192"),
    "shape": (lambda m: {"image": torch.zeros(1, 4, 16, 24)}, "resolution 128x128 to 192x128"),
    "odd size": (lambda m: {"image": torch.zeros(1, 4, 18, 14)}, "resolution 128x128 to 112x144"),
    "images": (lambda m: {"image": latent(m, batch=2)}, "batch 2 to 4"),
    "unguided": (lambda m: {"cfg": 1.0}, "batch 2 to 1"),
    "prompt length": (
        lambda m: {"positive": prompt(m, 10, tokens=16), "negative": prompt(m, 11, tokens=16)},
        "prompt length 8 to 16",
    ),
}


SHORT = ("resolution", "prompt length")


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        *((pytest.param if name in SHORT else long)(name, "blocks") for name in INPUTS),
        # A whole UNet takes as long as all blocks to trace, for each.
        *(long(name, "model") for name in INPUTS),
    ],
)
def test_other_inputs_get_graphs_of_their_own_named_in_the_verdict(name, scope, tiniest, fresh, tallies):
    make, told = INPUTS[name]
    compiled = compile_model(tiniest, backend=BACKEND, scope=scope)
    first = sample(compiled)
    kwargs = make(tiniest)
    for _ in range(2):
        eager = sample(tiniest, **kwargs)
        assert close(sample(compiled, **kwargs), eager)
    assert tallies[1].new_graphs > 0
    assert list(tallies[1].recompiled) == [told]
    assert not tallies[2].new_graphs
    assert close(sample(compiled), first)
    assert not tallies[3].new_graphs


@pytest.mark.long
@pytest.mark.parametrize("dynamic", ["auto", "on", "off"])
def test_a_third_size_needs_new_graphs_only_where_sizes_are_not_dynamic(dynamic, tiniest, fresh, tallies):
    compiled = compile_model(tiniest, backend=BACKEND, dynamic=dynamic)
    for size in (16, 24, 32):
        assert close(sample(compiled, image=latent(tiniest, size)), sample(tiniest, image=latent(tiniest, size)))
    made = [tally.new_graphs > 0 for tally in tallies]
    assert made == {"auto": [True, True, False], "on": [True, False, False], "off": [True, True, True]}[dynamic]


@pytest.mark.parametrize(
    ("control", "scope"), [("with", "blocks"), long("both", "model"), long("with", "model"), long("both", "blocks")]
)
def test_controlnet_is_followed_and_can_come_and_go(control, scope, model):
    net = controlnet(model)
    compiled = compile_model(model, backend=BACKEND, scope=scope)
    plain = sample(model)
    assert close(sample(compiled), plain)
    positive, negative = (with_control(prompt(model, s), net, both=control == "both") for s in (10, 11))
    eager = sample(model, positive, negative)
    assert relative(eager, plain) > BOUND
    assert close(sample(compiled, positive, negative), eager)
    assert close(sample(compiled), plain)


def edit_in_place(weight, owner):
    weight.mul_(1.5)


def swap_data(weight, owner):
    weight.data = weight.data * 1.5


def assign(weight, owner):
    owner.weight = torch.nn.Parameter(weight * 1.5, requires_grad=False)


@every_scope
@pytest.mark.parametrize("edit", [edit_in_place, swap_data, assign])
def test_weights_that_change_are_followed(edit, scope, model):
    compiled = compile_model(model, backend=BACKEND, scope=scope)
    before = sample(compiled)
    unet = model.model.diffusion_model
    with torch.no_grad():
        for owner in (unet.input_blocks[1][1].transformer_blocks[0].attn1.to_v, unet.input_blocks[1][0].in_layers[2]):
            edit(owner.weight, owner)
    eager = sample(model)
    assert relative(eager, before) > BOUND
    assert close(sample(compiled), eager)


@pytest.mark.parametrize(
    ("family", "scope"),
    [
        *((family, "blocks") for family in ("SD15", "SSD1B")),
        *(long(family, "blocks") for family in ("SD20", "SDXL", "SDXLRefiner")),
        long("SSD1B", "model"),
    ],
)
def test_every_family(family, scope):
    model = hosted.model(family)
    both = lambda p: cutoff(0.5)(deepcache(2)(p))  # noqa: E731
    eager = sample(both(model), steps=4)
    assert close(sample(both(compile_model(model, backend=BACKEND, scope=scope)), steps=4), eager)


# The hazard


def core_compiled(patcher):
    """Core's TorchCompileModel, but for its second copy of the weights."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

    clone = patcher.clone()
    set_torch_compile_wrapper(clone, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return clone


@pytest.mark.long
def test_core_s_node_uses_a_stale_graph_where_ours_does_not(tiniest):
    """It drops every guard on the transformer options: an attention patch put on later is silently not run."""
    core, ours = core_compiled(tiniest), compile_model(tiniest, scope="model")
    sample(core), sample(ours)
    change = attention_output(0.5)
    eager = sample(change(tiniest))
    assert torch.equal(sample(change(ours)), eager)
    assert relative(sample(change(core)), eager) > BOUND


def test_core_s_node_on_the_same_model_is_refused(model):
    with pytest.raises(RuntimeError, match="TorchCompileModel compiles this model already"):
        compile_model(core_compiled(model))
    late = core_compiled(compile_model(model, "7"))
    with pytest.raises(RuntimeError, match="added by node 7"):
        sample(late)


# Graphs: how many, whose, how long


def test_one_graph_for_each_kind_of_block(fresh, tallies):
    """Blocks of equal shape share one, and so do models: 38 blocks of 18 shapes, and none for another checkpoint."""
    first, second = hosted.model("SD15"), hosted.model("SD15", seed=5)
    sample(compile_model(first))
    assert (tallies[0].units, tallies[0].graphs, dict(tallies[0].breaks)) == ("38 blocks", 18, {})
    eager = sample(second)
    assert torch.equal(sample(compile_model(second)), eager)
    assert tallies[1].new_graphs == 0


def test_a_model_that_is_compiled_is_freed_with_its_patcher():
    """The graphs that it shares with others stay."""
    model, other = hosted.model("minimal"), hosted.model("minimal", seed=2)
    compiled, staying = compile_model(model), compile_model(other)
    sample(compiled), sample(staying)
    unet = weakref.ref(model.model.diffusion_model)
    del model, compiled
    gc.collect()
    assert unet() is None


def test_what_was_compiled_goes_a_while_after_its_node(model, fresh, monkeypatch, tallies):
    """And is taken over by a node that comes in its place before. The clock is the test's."""
    artifacts = hosted.engine("host.artifacts")
    waiting = []

    class Timer:
        def __init__(self, seconds, then):
            self.then = then

        def start(self):
            waiting.append(self.then)

    monkeypatch.setattr(artifacts, "threading", SimpleNamespace(Timer=Timer))
    compiled = compile_model(model)
    sample(compiled)
    compiled = compile_model(model)
    gc.collect()
    sample(compiled)
    assert not tallies[1].new_graphs
    waiting.pop()()
    assert len(artifacts._made) == 1
    del compiled
    gc.collect()
    assert len(artifacts._made) == 1
    waiting.pop()()
    gc.collect()
    assert not artifacts._made
    assert not waiting


def test_take_the_node_out_and_the_eager_bits_are_back(model):
    before = sample(model)
    compiled = compile_model(model, backend=BACKEND)
    sample(compiled)
    assert torch.equal(sample(model), before)
    unet = model.model.diffusion_model
    assert not any("forward" in module.__dict__ for module in unet.modules())


@pytest.mark.long
def test_two_differently_compiled_models_in_one_workflow(model):
    other = hosted.model("minimal", seed=8)
    expected = [sample(model), sample(other)]
    compiled = [compile_model(model, backend=BACKEND), compile_model(other, backend=BACKEND, scope="model")]
    for _ in range(2):
        assert all(close(sample(one), eager) for one, eager in zip(compiled, expected, strict=True))


@pytest.mark.parametrize("what", ["another node has a hook inside", "another node replaced its code"])
def test_what_cannot_be_compiled_runs_as_it_is_as_often_as_ever_and_is_told(what, model, tallies):
    """Dynamo would not see it come or go. It may draw random numbers, as Advanced-ControlNet's Reference does."""
    seen = []
    block = model.model.diffusion_model.input_blocks[1][0]
    if "hook" in what:
        block.in_layers[0].register_forward_hook(lambda *_: seen.append(1))
    else:
        forward = block.forward
        block.forward = lambda *inputs: seen.append(1) or forward(*inputs)
    eager = sample(model)
    count = len(seen)
    assert close(sample(compile_model(model, backend=BACKEND)), eager)
    assert len(seen) == 2 * count > 0
    assert f"1 of 15 blocks run without graphs: {what}" in tallies[0].sentence()


def test_a_backend_that_fails_names_itself_and_leaves_the_model_as_it_was(model, fresh, monkeypatch, last_lines):
    compiled, before = compile_model(model), sample(model)

    def fail(*_):
        raise RuntimeError("no such instruction\nand a second line")

    with monkeypatch.context() as patch:
        patch.setattr(hosted.compiling("backends").ALL["eager"], "compile_graph", fail)
        with pytest.raises(RuntimeError, match=r"Compile Model: eager could not compile this model \(.*no such instr"):
            sample(compiled)
    assert last_lines("7")[0][0] == "failed"
    assert torch.equal(sample(model), before)
    assert torch.equal(sample(compiled), before)


@pytest.mark.long
def test_more_variants_than_dynamo_keeps_are_made_anew_and_never_run_without(tiniest, fresh, monkeypatch, tallies):
    monkeypatch.setattr(hosted.compiling("functions"), "VARIANTS", 2)
    compiled = compile_model(tiniest, dynamic="off")
    for size in (16, 24, 32, 40):
        eager = sample(tiniest, image=latent(tiniest, size), steps=2)
        assert torch.equal(sample(compiled, image=latent(tiniest, size), steps=2), eager)
    assert any("all were made anew" in tally.sentence() for tally in tallies)
    assert all(tally.new_graphs for tally in tallies)


def test_nothing_of_dynamos_settings_is_left_changed(tiniest):
    import torch._dynamo.config
    import torch.fx.experimental._config

    before = torch._dynamo.config.get_config_copy(), torch.fx.experimental._config.get_config_copy()
    sample(compile_model(tiniest))
    if importlib.util.find_spec("openvino"):
        sample(compile_model(tiniest, backend="openvino"))
    assert (torch._dynamo.config.get_config_copy(), torch.fx.experimental._config.get_config_copy()) == before


def test_compiling_is_told_while_it_lasts(model, fresh, monkeypatch):
    told = []
    verdicts = hosted.engine("telling.verdicts")
    monkeypatch.setattr(verdicts, "publish_lines", lambda where, node, lines, *_, **__: told.extend(lines.values()))
    alone = hosted.compiling("backends").ALL["eager"]
    slow = type(alone).compile_graph

    def taking_long(*args):
        time.sleep(0.3)
        return slow(alone, *args)

    monkeypatch.setattr(alone, "compile_graph", taking_long)
    sample(compile_model(model))
    compiling = [line.text for line in told if line.state == "running" and line.text.startswith("compiling")]
    assert len(compiling) >= 2
    # Where the machine is busy, a second may pass untold, the first may end before the first graph, and what is
    # compiled later begins anew.
    seconds = [int(re.match(r"compiling, (\d+) s so far", text)[1]) for text in compiling]
    assert min(seconds) >= 1
    assert max(seconds) >= 2
    assert any(", graphs done: " in text for text in compiling)


def test_dynamic_vram_is_left_by_loading_anew_or_refused(model, monkeypatch):
    """A stand-in for the host's class, which needs an NVIDIA GPU."""
    plain = model.clone()
    dynamic = type("Dynamic", (type(model),), {"is_dynamic": lambda self: True})
    model.__class__ = dynamic
    monkeypatch.setattr(dynamic, "clone", lambda self, disable_dynamic=False: plain, raising=False)
    assert compile_model(model).model is plain.model

    def refuse(self, disable_dynamic=False):
        raise RuntimeError("no cached_patcher_init")

    monkeypatch.setattr(dynamic, "clone", refuse)
    with pytest.raises(RuntimeError, match=r"Compile Model: DynamicVRAM.*--disable-dynamic-vram"):
        compile_model(model)


# Memory


@pytest.mark.parametrize(("prompts", "of"), [(12, 4), long(50, 10)])
def test_prompts_of_a_few_kinds_need_no_more_memory_than_one_of_each(prompts, of, tiniest, fresh):
    compiled = compile_model(tiniest, backend=BACKEND)
    kinds = [(size, batch, lora) for size in (16, 24, 32) for batch in (1, 2) for lora in (False, True)][:of]
    resident = []
    for i in range(prompts):
        size, batch, lora = kinds[i % len(kinds)]
        patcher = add_lora(compiled, seed=i) if lora else compiled
        sample(patcher, image=latent(tiniest, size, batch), steps=2)
        if i in (of - 1, prompts - 1):
            gc.collect()
        resident.append(psutil.Process().memory_info().rss)
    assert resident[-1] <= 1.05 * resident[of - 1]


# Real backends


@pytest.mark.long
@pytest.mark.parametrize(("scope", "units"), [("blocks", "9 blocks"), ("model", "the UNet")])
def test_inductor(scope, units, tiniest, fresh, tallies):
    image = sample(compile_model(tiniest, backend="inductor", scope=scope))
    assert 0 < relative(image, sample(tiniest)) < BOUND
    assert [tally.units for tally in tallies] == [units]


AGAIN = """
import sys
sys.path[:0] = [{tests!r}, {host!r}]
from loading import load_all
load_all()
import torch; torch.set_num_threads(1)
import hosted
from torch._dynamo.utils import counters
hosted.sample(hosted.compile_model(hosted.model("tiniest"), backend="inductor"))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.mark.long
def test_a_second_process_compiles_nothing():
    """Of two alike: what inductor keeps its graphs under depends on the order of a process's imports."""
    host = Path(__file__).parent
    script = AGAIN.format(tests=str(host.parent), host=str(host))
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    hits, misses = map(int, done.stdout.split()[-2:])
    assert (hits > 0, misses) == (True, 0)


@pytest.mark.parametrize("scope", ["blocks", long("model")])
def test_openvino(scope, tiniest, fresh, tallies):
    """In float32, all of it but attention; a LoRA that comes later is followed."""
    compiled = compile_model(tiniest, backend="openvino", scope=scope)
    assert relative(sample(compiled), sample(tiniest)) < BOUND
    assert relative(sample(add_lora(compiled)), sample(add_lora(tiniest))) < BOUND
    assert set(tallies[0].outside) == {"attention"}
    size = latent(tiniest, 24)
    assert relative(sample(compiled, image=size), sample(tiniest, image=size)) < BOUND


def test_openvino_refuses_bfloat16_instead_of_running_without(tiniest):
    tiniest.model.diffusion_model.to(torch.bfloat16)
    tiniest.model.diffusion_model.dtype = torch.bfloat16
    tiniest.model.manual_cast_dtype = None
    with pytest.raises(RuntimeError, match=r"openvino could not compile this model.*bfloat16"):
        sample(compile_model(tiniest, backend="openvino"))


def test_onediff_with_a_backend_of_its_public_registry(tiniest, tallies):
    from onediff.infer_compiler.backends import registry

    if "slipstream_test" not in registry._BACKENDS:

        @registry.register_backend("slipstream_test")
        def compile_by_tracing(module, options=None):
            traced = {}

            def call(*inputs):
                key = tuple(value.shape for value in inputs)
                if key not in traced:
                    traced[key] = torch.jit.trace(module, inputs, check_trace=False)
                return traced[key](*inputs)

            return call

    compiled = compile_model(tiniest, backend="onediff", onediff_backend="slipstream_test")
    assert relative(sample(compiled), sample(tiniest)) < BOUND
    assert tallies[0].units == "the UNet"
    both = lambda p: cutoff(0.5)(deepcache(2)(p))  # noqa: E731
    assert relative(sample(both(compiled)), sample(both(tiniest))) < BOUND
    # It keeps weights: others make it compile anew.
    assert relative(sample(add_lora(compiled)), sample(add_lora(tiniest))) < BOUND
    assert "since the weights changed" in tallies[-1].sentence()
    # And sees nothing of other nodes' code inside: those calls run without it.
    change = attention_output(0.5)
    assert torch.equal(sample(change(compiled)), sample(change(tiniest)))
    assert not tallies[-1].is_active


@pytest.mark.skipif(
    importlib.util.find_spec("sfast") is None, reason="stable-fast is not installed: it builds too long"
)
def test_stable_fast(tiniest):
    compiled = compile_model(tiniest, backend="stable-fast")
    assert relative(sample(compiled), sample(tiniest)) < BOUND
    both = lambda p: add_lora(cutoff(0.5)(deepcache(2)(p)))  # noqa: E731
    assert relative(sample(both(compiled)), sample(both(tiniest))) < BOUND


# What is missing


@pytest.mark.parametrize("backend", ["cudagraphs", "tensorrt", "xla"])
def test_a_backend_for_another_device_is_refused_when_the_graph_runs(backend, model, last_lines):
    with pytest.raises(RuntimeError, match=f"Compile Model: {backend} needs .* but the model runs on cpu"):
        compile_model(model, backend=backend)
    assert last_lines("7")[0][0] == "failed"
    sample(model)


def test_auto_takes_what_is_there_and_says_which(model, monkeypatch, tallies):
    backends = hosted.compiling("backends")
    monkeypatch.setattr(backends, "AUTO", ("xla", "eager"))
    sample(compile_model(model, backend="auto"))
    assert tallies[0].sentence().startswith("eager: 15 blocks")
    monkeypatch.setattr(backends, "AUTO", ("xla", "cudagraphs"))
    with pytest.raises(RuntimeError, match=r"no backend is available\. xla needs .*cudagraphs needs"):
        compile_model(model, backend="auto")


def test_equal_settings_are_one_and_other_ones_refused(model):
    compile_model(compile_model(model, "1"), "2")
    with pytest.raises(ValueError, match=r"node 2 and node 1.*scope model against blocks"):
        compile_model(compile_model(model, "1"), "2", scope="model")
