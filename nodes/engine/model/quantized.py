"""A model's linear layers with other weights in the places of their own, for the calls of one run: quantized ones."""

from __future__ import annotations

import contextlib
import re
import time
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Set
from dataclasses import dataclass
from typing import Any

import comfy.ops
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import TimestepEmbedSequential
from torch import nn

from ...methods.method import Pruner, Quantized, Quantizer
from ..host import artifacts, machine
from ..plan import models

AS_IT_IS = {"comfy_cast_weights": False, "weight_function": (), "bias_function": ()}
"""What has a layer of the host's use its weights as they are."""

ATTENTION = re.compile(r"attn|attention|(?:query|key|q|k)_?norm|norm_?(?:query|key|q|k)\b")
"""Names of what a block with attention has: Flux's single blocks are norms of queries and keys between two layers."""

OFFLOADED_AT_ONCE = 256 * 2**20
"""Bytes. The host logs a line each time."""


@dataclass(frozen=True)
class StandIn:
    """What takes the places of a layer's weight and bias."""

    weight: nn.Parameter
    bias: nn.Parameter | None


class QuantizedWeights:
    """Stand-ins for one model, by their layers' paths: those for the last weights that it ran with."""

    def __init__(self) -> None:
        self._version: Hashable = None
        self._made: dict[str, tuple[Hashable, StandIn]] = {}

    def of(self, version: Hashable) -> dict[str, tuple[Hashable, StandIn]]:
        """Those for this version of the weights, as far as they were made, each with what it was made of."""
        if self._version != version:
            self.release()
            self._version = version
        return self._made

    def release(self) -> None:
        """Free them, once no run has them."""
        self._version, self._made = None, {}


@dataclass
class _Layer:
    """A linear layer of the host's.

    Attributes:
        path: its path in the model.
        is_hooked: whether hooks may patch it between two calls.
        own: its own weights quantized, without hooks; None until they were there.
    """

    path: str
    module: nn.Linear
    is_hooked: bool
    own: StandIn | None = None


class Layers:
    """The linear layers of a model in one run, and what takes the places of their weights.

    Args:
        patcher: that of the model, whose weights are loaded and patched.
        paths: the model's modules, as they are between calls, with their paths.
        hooked: the paths of the weights that hooks may patch between two calls.
        sorter: which layers.
        dtype: what the model computes in.
        made: counts what is done.
    """

    def __init__(
        self,
        patcher: Any,
        paths: Mapping[nn.Module, str],
        hooked: Set[str],
        sorter: Quantizer | Pruner,
        dtype: torch.dtype,
        made: Quantized,
    ):
        self._patcher = patcher
        self._hooked = hooked
        self._device: torch.device = patcher.load_device
        self._sorter = sorter
        self._dtype = dtype
        self._counted = made
        self._is_installed = False
        self._layers: list[_Layer] = []
        for layer, path, why in sorted_out(paths, sorter):
            if why is None:
                is_hooked = not hooked.isdisjoint((f"{path}.weight", f"{path}.bias"))
                self._layers.append(_Layer(path, layer, is_hooked))
            else:
                self._leave(layer, why)

    def _leave(self, layer: nn.Linear, why: str) -> None:
        self._counted.left[why] += 1
        self._counted.left_bytes[why] += _bytes(layer.weight)

    @property
    def _is_offloading(self) -> bool:
        patcher = self._patcher
        return (
            has_own_memory(self._device)
            # Hooks are patched in where the weights are.
            and not self._hooked
            # DynamicVRAM lets go of what is not used by itself.
            and not getattr(patcher, "is_dynamic", lambda: False)()
            and self._sorter.should_offload(bool(patcher.model.model_lowvram))
        )

    def _count(self, layer: _Layer, stand_in: StandIn) -> None:
        self._counted.extra_bytes += _bytes(stand_in.weight)
        self._counted.original_bytes += _bytes(layer.module.weight)

    @torch.no_grad()
    def _made_of(self, module: Any, make: Callable[[torch.Tensor], nn.Parameter | None]) -> StandIn | None:
        """What is made of a layer's weight as it is now, patches included; None if nothing is."""
        dtype = self._dtype if module.comfy_cast_weights else module.weight.dtype
        # The host brings them to the device, from wherever they are, and patches them.
        weight, bias, stream = comfy.ops.cast_bias_weight(
            module, dtype=dtype, device=self._device, bias_dtype=dtype, offloadable=True
        )
        try:
            made = make(weight.detach())
            kept_bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
            return None if made is None else StandIn(made, kept_bias)
        finally:
            comfy.ops.uncast_bias_weight(module, weight, bias, stream)

    def _now(self, layer: _Layer) -> StandIn:
        """What stands in for a layer in this call."""
        raise NotImplementedError

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """They take the weights' places."""
        # A call inside a call, as a wrapper may make it, finds them there.
        if self._is_installed:
            yield
            return
        undo: list[tuple[nn.Linear, dict[str, Any], dict[str, Any]]] = []
        self._is_installed = True
        try:
            for layer in self._layers:
                stand_in, module = self._now(layer), layer.module
                flags = {name: module.__dict__[name] for name in AS_IT_IS if name in module.__dict__}
                undo.append((module, dict(module._parameters), flags))
                module.__dict__.update(AS_IT_IS)
                module._parameters.update(weight=stand_in.weight, bias=stand_in.bias)
            yield
        finally:
            for module, parameters, flags in undo:
                module._parameters.update(parameters)
                for name in AS_IT_IS:
                    module.__dict__.pop(name, None)
                module.__dict__.update(flags)
            self._is_installed = False


class QuantizedLayers(Layers):
    """Those with quantized weights.

    Args:
        patcher, paths, hooked, quantizer, dtype: as those of `Layers`.
        kept: holds what earlier runs made; None if nothing outlives this one.
    """

    def __init__(
        self,
        patcher: Any,
        paths: Mapping[nn.Module, str],
        hooked: Set[str],
        quantizer: Quantizer,
        dtype: torch.dtype,
        kept: QuantizedWeights | None,
    ):
        self.made = Quantized()
        super().__init__(patcher, paths, hooked, quantizer, dtype, self.made)
        self._quantizer = quantizer
        places = tuple(layer.path for layer in self._layers)
        version = (models.weights_version(patcher), dtype, places, self._device)
        self._kept = None if kept is None else kept.of(version)
        self.made.modules = len(self._layers)
        self.made.hooked = sum(layer.is_hooked for layer in self._layers)
        self._quantize_all()

    def _quantize_all(self) -> None:
        unloading, is_offloading = Unloading(self._patcher), self._is_offloading
        for layer in self._layers:
            # Else its own weights come when the hooks go.
            if not layer.is_hooked or self._patcher.current_hooks is None:
                self._quantize(layer)
                if is_offloading:
                    unloading.add(layer.module)
        self.made.offloaded_bytes = unloading.end()

    def _quantize(self, layer: _Layer) -> StandIn:
        """A layer's own weights, quantized now if no earlier run did."""
        source = None if self._kept is None else _source(layer.module)
        made_of, stand_in = (self._kept or {}).get(layer.path, (None, None))
        if stand_in is None or made_of != source:
            began = time.perf_counter()
            stand_in = self._as_they_are(layer.module)
            if self._kept is not None:
                self._kept[layer.path] = source, stand_in
            self.made.elapsed_s += time.perf_counter() - began
        layer.own = stand_in
        self._count(layer, stand_in)
        return stand_in

    def _as_they_are(self, module: nn.Linear) -> StandIn:
        stand_in = self._made_of(module, self._quantizer.quantize)
        assert stand_in is not None
        return stand_in

    def _now(self, layer: _Layer) -> StandIn:
        if layer.is_hooked and self._patcher.current_hooks is not None:
            return self._as_they_are(layer.module)
        return layer.own or self._quantize(layer)


def _source(layer: nn.Linear) -> Hashable:
    """A layer and its own weights: the host's version of them is silent on what another node puts in the place of a
    block or a weight. By what is in them, since another method may have cast them for this call."""
    return weakref.ref(layer), *(artifacts.contents(weight) for weight in layer.parameters())


def sorted_out(
    paths: Mapping[nn.Module, str], sorter: Quantizer | Pruner
) -> Iterator[tuple[nn.Linear, str, str | None]]:
    """The linear layers of a model with their paths, and why each stays as it is: None if it is quantized.

    What a model is made of are its lists of blocks with attention. Other lists hold what is before and after them: the
    layers by which Chroma makes all of its modulation, HiDream's projections of each layer of its text encoder.
    """
    blocks = tuple(
        f"{path}."
        for part, path in paths.items()
        if isinstance(part, TimestepEmbedSequential)
        or (isinstance(part, (nn.ModuleList, nn.ModuleDict)) and _has_attention(part))
    )
    for part, path in paths.items():
        if isinstance(part, nn.Linear) or _is_of_quantized_checkpoint(part):
            layer: Any = part
            why = _unsuited(layer) or sorter.leaves_out(path, layer, path.startswith(blocks))
            yield layer, path, why or (None if isinstance(part, nn.Linear) else "left whole by a quantized checkpoint")


def _is_of_quantized_checkpoint(part: nn.Module) -> bool:
    """Whether a module is a linear layer that the host makes for such checkpoints. None of these is torch's."""
    return hasattr(part, "comfy_cast_weights") and hasattr(part, "in_features")


def _has_attention(module: nn.Module) -> bool:
    named = (f"{path}.{type(part).__name__}".lower() for path, part in module.named_modules() if part is not module)
    return any(ATTENTION.search(name) for name in named)


def has_own_memory(device: torch.device) -> bool:
    """Whether what is offloaded leaves a device's memory."""
    return device.type != "cpu"


class Unloading:
    """Has the host take modules off the device, in its own books too: it brings them back when it loads the model.

    Args:
        patcher: ModelPatcher, loaded, without hooks in force.
    """

    def __init__(self, patcher: Any):
        self._patcher = patcher
        self._entries: dict[int, Any] | None = None
        self._waiting: list[nn.Module] = []
        self._freed = 0

    def add(self, module: nn.Module) -> None:
        """One more."""
        self._waiting.append(module)
        if sum(_bytes(weight) for one in self._waiting for weight in one.parameters()) >= OFFLOADED_AT_ONCE:
            self._unload()

    def end(self) -> int:
        """Those that are left. Returns the bytes that were freed in all."""
        self._unload()
        return self._freed

    def _unload(self) -> None:
        if not self._waiting:
            return
        patcher = self._patcher
        if self._entries is None:
            listed = patcher._load_list()
            self._entries = {id(part): entry for entry in listed for part in entry if isinstance(part, nn.Module)}
        entries = [self._entries[id(module)] for module in self._waiting]
        self._waiting = []
        # The host chooses by size from this list.
        patcher.__dict__["_load_list"] = lambda *args, **kwargs: entries
        try:
            self._freed += patcher.partially_unload(patcher.offload_device, 1e32)
        finally:
            del patcher.__dict__["_load_list"]


def _unsuited(layer: nn.Linear) -> str | None:
    """Why a layer is not one of the host's with plain weights; None if it is."""
    own = type(layer).forward
    if (
        not hasattr(layer, "comfy_cast_weights")
        or machine.is_forward_replaced(layer)
        or not own.__module__.startswith("comfy.")
    ):
        return "of another node's code"
    weight: Any = layer.weight
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return "quantized already"
    return None


def _bytes(weight: Any) -> int:
    """Memory of a tensor, or of those that a tensor subclass is made of."""
    if hasattr(weight, "__tensor_flatten__"):
        return sum(_bytes(getattr(weight, name)) for name in weight.__tensor_flatten__()[0])
    return int(weight.nbytes)
