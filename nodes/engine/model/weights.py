"""A model's weights in another form, for the calls of one run: cast, laid out otherwise, or joined."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from comfy.ldm.modules import attention as host
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential, UNetModel
from torch import nn

from ...methods.method import Made
from ..host import machine
from . import patches


def kept_as_is(module: nn.Module, device: torch.device) -> str | None:
    """Why only the host can use a module's weights, as it does each time they are needed; None if they may be used
    as they are."""
    if hasattr(module, "_v"):
        return "DynamicVRAM brings them to the device as they are used"
    if getattr(module, "weight_function", None) or getattr(module, "bias_function", None):
        return "they are patched as they are used, since the model is loaded in part only"
    for weight in module.parameters(recurse=False):
        if weight.device.type != device.type:
            return "they are offloaded, since the model is loaded in part only"
        if type(weight) is not nn.Parameter:
            return "they are quantized"
        if not weight.is_floating_point() or weight.element_size() < 2:
            return f"they are kept as {str(weight.dtype).removeprefix('torch.')}"
    return None


@dataclass
class _Copy:
    """A weight's stand-in."""

    module: nn.Module
    name: str
    is_hooked: bool
    dtype: torch.dtype
    layout: torch.memory_format
    original: nn.Parameter
    weight: nn.Parameter

    @torch.no_grad()
    def follow(self) -> None:
        """As the weight is now: a hook may have patched it, or the host put another in its place."""
        current: Any = self.module._parameters[self.name]
        if current is not self.original:
            self.original = current
            self.weight = _cast(current, self.dtype, self.layout)
        elif self.is_hooked:
            self.weight.copy_(current)


def _cast(weight: torch.Tensor, dtype: torch.dtype, layout: torch.memory_format) -> nn.Parameter:
    """A weight of this dtype and layout; of the same memory if it is that already."""
    return nn.Parameter(weight.detach().to(dtype=dtype, memory_format=layout), requires_grad=False)


class Casts:
    """The weights of a model that computes in another dtype or layout.

    On a CPU they are cast once, as casting takes as long there as computing with them. Elsewhere memory is scarcer: the
    host casts them at each use, as it does for a model that is loaded in another dtype than it computes in.

    Args:
        module: the diffusion model, its weights loaded and patched.
        device: where it runs.
        hooked: names of weights that hooks may patch between two calls.
        theirs: what the host would compute in, and what other nodes put into the model goes on to.
        dtype: what it is to compute in.
        layout: memory format of convolutions' weights, which decides that of their results; None leaves them.
        only_transformers: cast a UNet's transformers, and leave what is around them.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        hooked: Collection[str],
        theirs: torch.dtype,
        dtype: torch.dtype,
        layout: torch.memory_format | None,
        only_transformers: bool = False,
    ):
        self.made = Made()
        self._borders: list[tuple[nn.Module, str, nn.Module, _Border]] = []
        self._copies: list[_Copy] = []
        self._cast_by_host: list[nn.Module] = []
        self._calls: list[tuple[nn.Module, Callable[[Any], Any]]] = []
        others = _Others(module, dtype, only_transformers) if theirs != dtype else None
        within = _transformers(module) if only_transformers else None
        # UNets give each layer what they compute in, and graphs of them would have to look after each layer's dtype.
        is_even = isinstance(module, UNetModel)
        for path, inner in module.named_modules():
            # Whatever is none of the host's operations casts its weights by itself: the host demands it of them.
            if not hasattr(inner, "comfy_cast_weights") or not inner._parameters:
                continue
            why = kept_as_is(inner, device)
            if (within is not None and inner not in within) or (others is not None and inner in others.apart):
                if why is None:
                    self._add(path, inner, hooked, None, layout)
                continue
            if why is None:
                self._add(path, inner, hooked, dtype if device.type == "cpu" else None, layout)
                if device.type == "cpu":
                    if not is_even or (others is not None and inner in others.among):
                        # Some models compute in float32 here and there: as the host has it, weights follow the input.
                        self._cast_by_host.append(inner)
                    continue
                why = "a GPU is fast at it"
            if any(weight.dtype != dtype for weight in inner.parameters(recurse=False)):
                self._cast_by_host.append(inner)
                self.made.left[why] += 1
        if others is not None:
            self.made.others = others.number
            self._calls = [
                *((one, lambda forward: patches.Abroad(forward, theirs, dtype)) for one in others.called_apart),
                *((one, lambda forward: patches.Returning(forward, theirs, dtype)) for one in others.called_among),
            ]
        if only_transformers and theirs != dtype:
            assert others is not None
            for parent, name, output in _borders(module, others.apart):
                inner = parent._modules[name]
                assert inner is not None
                self._borders.append((parent, name, inner, _Border(inner, dtype, theirs if output else None)))

    @torch.no_grad()
    def _add(
        self,
        path: str,
        module: nn.Module,
        hooked: Collection[str],
        dtype: torch.dtype | None,
        layout: torch.memory_format | None,
    ) -> None:
        before = len(self._copies)
        for name, weight in module.named_parameters(recurse=False):
            target = weight.dtype if dtype is None else dtype
            form = layout if layout is not None and weight.ndim == 4 else torch.preserve_format
            cast = _cast(weight, target, form)
            if cast.data_ptr() != weight.data_ptr():
                self._copies.append(_Copy(module, name, f"{path}.{name}" in hooked, target, form, weight, cast))
                self.made.extra_bytes += cast.nbytes
        self.made.modules += len(self._copies) > before

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """They take the weights' places."""
        # A call inside a call, as a wrapper may make it, finds them there.
        copies = [copy for copy in self._copies if copy.module._parameters[copy.name] is not copy.weight]
        for copy in copies:
            copy.follow()
        borders = [border for border in self._borders if border[0]._modules[border[1]] is border[2]]
        flags = [(module, module.__dict__.get("comfy_cast_weights")) for module in self._cast_by_host]
        lowvram = {module for module, _ in flags if "prev_comfy_cast_weights" in module.__dict__}
        calls = [
            (module, module.__dict__.get("forward"), wrap)
            for module, wrap in self._calls
            if not isinstance(module.__dict__.get("forward"), patches.Abroad)
        ]
        try:
            for copy in copies:
                copy.module._parameters[copy.name] = copy.weight
            for module, _ in flags:
                module.__dict__["comfy_cast_weights"] = True
            for parent, name, _, border in borders:
                parent._modules[name] = border
            for module, _, wrap in calls:
                module.__dict__["forward"] = wrap(module.forward)
            yield
        finally:
            for module, forward, _ in calls:
                if forward is None:
                    module.__dict__.pop("forward", None)
                else:
                    module.__dict__["forward"] = forward
            for parent, name, inner, _ in borders:
                parent._modules[name] = inner
            for copy in copies:
                copy.module._parameters[copy.name] = copy.original
            for module, flag in flags:
                if "prev_comfy_cast_weights" in module.__dict__ and module not in lowvram:
                    # The host took it off the device meanwhile. It casts from now on, and what it was before is ours.
                    module.__dict__["prev_comfy_cast_weights"] = (
                        getattr(type(module), "comfy_cast_weights", False) if flag is None else flag
                    )
                elif flag is None:
                    del module.__dict__["comfy_cast_weights"]
                else:
                    module.__dict__["comfy_cast_weights"] = flag


class _Others:
    """What other nodes put into a model: modules of classes that are neither the host's nor torch's, and those that do
    not cast their weights to what they are given, as the host's operations do.

    Args:
        module: the diffusion model.
        dtype: what it is to compute in.
        only_transformers: whether that is so in a UNet's transformers alone.

    Attributes:
        number: of the parts.
        apart: all modules of the parts that go on as they are: what stands in the place of a part of the host's UNet,
            and what has weights that do not follow the dtype.
        called_apart: those of them that may be called from outside.
        among: all modules of the other parts: layers between a UNet's own, as AnimateDiff's, of the host's operations.
        called_among: those of them that the host calls.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype, only_transformers: bool):
        self.number = 0
        self.apart: set[nn.Module] = set()
        self.called_apart: list[nn.Module] = []
        self.among: set[nn.Module] = set()
        self.called_among: list[nn.Module] = []
        self._dtype = dtype
        # A model that is another pack's as a whole may well compute in several dtypes.
        self._is_host_s = isinstance(module, UNetModel)
        self._unbordered = set(_unbordered(module)) if only_transformers else set()
        self._look_through(module)

    def _look_through(self, module: nn.Module) -> None:
        for child in module.children():
            if self._is_apart(child, isinstance(module, TimestepEmbedSequential)):
                self._set_apart(child)
            elif machine.is_others(child) and isinstance(module, TimestepEmbedSequential):
                self.among.update(child.modules())
                self.called_among.append(child)
            else:
                self._look_through(child)

    def _is_apart(self, part: nn.Module, is_between: bool) -> bool:
        if part in self._unbordered:
            return True
        if not machine.is_others(part):
            return self._is_stubborn(part)
        is_replacing = self._is_host_s and not is_between and not hasattr(part, "comfy_cast_weights")
        return is_replacing or any(map(self._is_stubborn, part.modules()))

    def _set_apart(self, part: nn.Module) -> None:
        self.number += 1
        self.apart.update(part.modules())
        self.called_apart += [one for one in part.modules() if one is part or one._parameters]

    def _is_stubborn(self, module: nn.Module) -> bool:
        """Whether a module has weights of its own, of another dtype, that nothing casts."""
        if hasattr(module, "comfy_cast_weights") or machine.is_host_s(type(module)):
            return False
        own = module.parameters(recurse=False)
        return any(one.is_floating_point() and one.element_size() > 1 and one.dtype != self._dtype for one in own)


def _unbordered(module: nn.Module) -> Iterator[nn.Module]:
    """Parts of a UNet's transformers that are not built as the host's, so that nothing tells where values enter."""
    for one in module.modules():
        if type(one) is host.SpatialTransformer:
            blocks: Any = one.transformer_blocks
            for block in blocks:
                if not isinstance(block, host.BasicTransformerBlock):
                    yield block
                    continue
                for attention in (block.attn1, block.attn2):
                    if attention is not None and not {"to_k", "to_v"} <= attention._modules.keys():
                        yield attention


def _transformers(module: nn.Module) -> set[nn.Module]:
    """What computes the transformers of a UNet, their projections included."""
    found = [one for one in module.modules() if type(one) is host.SpatialTransformer]
    parts: list[Any] = [part for one in found for part in (one.proj_in, one.proj_out, one.transformer_blocks)]
    return {inner for part in parts for inner in part.modules()}


def _borders(module: nn.Module, apart: set[nn.Module]) -> Iterator[tuple[Any, str, bool]]:
    """Where values enter the transformers of a UNet and leave them, but those parts that stay apart: the parent, the
    name, and whether they leave."""
    for one in module.modules():
        if type(one) is host.SpatialTransformer:
            yield one, "proj_in", False
            yield one, "proj_out", True
            blocks: Any = one.transformer_blocks
            for block in blocks:
                if block in apart:
                    continue
                # The first attends to the prompt too where it is no self-attention.
                for attention in (block.attn1 if block.disable_self_attn else None, block.attn2):
                    if attention is not None and attention not in apart:
                        yield attention, "to_k", False
                        yield attention, "to_v", False


class _Border(nn.Module):
    """A projection between values of two dtypes.

    Args:
        inner: the projection.
        dtype: what it computes in.
        output: what its result is cast to; None leaves it.
    """

    def __init__(self, inner: nn.Module, dtype: torch.dtype, output: torch.dtype | None):
        super().__init__()
        self.inner = inner
        self.dtype = dtype
        self.output = output

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x.to(self.dtype))
        return y if self.output is None else y.to(self.output)


class FusedSelfAttention(host.CrossAttention):
    """The host's self-attention with one projection for q, k and v.

    Where another node gives k or v something else than q, or calls the three by themselves, it is what it was.
    """

    def __init__(self, separate: Any):
        nn.Module.__init__(self)
        # All that its forward may read, whatever a host's version keeps there.
        self.__dict__.update({name: value for name, value in vars(separate).items() if name not in self.__dict__})
        self._modules.update(separate._modules)
        self.qkv = nn.Parameter(torch.cat(self._separate_weights()), requires_grad=False)

    def _separate_weights(self) -> list[torch.Tensor]:
        return [layer.weight.detach() for layer in (self.to_q, self.to_k, self.to_v)]

    @torch.no_grad()
    def follow(self) -> None:
        """The three weights as they are now."""
        torch.cat(self._separate_weights(), out=self.qkv)

    def forward(self, x: Any, context: Any = None, value: Any = None, mask: Any = None, transformer_options: Any = {}):  # noqa: B006
        if (context is not None and context is not x) or (value is not None and value is not x):
            return super().forward(x, context, value, mask, transformer_options)
        # Cast where the host casts at each use.
        q, k, v = nn.functional.linear(x, self.qkv.to(x.dtype)).chunk(3, dim=-1)
        options = {"attn_precision": self.attn_precision, "transformer_options": transformer_options}
        if mask is None:
            return self.to_out(host.optimized_attention(q, k, v, self.heads, **options))
        return self.to_out(host.optimized_attention_masked(q, k, v, self.heads, mask, **options))


class FusedQKV:
    """The self-attentions of a UNet, each with one projection for q, k and v.

    Args:
        module: the UNet, its weights loaded, patched and as they are in a call.
        device: where it runs.
        hooked: names of weights that hooks may patch between two calls.
    """

    def __init__(self, module: nn.Module, device: torch.device, hooked: Collection[str]):
        self.made = Made()
        self._fused: list[tuple[nn.Module, nn.Module, FusedSelfAttention, bool]] = []
        for path, block in module.named_modules():
            if not isinstance(block, host.BasicTransformerBlock) or block.disable_self_attn:
                continue
            why = _not_fused(block.attn1, device)
            if why is not None:
                self.made.left[why] += 1
                continue
            with torch.no_grad():
                fused = FusedSelfAttention(block.attn1)
            is_hooked = any(f"{path}.attn1.to_{name}.weight" in hooked for name in "qkv")
            self._fused.append((block, block.attn1, fused, is_hooked))
            self.made.modules += 1
            self.made.extra_bytes += fused.qkv.nbytes

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """They take the self-attentions' places."""
        entries = [entry for entry in self._fused if entry[0]._modules["attn1"] is entry[1]]
        try:
            for block, _, fused, is_hooked in entries:
                if is_hooked:
                    fused.follow()
                block._modules["attn1"] = fused
            yield
        finally:
            for block, separate, _, _ in entries:
                block._modules["attn1"] = separate


def _not_fused(module: Any, device: torch.device) -> str | None:
    """Why a self-attention keeps its three projections; None if it may have one."""
    if (
        type(module) is not host.CrossAttention
        or machine.is_forward_replaced(module)
        or not machine.is_host_s(module.forward)
    ):
        return "another node replaced their code"
    if module._forward_hooks or module._forward_pre_hooks:
        return "another node has a hook on them"
    if machine.has_own_attention(module):
        return machine.OWN_ATTENTION
    weights: list[torch.Tensor] = []
    for layer in (module.to_q, module.to_k, module.to_v):
        if not isinstance(layer, nn.Linear) or machine.is_forward_replaced(layer) or layer.bias is not None:
            return "another node replaced their projections"
        hooks = [*layer._forward_hooks.values(), *layer._forward_pre_hooks.values()]
        if hooks and all(map(machine.is_ours, hooks)):
            return "Quantize Model prunes their projections"
        if hooks:
            return "another node has a hook in their projections"
        why = kept_as_is(layer, device)
        if why is not None:
            return f"of their weights, {why}"
        weights.append(layer.weight)
    if len({(weight.dtype, weight.shape[1]) for weight in weights}) > 1 or len({w.shape[0] for w in weights}) > 1:
        return "their projections have different shapes"
    return None
