"""FP16 fix: a KL autoencoder whose activations exceed float16's range, rescaled so that they don't. The same image.

The residual stream, which every block adds to, is read through group norms alone, and these do not care how large it
is: it can be carried at any scale `s`. So what writes into it (`conv_in`, each residual block's `conv2`, attention's
`proj_out`) gets its weight and bias times `s`, and what carries it over (shortcuts, up- and downsampling) its bias.
Inside a block the same holds for `conv1`, whose output only `norm2` reads, and for attention's `v`, which is undone in
`proj_out`. With powers of two all of this is exact in floating point, but for one thing: a group norm divides by
sqrt(variance + epsilon), so the epsilon of each norm that sees a scaled value is scaled too, by the square.

Norms, `conv_out` and the quantization convs keep their weights; so do `q` and `k`, whose products softmax needs as they
are. Their values stay what they were: an autoencoder where those exceed the range can't be fixed.

Layout and names: R. Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models", 2022. The idea of
a VAE with smaller activations: madebyollin's sdxl-vae-fp16-fix, which was trained to have them and is not exact.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

PRECISIONS = ("auto", "fp16", "bf16", "fp32")
METHODS = ("rescale", "as is")
LARGEST = 65504.0
"""Of float16."""
MARGIN = 4.0
"""How many times as large activations may be as those that were measured."""

RESIDUAL = {"norm1", "conv1", "norm2", "conv2"}
SHORTCUTS = {"nin_shortcut", "conv_shortcut"}
ATTENTION = {"norm", "q", "k", "v", "proj_out"}
OUTER = {"conv_in", "norm_out", "conv_out"}
PRODUCT = "q k"
"""What stands for the products of queries and keys, among the names of an attention's parts."""


@dataclass(frozen=True)
class FP16Fix:
    """What the node is set to: one of `PRECISIONS`, one of `METHODS`."""

    precision: str = "auto"
    method: str = "rescale"

    stem = "fp16_fix"
    title = "FP16-Fix VAE"

    def __post_init__(self) -> None:
        for name, value, known in (("precision", self.precision, PRECISIONS), ("method", self.method, METHODS)):
            if value not in known:
                raise ValueError(f"{self.title}: {name} should be one of {', '.join(known)}, but is {value!r}.")


@dataclass(frozen=True)
class Layout:
    """Where things are in a decoder or encoder, by their names in it.

    Attributes:
        residuals: residual blocks.
        attentions: attention blocks.
        resamplers: blocks that halve or double the size with a convolution.
    """

    residuals: tuple[str, ...]
    attentions: tuple[str, ...]
    resamplers: tuple[str, ...]


def layout(coder: nn.Module) -> Layout:
    """The layout of a decoder or encoder.

    Raises:
        RuntimeError: it has weights of which it is not known what they do.
    """
    found: dict[str, list[str]] = {"residual": [], "attention": [], "resampler": [], "outer": []}
    understood: set[str] = set()
    for name, module in coder.named_modules():
        children = {child for child, inner in module.named_children() if next(inner.parameters(), None) is not None}
        if children - SHORTCUTS == RESIDUAL:
            kind = "residual"
        elif children == ATTENTION:
            kind = "attention"
        elif children == {"conv"}:
            kind = "resampler"
        elif not name and children > OUTER:
            kind, children = "outer", OUTER
        else:
            continue
        if all(_is_plain(module.get_submodule(child), child) for child in children):
            found[kind].append(name)
            understood |= {_join(name, child) for child in children}
    unknown = sorted({name.rpartition(".")[0] for name, _ in coder.named_parameters()} - understood)
    if unknown or not found["outer"]:
        raise RuntimeError(f"its {type(coder).__name__} has parts of another kind: {', '.join(unknown[:3]) or 'all'}")
    return Layout(*(tuple(found[kind]) for kind in ("residual", "attention", "resampler")))


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether a part is the convolution, or the norm, that its name says."""
    return isinstance(module, nn.GroupNorm if name.startswith("norm") else nn.Conv2d)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


Peaks = Mapping[str, float]
"""The largest magnitude that each part of a decoder or encoder, or of what is around it, gave."""


@contextlib.contextmanager
def watching(module: nn.Module) -> Iterator[Peaks]:
    """Measures what the parts of a module give, while it runs. By their names; what goes into an attention's `proj_out`
    counts to its `v`, and the products of queries and keys are `PRODUCT`."""
    peaks: dict[str, float] = defaultdict(float)
    queries: dict[str, Tensor] = {}
    handles = []

    def note(name: str, value: Tensor) -> None:
        low, high = value.aminmax()
        # NaN would lose every comparison.
        largest = float(torch.maximum(-low, high))
        peaks[name] = max(peaks[name], math.inf if math.isnan(largest) else largest)

    def on_output(name: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        note(name, output)
        block, _, part = name.rpartition(".")
        if part == "q":
            queries[block] = output
        elif part == "k":
            query, key = queries.pop(block).flatten(2), output.flatten(2)
            note(_join(block, PRODUCT), query.transpose(1, 2) @ key)

    def on_input(name: str, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        note(_join(name.rpartition(".")[0], "v"), inputs[0])

    def watch(name: str, part: nn.Module) -> None:
        handles.append(part.register_forward_hook(lambda *args: on_output(name, *args)))
        if name.endswith("proj_out"):
            handles.append(part.register_forward_pre_hook(lambda *args: on_input(name, *args)))

    children = {name: {child for child, _ in part.named_children()} for name, part in module.named_modules()}
    for name, part in module.named_modules():
        # Leaves, and the blocks that add.
        if isinstance(part, (nn.Conv2d, nn.GroupNorm)) or children[name] >= RESIDUAL or children[name] >= ATTENTION:
            watch(name, part)
    try:
        yield peaks
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Scaling:
    """How a decoder or encoder is rescaled. Powers of two.

    Attributes:
        stream: for the residual stream.
        inner: for what is inside single blocks, by the name of the `conv1` or `v` that gives it; those that need none
            are left out.
        peak: the largest value that was measured, before.
        has_large_products: whether products of queries and keys exceed the range, with margin, so that attention should
            be computed in float32.
    """

    stream: float
    peak: float
    inner: Mapping[str, float] = field(default_factory=dict)
    has_large_products: bool = False

    @property
    def is_identity(self) -> bool:
        return self.stream == 1 and not self.inner

    @property
    def smallest(self) -> float:
        """The factor furthest from 1."""
        return min(self.stream, *self.inner.values(), 1.0)


def scaling_of(parts: Layout, peaks: Peaks, prefix: str = "", margin: float = MARGIN) -> Scaling:
    """The least scaling-down that keeps every activation in float16's range.

    Args:
        parts: the layout.
        peaks: what was measured.
        prefix: what the names of its parts begin with there.
        margin: how many times what was measured must fit.

    Raises:
        RuntimeError: a value exceeds the range that can't be scaled, or is not finite.
    """
    own = {name.removeprefix(prefix): peak for name, peak in peaks.items() if name.startswith(prefix)}
    inner = {_join(block, "conv1") for block in parts.residuals} | {_join(block, "v") for block in parts.attentions}
    products = {_join(block, PRODUCT) for block in parts.attentions}
    stream = {"conv_in", *parts.residuals, *parts.attentions}
    stream |= {_join(block, name) for block in parts.residuals for name in ("conv2", *SHORTCUTS)}
    stream |= {_join(block, "proj_out") for block in parts.attentions}
    stream |= {_join(block, "conv") for block in parts.resamplers}
    for name, peak in own.items():
        if not math.isfinite(peak):
            raise RuntimeError(f"{prefix}{name} gives {peak} in float32 already: the file is damaged")
        if name not in inner | products | stream and peak > LARGEST:
            raise RuntimeError(f"{prefix}{name} reaches {peak:.0f}, which no scale of other weights can change")
    scaled = {name: factor(own[name], margin) for name in sorted(inner & own.keys())}
    return Scaling(
        stream=factor(max((own[name] for name in stream & own.keys()), default=0.0), margin),
        peak=max((peak for name, peak in own.items() if name not in products), default=0.0),
        inner={name: value for name, value in scaled.items() if value != 1},
        has_large_products=max((own[name] for name in products & own.keys()), default=0.0) * margin > LARGEST,
    )


def factor(peak: float, margin: float = MARGIN) -> float:
    """The largest power of two, at most 1, that brings a value into the range."""
    return 1.0 if peak * margin <= LARGEST else 2.0 ** math.floor(math.log2(LARGEST / (peak * margin)))


@torch.no_grad()
def rescale_(coder: nn.Module, parts: Layout, scale: Scaling) -> None:
    """Rescale the weights of a decoder or encoder, and the epsilons of its norms."""
    stream = scale.stream
    _scale(coder, "conv_in", stream, stream)
    for name in parts.residuals:
        block = coder.get_submodule(name)
        inside = scale.inner.get(_join(name, "conv1"), 1.0)
        _scale_epsilon(block, "norm1", stream)
        _scale(block, "conv1", inside, inside)
        _scale_epsilon(block, "norm2", inside)
        _scale(block, "conv2", stream, stream)
        for shortcut in SHORTCUTS & dict(block.named_children()).keys():
            _scale(block, shortcut, 1.0, stream)
    for name in parts.attentions:
        block = coder.get_submodule(name)
        inside = scale.inner.get(_join(name, "v"), 1.0)
        _scale_epsilon(block, "norm", stream)
        _scale(block, "v", inside, inside)
        _scale(block, "proj_out", stream / inside, stream)
    for name in parts.resamplers:
        _scale(coder.get_submodule(name), "conv", 1.0, stream)
    _scale_epsilon(coder, "norm_out", stream)


def _scale(block: nn.Module, name: str, weight: float, bias: float) -> None:
    conv = block.get_submodule(name)
    for part, by in ((conv.weight, weight), (conv.bias, bias)):
        if isinstance(part, Tensor):
            part.mul_(by)


def _scale_epsilon(block: nn.Module, name: str, by: float) -> None:
    norm = block.get_submodule(name)
    assert isinstance(norm, nn.GroupNorm)
    norm.eps *= by * by
