"""Attention in the real host: close to its own, seen by compiled code, chained with others' overrides, and fused."""

from __future__ import annotations

import importlib
import re
import sys

import comfy.model_management
import comfy.patcher_extension
import hosted
import pytest
import torch
from comfy.ldm.modules import attention as host
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_easycache import EasyCacheNode
from hosted import (
    CONFIGS,
    PlantedError,
    add_lora,
    bypass_lora,
    compile_model,
    hooked_prompt,
    relative_error,
    run_node,
    sample,
    with_control,
)
from torch.nn.attention import _cur_sdpa_kernel_backends as enabled


def attention(patcher, backend="auto", fuse_qkv=False, node_id="1"):
    return run_node("SlipstreamAttention", patcher, node_id, backend=backend, fuse_qkv=fuse_qkv)


def fused(patcher):
    return attention(patcher, "host", True)


def overridden(patcher, override):
    clone = patcher.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


MODEL = "SD15"
"""Whose blocks attend on two levels."""


@pytest.fixture
def lines(last_lines):
    """What the node told last: (state, text)."""
    return lambda: last_lines("1")[-1]


# Bounds


BOUNDS = {"auto": 1e-5, "flash": 1e-5, "math": 1e-5, "efficient": 0.0, "cudnn": 0.0, "host": 1e-5}
"""Relative error of an fp32 latent after six steps against the host's own attention. 0: it falls back to that."""


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=[pytest.mark.long] * (name in ("SDXL", "SSD1B"))) for name in (*CONFIGS, "DiT")],
)
def test_the_error_against_the_host_s_own_is_bounded(family, lines):
    model = hosted.model(family)
    plain = sample(model)
    # All alike but SD 1.5 and SDXL with fewer settings: it takes long.
    backends = list(BOUNDS) if family in ("SD15", "SDXL", "DiT") else ["auto"]
    for backend, fuse_qkv in [*((backend, False) for backend in backends), ("host", True), ("flash", True)]:
        if (backend, fuse_qkv) == ("host", False) or (family, fuse_qkv) == ("DiT", True):
            continue
        error = relative_error(sample(attention(model, backend, fuse_qkv)), plain)
        print(f"{family} {backend} {'fused' if fuse_qkv else ''}: {error:.1e}; {lines()[1]}")
        assert error <= (1e-5 if fuse_qkv else BOUNDS[backend])
        assert lines()[0] == ("active" if BOUNDS[backend] or fuse_qkv else "inert")


@pytest.mark.parametrize("backend", ["auto", "flash", "math"])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_in_bf16_it_is_as_close_to_fp32_as_the_host_s_own(backend, fuse_qkv, model):
    exact = sample(model, steps=2)
    in_bf16 = run_node("SlipstreamPrecision", model, "2", compute_dtype="bf16")
    own = relative_error(sample(in_bf16, steps=2), exact)
    error = relative_error(sample(attention(in_bf16, backend, fuse_qkv), steps=2), exact)
    print(f"{backend} {'fused' if fuse_qkv else ''}: {error:.1e}, the host's {own:.1e}")
    assert error < 1.5 * own < 0.03


def test_every_call_is_counted(model, lines):
    blocks = [m for m in model.model.diffusion_model.modules() if isinstance(m, host.BasicTransformerBlock)]
    sample(attention(model, "math"), steps=4)
    total = 4 * 2 * len(blocks)
    assert lines() == ("active", f"the math kernel in {total} of {total} attention calls")
    sample(attention(model, "cudnn"), steps=4)
    state, text = lines()
    assert state == "inert"
    assert text.startswith(f"the cudnn kernel in 0 of {total} attention calls; the host's own (sub_quad) in ")


def test_a_dit_is_refused_for_fusing_alone():
    dit = hosted.model("DiT")
    sample(attention(dit, "math"))
    with pytest.raises(RuntimeError, match="Turn fuse_qkv off"):
        attention(dit, "math", True)


# Others' overrides


def test_an_override_that_calls_what_was_there_calls_ours(model, lines):
    halved = lambda function, *args, **kwargs: function(*args, **kwargs) * 0.5  # noqa: E731
    expected = sample(overridden(model, halved))
    above, below = overridden(attention(model, "math"), halved), attention(overridden(model, halved), "math")
    images = [sample(above), sample(below)]
    assert torch.equal(*images)
    assert relative_error(images[0], expected) < 1e-5
    assert lines()[0] == "active"
    assert relative_error(expected, sample(model)) > 0.01


def test_an_override_that_does_not_keeps_its_place_and_is_named(model, lines):
    def override(function, q, k, v, heads, *args, **kwargs):
        return v * 0.5 if v.shape == q.shape else q

    expected = sample(overridden(model, override))
    assert torch.equal(sample(attention(overridden(model, override), "math")), expected)
    assert lines() == ("inert", "another node chose attention before (override) and leaves nothing to this one")


def test_core_s_choice_of_attention_keeps_its_place_and_is_named(model, lines):
    if not hasattr(model, "set_model_optimized_attention"):
        pytest.skip("this host has none")
    chosen = model.clone()
    chosen.set_model_optimized_attention(host.attention_split)
    assert torch.equal(sample(attention(chosen, "math")), sample(chosen))
    assert lines() == ("inert", "another node chose attention before (split) and leaves nothing to this one")


# In eight bits


class StandIn:
    """A package's kernel that computes exactly, but gives NaN in one evaluation, or in each from one on."""

    def __init__(self, bad, is_once=True):
        self.bad, self.is_once, self.evaluation, self.calls = bad, is_once, 0, 0

    def sageattn(self, q, k, v, tensor_layout, is_causal, sm_scale, smooth_k):
        self.calls += 1
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=sm_scale)
        is_bad = self.evaluation == self.bad if self.is_once else self.evaluation >= self.bad
        return output * torch.nan if is_bad else output

    def on(self, patcher):
        """Counts the evaluations that the sampler asks for."""
        clone = patcher.clone()

        def counted(executor, *args):
            self.evaluation += 1
            return executor(*args)

        clone.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "counting", counted)
        return clone


@pytest.fixture
def stand_in(monkeypatch):
    """Puts one in the place of sageattention, as on a GPU."""

    def install(*args, **kwargs):
        found = StandIn(*args, **kwargs)
        monkeypatch.setitem(sys.modules, "sageattention", found)
        monkeypatch.setattr(hosted.method("attention_backend"), "lacking", lambda *_: None)
        return found

    return install


BESIDE = {
    "alone": lambda model: model,
    "deepcache": lambda model: run_node("SlipstreamDeepCache", model, "2", cache_interval=3),
    "cfg cutoff": lambda model: run_node("SlipstreamCFGCutoff", model, "2", cutoff=0.5),
    "forecast": lambda model: run_node("SlipstreamForecast", model, "2", error_budget=0.5),
    "core's FreeU": hosted.add_core_freeu,
    "compiled": lambda model: compile_model(model, "2"),
}


# The fourth is one that Forecast skips.
@pytest.mark.parametrize(
    ("beside", "bad"), [(beside, bad) for beside in BESIDE for bad in (1, 3, 4) if (beside, bad) != ("forecast", 4)]
)
def test_an_evaluation_that_is_not_finite_is_made_again_with_the_host_s_own(beside, bad, stand_in, lines):
    model = BESIDE[beside](hosted.model("minimal"))
    expected = sample(model)
    kernel = stand_in(bad)
    image = sample(attention(kernel.on(model), "sage"))
    print(f"{relative_error(image, expected):.1e}; {lines()}")
    assert relative_error(image, expected) < 1e-4
    assert f"since what sage gave in step {bad} was not finite" in lines()[1]
    assert lines()[0] == ("inert" if bad == 1 else "active")
    assert kernel.evaluation == 6, "the sampler asks as often as without"
    last = list(hosted.engine("telling.history")._kept.values())[-1]
    assert last.record["evaluations"] == 6


def test_core_s_easycache_goes_on_from_the_one_that_was_made_again(stand_in, lines):
    """It saw both, and skips other steps than without: what is held is that nothing of the bad one stays."""
    model = EasyCacheNode.execute(hosted.model("minimal"), 0.2, 0.15, 0.95, False).result[0]
    expected = sample(model, steps=12)
    image = sample(attention(stand_in(3).on(model), "sage"), steps=12)
    assert "in step 3 was not finite" in lines()[1]
    assert relative_error(image, expected) < 0.1


@pytest.mark.parametrize("both", [False, True])
def test_with_a_controlnet_whose_features_a_call_uses_up(both, stand_in, lines):
    model = hosted.model("minimal")
    positive = lambda: with_control(hosted.prompt(model, 10), hosted.controlnet(model), both=both)  # noqa: E731
    expected = sample(model, positive())
    image = sample(attention(stand_in(3).on(model), "sage"), positive())
    assert relative_error(image, expected) < 1e-4
    assert "in step 3 was not finite" in lines()[1]


def test_where_nothing_overflows_it_is_looked_at_once_an_evaluation(stand_in, monkeypatch, lines):
    looked = []
    stand_in(bad=-1)
    monkeypatch.setattr(torch.Tensor, "isfinite", lambda self: looked.append(self) or torch.isfinite(self))
    model = hosted.model("minimal")
    expected = sample(model)
    assert relative_error(sample(attention(model, "math")), expected) < 1e-5
    assert not looked
    image = sample(attention(model, "sage"))
    assert len(looked) == 6
    assert relative_error(image, expected) < 1e-5
    assert lines()[0] == "active"
    assert re.fullmatch(r"the sage kernel in (\d+) of \1 attention calls", lines()[1])


HOST_S = {
    "HyperTile": ("nodes_hypertile", "HyperTile", (64, 2, 2, True)),
    "ToMe": ("nodes_tomesd", "TomePatchModel", (0.5,)),
    "NAG": ("nodes_nag", "NAGuidance", (5.0, 0.5, 1.5)),
    "PAG": ("nodes_pag", "PerturbedAttentionGuidance", (3.0,)),
    "SAG": ("nodes_sag", "SelfAttentionGuidance", (0.5, 2.0)),
    "self attention multiplied": ("nodes_attention_multiply", "UNetSelfAttentionMultiply", (1.2, 0.9, 1.1, 1.2)),
    "cross attention multiplied": ("nodes_attention_multiply", "UNetCrossAttentionMultiply", (1.2, 0.9, 1.1, 1.2)),
    "temporal attention multiplied": (
        "nodes_attention_multiply", "UNetTemporalAttentionMultiply", (1.1, 0.9, 1.1, 0.9)
    ),
}  # fmt: skip
"""The host's nodes that change attention."""


OURS = {
    "auto": lambda patcher: attention(patcher, "auto"),
    "math, fused": lambda patcher: attention(patcher, "math", True),
    "CPU": lambda patcher: run_node("SlipstreamCPU", patcher, "1", bf16=False, winograd="off"),
}


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        pytest.param(name, ours, marks=[] if name == "HyperTile" or ours == "math, fused" else [pytest.mark.long])
        for name in HOST_S
        for ours in OURS
    ],
)
def test_the_host_s_nodes_give_their_own_image(name, ours, lines):
    """HyperTile gives attention a q of another batch than k and v have."""
    model = hosted.model("minimal")
    file, node, settings = HOST_S[name]
    made = getattr(importlib.import_module(f"comfy_extras.{file}"), node).execute(model, *settings)
    changed = (made if isinstance(made, tuple) else made.result)[0]
    image = hosted.latent(model, size=32)
    expected = sample(changed, steps=2, image=image)
    assert relative_error(expected, sample(model, steps=2, image=image)) > 1e-3
    error = relative_error(sample(OURS[ours](changed), steps=2, image=image), expected)
    print(f"{name}: {error:.1e}")
    assert error < 1e-5
    assert lines()[0] == "active"


# Fusing


def test_lora_is_followed(model):
    fast = fused(model)
    before = sample(fast)
    for seed in (3, 4):
        expected = sample(add_lora(model, seed))
        assert relative_error(expected, before) > 0.05
        assert relative_error(sample(add_lora(fast, seed)), expected) < 1e-5
    assert torch.equal(sample(fast), before)


def test_lora_by_hooks_is_followed_within_the_run(model):
    hooked = lambda: hooked_prompt(model, {0.0: 1.0, 0.5: 0.3})  # noqa: E731
    expected, plain = sample(model, hooked(), steps=4), sample(model, steps=4)
    assert relative_error(expected, plain) > 0.01
    assert relative_error(sample(fused(model), hooked(), steps=4), expected) < 1e-5
    in_bf16 = run_node("SlipstreamPrecision", model, "2", compute_dtype="bf16")
    assert relative_error(sample(fused(in_bf16), hooked(), steps=4), sample(in_bf16, hooked(), steps=4)) < 1e-2


def test_weights_that_change_are_followed(model):
    fast = fused(model)
    sample(fast)
    with torch.no_grad():
        model.model.diffusion_model.input_blocks[1][1].transformer_blocks[0].attn1.to_v.weight.mul_(1.5)
    assert relative_error(sample(fast), sample(model)) < 1e-5


@pytest.mark.parametrize("kind", ["patch", "other context", "replacement"])
def test_what_other_nodes_give_to_self_attention_is_used(kind, model, lines):
    def changed(patcher):
        clone = patcher.clone()
        if kind == "patch":
            clone.set_model_attn1_patch(lambda q, k, v, extra: (q, k * 0.5, v))
        elif kind == "other context":
            clone.set_model_attn1_patch(lambda q, k, v, extra: (q, torch.cat([k, k * 0.5], 1), torch.cat([v, v], 1)))
        else:
            clone.set_model_attn1_replace(lambda q, k, v, extra: q * 0.5 + v, "input", 1)
        return clone

    expected = sample(changed(model))
    assert relative_error(expected, sample(model)) > 0.01
    assert relative_error(sample(changed(fused(model))), expected) < 1e-5
    assert lines()[1].endswith("where another node changes what self-attention is given, it had three")


def test_the_memory_that_it_tells_is_that_of_the_joined_weights(model, lines):
    blocks = [m for m in model.model.diffusion_model.modules() if isinstance(m, host.BasicTransformerBlock)]
    joined = sum(3 * block.attn1.to_q.weight.numel() * 4 for block in blocks) / 2**20
    sample(fused(model))
    assert lines() == (
        "active",
        f"one projection for q, k and v in {len(blocks)} of {len(blocks)} self-attentions, {joined:.1f} MiB more "
        "memory until the run ends",
    )


def test_the_projections_of_a_bypass_lora_are_joined_once_it_is_taken_out(model, lines):
    expected = sample(fused(model))
    told = lines()
    sample(bypass_lora(fused(model)))
    assert "another node replaced their projections" in lines()[1]
    assert torch.equal(sample(fused(model)), expected)
    assert lines() == told


def test_what_cannot_be_joined_stays_and_is_told(model, lines, monkeypatch):
    unet = model.model.diffusion_model
    block = unet.input_blocks[1][1].transformer_blocks[0]
    halved = lambda module, args, output: output * 0.5  # noqa: E731
    for module, where in ((block.attn1.to_k, "in their projections"), (block.attn1, "on them")):
        handle = module.register_forward_hook(halved)
        expected = sample(model)
        assert relative_error(sample(fused(model)), expected) < 1e-5
        handle.remove()
        assert relative_error(expected, sample(model)) > 1e-3
        assert "in 15 of 16 self-attentions" in lines()[1]
        assert f"1 keep three: another node has a hook {where}" in lines()[1]
    load = ModelPatcher.partially_load
    limited = lambda self, device, extra_memory=0, **kwargs: load(self, device, 2**20, **kwargs)  # noqa: E731
    expected = sample(add_lora(model))
    model.detach()
    monkeypatch.setattr(ModelPatcher, "partially_load", limited)
    assert relative_error(sample(add_lora(fused(model))), expected) < 1e-5
    assert "keep three: of their weights, they are patched as they are used" in lines()[1]
    model.detach()


# Compiled


@pytest.mark.parametrize("scope", ["blocks", "model"])
@pytest.mark.parametrize(("backend", "fuse_qkv"), [("math", False), ("host", True), ("math", True)])
def test_compiled_code_sees_it(scope, backend, fuse_qkv, last_lines, lines):
    """With the node, without it, and with it again: the bits of running without graphs, and the calls counted."""
    model = hosted.model("tiniest")
    plain, expected = sample(model, steps=2), sample(attention(model, backend, fuse_qkv), steps=2)
    compiled = compile_model(model, "2", scope=scope)
    for _ in range(2):
        assert torch.equal(sample(attention(compiled, backend, fuse_qkv), steps=2), expected)
        assert lines()[0] == "active"
        assert "block by block" not in last_lines("2")[-1][1]
        assert torch.equal(sample(compiled, steps=2), plain)


@pytest.mark.parametrize("family", ["tiniest", "DiT"])
@pytest.mark.parametrize("backend", ["auto", "math"])
def test_compiled_as_many_calls_are_counted_as_without(backend, family, lines, monkeypatch):
    """Some run a few times more, to tell what compiling gains: a block, or all of a UNet."""
    model, timed = hosted.model(family), []
    own = hosted.engine("host.machine").trial
    monkeypatch.setattr(hosted.engine("host.machine"), "trial", lambda: timed.append(1) or own())
    sample(attention(model, backend), steps=2)
    told = lines()
    # Or graphs that are there already would not be timed.
    hosted.engine("host.artifacts")._made.clear()
    sample(attention(compile_model(model, "2"), backend), steps=2)
    assert timed
    assert lines() == told


def test_fused_blocks_of_a_kind_share_their_graphs(last_lines):
    made = []
    for wire in (lambda patcher: patcher, fused):
        hosted.engine("host.artifacts")._made.clear()
        sample(wire(compile_model(hosted.model("minimal"), "2")), steps=2)
        made.append(last_lines("2")[-1][1].split(" graphs")[0])
    assert made[0] == made[1]


def test_another_node_s_override_still_has_no_graph_of_the_whole(last_lines):
    model = hosted.model("minimal")
    halved = lambda function, *args, **kwargs: function(*args, **kwargs) * 0.5  # noqa: E731
    expected = sample(attention(overridden(model, halved), "math"))
    compiled = compile_model(attention(overridden(model, halved), "math"), "2", scope="model")
    assert torch.equal(sample(compiled), expected)
    assert "block by block, since another node overrides its attention" in last_lines("2")[-1][1]


# Nothing is left


ENDS = (None, PlantedError, comfy.model_management.InterruptProcessingException, torch.OutOfMemoryError)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("where", ["between calls", "inside attention"])
def test_the_model_and_torch_are_as_they_were_between_calls_and_afterwards(end, where, model, monkeypatch):
    def state():
        base = model.model
        return [(n, id(m), type(m)) for n, m in base.named_modules()], [id(p) for p in base.parameters()], enabled()

    plain, before, seen = sample(model, steps=1), state(), []
    fast = attention(model, "math", True)

    def stop(*_):
        seen.append(state() if where == "between calls" else None)
        if end is not None and len(seen) == 3:
            raise end()

    kwargs = {}
    if where == "between calls":
        kwargs["callback"] = stop
    else:
        real = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(
            torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: stop() or real(*a, **k)
        )
    try:
        sample(fast, steps=3, **kwargs)
    except ENDS[1:]:
        assert end is not None
    assert len(seen) >= 3
    if where == "between calls":
        assert all(each == before for each in seen)
    assert state() == before
    assert torch.equal(sample(model, steps=1), plain)
