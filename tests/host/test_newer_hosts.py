"""What newer hosts do otherwise, put on this one: attention as in 0.39, with an attention of each layer's own."""

from __future__ import annotations

import functools

import host_names
import hosted
import pytest
import torch
from comfy.ldm.modules import attention as host
from hosted import compile_model, relative_error, run_node, sample
from loading import find_comfyui
from torch import nn


class ComfyAttention(nn.Module):
    """As in 0.39: what a checkpoint names for a layer, and the function for it where this device has one."""

    def __init__(self):
        super().__init__()
        self.config = None
        self.function = None


FORWARD = """
def forward(self, x, context=None, value=None, mask=None, transformer_options={}):
    q = self.to_q(x)
    context = x if context is None else context
    k = self.to_k(context)
    v = self.to_v(context if value is None else value)
    q, k, v = (AttentionTensorContainer(one) for one in (q, k, v))
    more = {
        "attn_precision": self.attn_precision,
        "preferred_attention": self.comfy_attention,
        "transformer_options": transformer_options,
    }
    if mask is None:
        return self.to_out(optimized_attention(q, k, v, self.heads, **more))
    return self.to_out(optimized_attention_masked(q, k, v, self.heads, mask, **more))
"""
"""CrossAttention's in 0.39: containers, and the layer's own attention handed on."""


def host_s(source):
    """A function as the host's module would have it: code of another module is another node's."""
    exec(source, vars(host))
    return vars(host).pop("forward")


def preferring(function):
    """An attention of the host's as 0.39 wraps it: an override goes before the layer's own, and hides it."""

    @functools.wraps(function)
    def wrapper(*args, preferred_attention=None, transformer_options=None, **kwargs):
        is_overridden = "optimized_attention_override" in (transformer_options or {})
        if preferred_attention is not None and preferred_attention.function is not None and not is_overridden:
            return preferred_attention.function(*args, transformer_options=transformer_options, **kwargs)
        return function(*args, transformer_options=transformer_options, **kwargs)

    return wrapper


@pytest.fixture
def newer(monkeypatch):
    """A small model as 0.39 would build and run it."""
    if not hasattr(host, "AttentionTensorContainer"):
        pytest.skip("this host has no containers")
    if hasattr(host, "ComfyAttention"):
        pytest.skip("this host is as new")
    init = host.CrossAttention.__init__

    def with_own(self, *args, **kwargs):
        init(self, *args, **kwargs)
        self.comfy_attention = ComfyAttention()

    monkeypatch.setattr(host.CrossAttention, "__init__", with_own)
    monkeypatch.setattr(host.CrossAttention, "forward", host_s(FORWARD))
    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(host, name, preferring(getattr(host, name)))
    return hosted.model


@host.wrap_attn
def attention_halved(q, k, v, heads, *args, **kwargs):
    """What a checkpoint names, easily told from the host's own."""
    return host.attention_sub_quad(q * 0.5, k, v, heads, *args, **kwargs)


def naming(model):
    """Have the checkpoint name an attention for the first self-attention and the last cross-attention."""
    layers = [one for one in model.model.diffusion_model.modules() if isinstance(one, host.CrossAttention)]
    for layer in (layers[0], layers[-1]):
        layer.comfy_attention.config, layer.comfy_attention.function = {}, attention_halved
    return model


def attention(patcher, backend="host", fuse_qkv=False, node_id="1"):
    return run_node("SlipstreamAttention", patcher, node_id, backend=backend, fuse_qkv=fuse_qkv)


def precision(patcher):
    return run_node("SlipstreamPrecision", patcher, "3", compute_dtype="bf16")


CHANGED = {
    "nothing": lambda patcher: None,
    "patch": lambda patcher: patcher.set_model_attn1_patch(lambda q, k, v, extra: (q, k * 0.5, v)),
    "replacement": lambda patcher: patcher.set_model_attn1_replace(
        lambda q, k, v, extra: q * 0.5 + v, "input", 1
    ),
}  # fmt: skip
WIRED = {
    "math": lambda patcher: attention(patcher, "math"),
    "fused": lambda patcher: attention(patcher, fuse_qkv=True),
    "math, fused": lambda patcher: attention(patcher, "math", True),
    "bf16": precision,
    "bf16, fused": lambda patcher: attention(precision(patcher), fuse_qkv=True),
}


@pytest.mark.parametrize("changed", list(CHANGED))
@pytest.mark.parametrize("wired", list(WIRED))
def test_the_image_is_that_of_this_host(wired, changed, newer, monkeypatch):
    images = []
    for _ in range(2):
        model = newer("minimal").clone()
        CHANGED[changed](model)
        images.append(sample(WIRED[wired](model), steps=2))
        monkeypatch.undo()
    assert torch.equal(*images)


@pytest.mark.parametrize(
    ("wired", "scope"),
    [("nothing", "blocks"), ("fused", "blocks"), pytest.param("math", "model", marks=pytest.mark.long)],
)
def test_compiled_it_has_as_many_graphs_none_broken_and_none_made_again(wired, scope, newer, monkeypatch, last_lines):
    images, graphs = [], []
    for _ in range(2):
        hosted.engine("host.artifacts")._made.clear()
        model = newer("tiniest")
        model = WIRED[wired](model) if wired in WIRED else model
        images.append(sample(model, steps=2))
        for _ in range(2):
            images.append(sample(compile_model(model, "2", scope=scope), steps=2))
            told = last_lines("2")[-1][1]
            assert not any(word in told for word in ("break", "recompiled", "without graphs"))
        graphs.append(told.split(",")[0])
        monkeypatch.undo()
    assert all(torch.equal(image, images[0]) for image in images)
    assert graphs[0] == graphs[1]


# What the nodes use of the host


def test_every_name_that_is_taken_from_the_host_is_there():
    used = host_names.imported(find_comfyui())
    assert len(used) > 20
    assert {"BasicTransformerBlock", "CrossAttention"} <= used["comfy.ldm.modules.attention"]
    gone = {
        f"{module}.{name}"
        for module, names in used.items()
        for name in names - host_names.defined(host_names.file_of(module, find_comfyui()))
    }
    assert not gone


# An attention that the checkpoint names for some layers


def test_fused_it_is_still_used(newer, last_lines):
    model = naming(newer("minimal"))
    expected = sample(model)
    assert relative_error(expected, sample(newer("minimal"))) > 1e-3
    assert relative_error(sample(attention(model, fuse_qkv=True)), expected) < 1e-5
    assert "1 keep three: the checkpoint names an attention of their own" in last_lines("1")[-1][1]


@pytest.mark.parametrize("scope", ["blocks", "model"])
def test_compiled_it_is_still_used(scope, newer, last_lines):
    model = naming(newer("tiniest"))
    expected = sample(model, steps=2)
    assert torch.equal(sample(compile_model(model, "2", scope=scope), steps=2), expected)
    assert "blocks run without graphs: the checkpoint names an attention of their own" in last_lines("2")[-1][1]


@pytest.mark.parametrize("beside", [precision, lambda patcher: attention(patcher, "auto")], ids=["bf16", "auto"])
def test_beside_other_methods_it_is_still_used(beside, newer):
    named, plain = naming(newer("minimal")), newer("minimal")
    expected = sample(named)
    assert relative_error(sample(beside(named)), expected) < 0.5 * relative_error(sample(beside(plain)), expected)


def test_auto_leaves_it_alone_and_says_so(newer, last_lines):
    model = naming(newer("minimal"))
    assert torch.equal(sample(attention(model, "auto")), sample(model))
    told = "left to ComfyUI: the checkpoint names an attention for 2 of its layers"
    assert last_lines("1")[-1] == ("inert", told)


def test_a_kernel_by_name_takes_its_place_and_says_so(newer, last_lines):
    image = sample(attention(naming(newer("minimal")), "math"))
    assert relative_error(image, sample(newer("minimal"))) < 1e-5
    told = "in place of the attention that the checkpoint names for 2 of its layers"
    assert last_lines("1")[-1][1].endswith(told)
