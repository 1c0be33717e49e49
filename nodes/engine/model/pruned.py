"""A model's linear layers with 2:4 sparse weights, for the calls of one run."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
from torch import nn

from ...methods import semi_structured
from ...methods.method import Pruned, Pruner
from ...methods.semi_structured import Inputs
from .quantized import Layers, StandIn, Unloading, _Layer

LEAST = 1e-9
"""What any layer is said to lose."""


class PrunedLayers(Layers):
    """Those whose weights are pruned once it was observed what they are given.

    Args:
        patcher, paths, hooked, dtype: as those of `Layers`.
        pruner: which layers, and what their outputs may lose.
    """

    def __init__(
        self, patcher: Any, paths: Mapping[nn.Module, str], hooked: Set[str], pruner: Pruner, dtype: torch.dtype
    ):
        self.made = Pruned()
        super().__init__(patcher, paths, hooked, pruner, dtype, self.made)
        self._pruner = pruner
        self._candidates = self._layers
        self._layers = []
        self._inputs: dict[nn.Module, Inputs] = {}
        # Of the tensors that are layers' inputs in the call that is observed, whichever layer got them first.
        self._given: dict[int, tuple[weakref.ref[torch.Tensor], Inputs]] = {}
        self._attempt = 0
        self._is_observed = False
        self._is_pruned = False

    # While inputs are observed.

    @contextlib.contextmanager
    def observing(self, attempt: int) -> Iterator[None]:
        """Looks at what layers are given in a call, along with other calls of this attempt at an evaluation."""
        if self._is_observed:
            yield
            return
        if attempt != self._attempt:
            self._inputs.clear()
            self._attempt = attempt
        handles = []
        self._is_observed = True
        try:
            for layer in self._candidates:
                handles.append(layer.module.register_forward_pre_hook(self._look, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._given.clear()
            self._is_observed = False

    @torch.no_grad()
    def _look(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x: torch.Tensor = args[0] if args else kwargs["input"]
        inputs = self._inputs.get(module)
        if inputs is None:
            # What several layers are given, as the prompt is, is kept once.
            tensor, inputs = self._given.get(id(x), (lambda: None, None))
            if inputs is None or tensor() is not x:
                inputs = Inputs(x.shape[-1], x.device)
            self._given[id(x)] = weakref.ref(x), inputs
            self._inputs[module] = inputs
        inputs.add(x)

    # Once they were.

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        if not self._is_pruned:
            self._prune_all()
            self._is_pruned = True
        with super().installed():
            yield

    def _prune_all(self) -> None:
        began = time.perf_counter()
        made, pruner = self.made, self._pruner
        made.why_dense = semi_structured.lacks_kernels(self._device, self._dtype) or ""
        unloading, is_offloading = Unloading(self._patcher), self._is_offloading
        used: list[tuple[_Layer, Inputs, int]] = []
        for layer in self._candidates:
            inputs = self._inputs.pop(layer.module, None)
            if layer.is_hooked:
                self._leave(layer.module, "that hooks change")
            elif inputs is None or not inputs.seen:
                self._leave(layer.module, "not used in the first evaluation")
            else:
                used.append((layer, inputs, inputs.seen * layer.module.weight.numel()))
        total = sum(work for *_, work in used)
        if pruner.sparse_share < 1:
            # Each is pruned twice, as all of them at once would take as much memory as the model.
            gains = {layer.path: work / self._prune(layer, inputs)[0] ** 2 for layer, inputs, work in used}
            used.sort(key=lambda entry: -gains[entry[0].path])
        taken = 0
        while used:
            layer, inputs, work = used.pop(0)
            if taken + work > pruner.sparse_share * total:
                self._leave(layer.module, "beyond sparse_share")
                continue
            error, layer.own = self._prune(layer, inputs)
            if layer.own is None:
                self._leave(layer.module, "whose outputs would lose more than sparse_error")
                continue
            taken += work
            made.errors[layer.path] = error
            self._layers.append(layer)
            self._count(layer, layer.own)
            if is_offloading:
                unloading.add(layer.module)
        made.modules = len(self._layers)
        made.work = taken / max(1, total)
        made.offloaded_bytes = unloading.end()
        made.elapsed_s = time.perf_counter() - began

    def _prune(self, layer: _Layer, inputs: Inputs) -> tuple[float, StandIn | None]:
        """What a layer's outputs lose, and its stand-in if that is little enough."""
        error = torch.inf

        def make(weight: torch.Tensor) -> nn.Parameter | None:
            nonlocal error
            pruned = semi_structured.prune(weight.float(), inputs).to(weight.dtype)
            error = max(LEAST, inputs.error(weight, pruned))
            if not error <= self._pruner.sparse_error:
                return None
            kept = pruned if self.made.why_dense else semi_structured.packed(pruned)
            made = nn.Parameter(kept, requires_grad=False)
            made.is_stand_in = True  # type: ignore[attr-defined]
            return made

        stand_in = self._made_of(layer.module, make)
        return error, stand_in

    def _now(self, layer: _Layer) -> StandIn:
        assert layer.own is not None
        return layer.own
