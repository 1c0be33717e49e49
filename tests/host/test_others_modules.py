"""Modules of other packs' classes inside a model, and the host's classes patched as a pack is imported: with each
method that looks into blocks."""

from __future__ import annotations

import functools

import hosted
import pytest
import torch
from comfy.ldm.modules import attention as host
from comfy.ldm.modules.diffusionmodules import openaimodel
from hosted import compile_model, relative_error, run_node
from torch import nn

BOUND = 1e-2
"""Relative error of a latent after two steps: bf16's rounding."""

METHODS = {
    "Precision, model": lambda patcher: run_node("SlipstreamPrecision", patcher, "1", compute_dtype="bf16"),
    "Precision, transformers": lambda patcher: run_node(
        "SlipstreamPrecision", patcher, "1", compute_dtype="bf16", scope="transformers"
    ),
    "CPU": lambda patcher: run_node("SlipstreamCPU", patcher, "1"),
    "Recipe": lambda patcher: run_node("SlipstreamRecipe", patcher, "1", goal="best quality"),
    "fuse_qkv": lambda patcher: run_node("SlipstreamAttention", patcher, "1", backend="math", fuse_qkv=True),
    "Compile Model": lambda patcher: compile_model(patcher, "1"),
    "Compile Model, whole": lambda patcher: compile_model(patcher, "1", scope="model"),
    "Quantize Model": lambda patcher: run_node("SlipstreamQuantize", patcher, "1", scheme="int8 weight-only"),
    "all": lambda patcher: compile_model(
        run_node("SlipstreamAttention", METHODS["Precision, transformers"](patcher), "2", fuse_qkv=True), "3"
    ),
}


SAMPLE = ("Precision, model", "all")

QUANTIZED = 5e-2
"""Relative error of one with its linear layers in int8."""


@pytest.fixture(autouse=True)
def with_bf16(monkeypatch):
    """As on a processor that has it."""
    monkeypatch.setattr(hosted.method("precision"), "has_bf16", lambda: True)


def sample(patcher, *args, steps=2, **kwargs):
    return hosted.sample(patcher, *args, steps=steps, **kwargs)


def linear(width, out=None, seed=1):
    layer = nn.Linear(width, out or width)
    hosted.initialize(layer, seed)
    return layer


class OwnAttention(nn.Module):
    """As LayerDiffuse's: its own layers around what it replaces, and no projections of the usual names."""

    def __init__(self, original, width):
        super().__init__()
        self.original = original
        self.before, self.behind = linear(width), linear(width, seed=2)
        self.seen = []

    def forward(self, x, context=None, value=None, transformer_options={}):  # noqa: B006
        self.seen.append(transformer_options.get("cond_or_uncond"))
        y = x + self.before(x) * 0.5
        return self.behind(y) if context is None else self.behind(y) + context.mean()


class AroundAttention(OwnAttention):
    """Runs what it replaces, on its own layer's result."""

    def forward(self, x, context=None, value=None, transformer_options={}):  # noqa: B006
        self.seen.append(transformer_options.get("cond_or_uncond"))
        return self.original(x + self.before(x), context=context, value=value, transformer_options=transformer_options)


class SubclassedAttention(host.CrossAttention):
    """The host's, with a constant of its own in float32, from what it replaces."""

    def __init__(self, original, width):
        nn.Module.__init__(self)
        self.__dict__.update({key: value for key, value in vars(original).items() if key != "forward"})

    def forward(self, x, context=None, value=None, mask=None, transformer_options={}):  # noqa: B006
        return super().forward(x * torch.tensor([1.1]), context, value, mask, transformer_options)


class OwnFeedForward(nn.Module):
    def __init__(self, original, width):
        super().__init__()
        self.original, self.layer = original, linear(width)

    def forward(self, x):
        return self.layer(self.original(x))


class Wrapped(nn.Module):
    """A linear layer with an addition to it, as packs for LoRA have it."""

    def __init__(self, original, width):
        super().__init__()
        self.inner = original
        self.down, self.up = linear(original.weight.shape[1], 4), linear(4, original.weight.shape[0])

    def forward(self, x):
        return self.inner(x) + self.up(self.down(x))


class Plain(nn.Module):
    """Without weights."""

    def __init__(self, original, width):
        super().__init__()
        self.hidden = [original]

    def forward(self, x):
        return x * torch.full((1,), 0.7)


class OwnBlock(nn.Module):
    """In place of a whole transformer block."""

    def __init__(self, original, width):
        super().__init__()
        self.layer = linear(width)

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        return x + self.layer(x) + context.mean()


class SubclassedBlock(host.BasicTransformerBlock):
    def __init__(self, original, width):
        nn.Module.__init__(self)
        self.__dict__.update(vars(original))
        self.scale = nn.Parameter(torch.full((width,), 1.2), requires_grad=False)

    def forward(self, x, context=None, transformer_options={}):  # noqa: B006
        return super().forward(x * self.scale, context, transformer_options)


class Convolved(nn.Module):
    """In place of a 1x1 projection."""

    def __init__(self, original, width):
        super().__init__()
        self.inner, self.layer = original, linear(width)

    def forward(self, x):
        return self.layer(self.inner(x).movedim(1, -1)).movedim(-1, 1)


class TorchLinear(nn.Linear):
    """Torch's, where the host casts weights."""

    def __new__(cls, original, width):
        layer = nn.Linear(original.weight.shape[1], original.weight.shape[0])
        hosted.initialize(layer, 5)
        return layer


BLOCK = "input_blocks.1.1.transformer_blocks.0"
PLACES = {
    "attn1": (f"{BLOCK}.attn1", OwnAttention),
    "attn2": (f"{BLOCK}.attn2", OwnAttention),
    "attn1, around": (f"{BLOCK}.attn1", AroundAttention),
    "attn2, around": (f"{BLOCK}.attn2", AroundAttention),
    "attn2, subclassed": (f"{BLOCK}.attn2", SubclassedAttention),
    "ff": (f"{BLOCK}.ff", OwnFeedForward),
    "ff, plain": (f"{BLOCK}.ff", Plain),
    "to_k": (f"{BLOCK}.attn2.to_k", Wrapped),
    "to_q": (f"{BLOCK}.attn1.to_q", Wrapped),
    "to_v, torch's": (f"{BLOCK}.attn1.to_v", TorchLinear),
    "proj_in": ("input_blocks.1.1.proj_in", Convolved),
    "proj_out": ("input_blocks.1.1.proj_out", Convolved),
    "block": (BLOCK, OwnBlock),
    "block, subclassed": (BLOCK, SubclassedBlock),
    "resblock's layer": ("input_blocks.1.0.in_layers.1", Plain),
}


def put(patcher, place):
    """A model with another pack's module in it, by an object patch."""
    path, kind = PLACES[place]
    clone, key = patcher.clone(), f"diffusion_model.{path}"
    original = patcher.get_model_object(key)
    clone.add_object_patch(key, kind(original, patcher.model.diffusion_model.model_channels))
    return clone


@pytest.mark.parametrize(
    ("place", "method"),
    [
        pytest.param(place, method, marks=[] if method in SAMPLE or place == "attn2" else [pytest.mark.long])
        for place in PLACES
        for method in METHODS
    ],
)
def test_another_pack_s_module_goes_on_as_it_is(place, method, model):
    changed = put(model, place)
    exact = sample(changed)
    assert relative_error(exact, sample(model)) > 1e-4
    image = sample(METHODS[method](changed))
    error = relative_error(image, exact)
    print(f"{place}, {method}: {error:.1e}")
    is_exact = method == "fuse_qkv" or method.startswith("Compile Model")
    assert error < (1e-5 if is_exact else QUANTIZED if method == "Quantize Model" else BOUND)
    assert torch.equal(sample(changed), exact)


@pytest.mark.parametrize("scope", ["model", "transformers"])
@pytest.mark.parametrize("place", PLACES)
def test_the_verdict_counts_them(place, scope, model, last_lines):
    changed = put(model, place)
    sample(METHODS[f"Precision, {scope}"](changed))
    is_outside = place == "resblock's layer" and scope == "transformers"
    if not is_outside:
        assert "1 part that another node put into the model computed in fp32" in last_lines("1")[-1][1]
    sample(METHODS[f"Precision, {scope}"](model))
    assert "another node" not in last_lines("1")[-1][1]


@pytest.mark.parametrize("scope", ["blocks", "model"])
@pytest.mark.parametrize("place", ["attn1", "attn2", "block, subclassed"])
def test_what_is_given_the_options_has_no_graph(place, scope, model, last_lines):
    changed = put(model, place)
    sample(compile_model(changed, "1", scope=scope))
    assert "another node replaced its code" in last_lines("1")[-1][1]
    module = changed.object_patches[f"diffusion_model.{PLACES[place][0]}"]
    for seen in getattr(module, "seen", []):
        assert sorted(seen) == [0, 1]


@pytest.mark.parametrize("node", ["SlipstreamDeepCache", "SlipstreamFreeU"])
@pytest.mark.parametrize("place", ["attn2", "ff", "proj_in", "block"])
def test_methods_of_the_unet_run_them(node, place, model):
    settings = {"SlipstreamDeepCache": {"cache_interval": 2}, "SlipstreamFreeU": {"b1": 1.3}}[node]
    changed = put(model, place)
    image = sample(run_node(node, changed, "1", **settings))
    assert relative_error(image, sample(run_node(node, model, "1", **settings))) > 1e-4
    assert image.isfinite().all()


# The host's classes, patched as a pack is imported: nobody uses its node

PATCHED = {
    "BasicTransformerBlock": (host.BasicTransformerBlock, "forward"),
    "CrossAttention": (host.CrossAttention, "forward"),
    "SpatialTransformer": (host.SpatialTransformer, "forward"),
    "UNetModel": (openaimodel.UNetModel, "forward"),
    "UNetModel, inner": (openaimodel.UNetModel, "_forward"),
    "forward_timestep_embed": (openaimodel, "forward_timestep_embed"),
}


def noting(function, seen, is_wrapped, place):
    """What a pack puts in the place of a function of the host's: it keeps the transformer options it is given."""
    position = {"UNetModel": 6, "UNetModel, inner": 6, "forward_timestep_embed": 4, "BasicTransformerBlock": 3}
    position |= {"CrossAttention": 5, "SpatialTransformer": 3}

    def note(args, kwargs):
        options = kwargs.get("transformer_options")
        if options is None and len(args) > position[place]:
            options = args[position[place]]
        seen.append(sorted((options or {}).get("cond_or_uncond", ["none"])))

    def patched(*args, **kwargs):
        note(args, kwargs)
        return function(*args, **kwargs)

    return functools.wraps(function)(patched) if is_wrapped else patched


@pytest.mark.parametrize("is_wrapped", [True, pytest.param(False, marks=pytest.mark.long)])
@pytest.mark.parametrize("scope", ["blocks", "model"])
@pytest.mark.parametrize("place", PATCHED)
def test_what_a_pack_patched_on_import_reads_the_call_s_own_options(place, scope, is_wrapped, model, monkeypatch):
    expected, seen = sample(model), []
    owner, name = PATCHED[place]
    monkeypatch.setattr(owner, name, noting(getattr(owner, name), seen, is_wrapped, place))
    assert torch.equal(sample(model), expected)
    number, wanted = len(seen), seen[0]
    assert wanted == [0, 1]
    seen.clear()
    for method in (METHODS["fuse_qkv"], lambda patcher: compile_model(METHODS["fuse_qkv"](patcher), "2", scope=scope)):
        assert relative_error(sample(method(model)), expected) < 1e-5
        assert all(one == wanted for one in seen)
        assert len(seen) >= number
        seen.clear()
