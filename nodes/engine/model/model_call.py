"""One call of the host's model: in another dtype, with quantized weights, another attention or joined projections, for
that call alone.

What is made of the weights is made in the first call of a run, when the host has loaded and patched them. It takes
their place during each call and is taken out after it: between calls the host finds its own weights, which it may
patch (hooks), move, or hand to other models.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch

from ...methods.method import Attention, Made, Pruned, Pruner, Quantized, Quantizer
from ..host import artifacts, machine
from ..plan import models
from . import attention, patches
from .pruned import PrunedLayers
from .quantized import QuantizedLayers, QuantizedWeights
from .weights import Casts, FusedQKV

SELF_ATTENTION = ("attn1_patch", "attn1")
"""The patch and the replacement that change what self-attention is given."""


class HostModel:
    """One of the host's models during one run.

    Args:
        model: BaseModel, loaded.
        keeper: holds what may outlive the run.
        is_one_of_several: whether copies of it run on other devices at the same time.
    """

    def __init__(self, model: Any, keeper: artifacts.Keeper, is_one_of_several: bool = False):
        self.model = model
        self.is_one_of_several = is_one_of_several
        self.module: torch.nn.Module = model.diffusion_model
        # As they are between calls: in one, modules may stand in for others.
        self.paths = {part: path for path, part in self.module.named_modules()}
        self.keeper = keeper
        self.patcher = model.current_patcher
        self.device: torch.device = self.patcher.load_device
        self.hooked = models.hooked_weights(self.patcher)
        self._made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made under this key, now or earlier in the run."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        dtype: torch.dtype = self.model.manual_cast_dtype or self.model.get_dtype()
        return dtype


class HostModelCall:
    """`methods.method.ModelCall` over the host's BaseModel.

    Args:
        host: the model.
        options: the host's transformer options for this call; not written to.
    """

    def __init__(self, host: HostModel, options: dict[str, Any]):
        self._host = host
        self.options = options

    @property
    def device(self) -> str:
        return self._host.device.type

    @property
    def dtype(self) -> torch.dtype:
        return self._host.dtype

    @property
    def is_one_of_several(self) -> bool:
        return self._host.is_one_of_several

    @property
    def attention_before(self) -> str | None:
        return attention.overriding(self.options)

    @property
    def own_attentions(self) -> int:
        host = self._host
        count: int = host.once(machine.has_own_attention, lambda: sum(map(machine.has_own_attention, host.paths)))
        return count

    @property
    def has_self_attention_patches(self) -> bool:
        patch, replacement = SELF_ATTENTION
        patched, replacements = self.options.get("patches") or {}, self.options.get("patches_replace") or {}
        return bool(patched.get(patch) or replacements.get(replacement))

    @contextlib.contextmanager
    def computing_in(
        self, dtype: torch.dtype, layout: torch.memory_format | None, only_transformers: bool
    ) -> Iterator[Made]:
        host = self._host
        casts = host.once(
            (Casts, dtype, layout, only_transformers),
            lambda: Casts(host.module, host.device, host.hooked, host.dtype, dtype, layout, only_transformers),
        )
        before, options = host.model.manual_cast_dtype, self.options
        try:
            if host.dtype != dtype:
                self.options = patches.in_dtype(host.dtype, dtype, options)
            if not only_transformers:
                # By it the host casts everything that goes into the model.
                host.model.manual_cast_dtype = dtype
            with casts.installed():
                yield casts.made
        finally:
            host.model.manual_cast_dtype = before
            self.options = options

    @contextlib.contextmanager
    def quantizing(self, quantizer: Quantizer) -> Iterator[Quantized]:
        host, dtype = self._host, self.dtype

        def make() -> QuantizedLayers:
            # A GPU quantizes in a moment, and its memory is the host's to manage between runs.
            is_kept = host.device.type == "cpu"
            kept = host.keeper.get(host.module, ("quantize", quantizer), QuantizedWeights) if is_kept else None
            return QuantizedLayers(host.patcher, host.paths, host.hooked, quantizer, dtype, kept)

        layers = host.once((QuantizedLayers, quantizer, dtype), make)
        with layers.installed():
            yield layers.made

    def _pruned(self, pruner: Pruner) -> PrunedLayers:
        host, dtype = self._host, self.dtype
        # Nothing is kept for the next run: what weights become depends on what this one computes.
        make = lambda: PrunedLayers(host.patcher, host.paths, host.hooked, pruner, dtype)  # noqa: E731
        layers: PrunedLayers = host.once((PrunedLayers, pruner, dtype), make)
        return layers

    @contextlib.contextmanager
    def observing(self, pruner: Pruner, attempt: int) -> Iterator[None]:
        with self._pruned(pruner).observing(attempt):
            yield

    @contextlib.contextmanager
    def pruning(self, pruner: Pruner) -> Iterator[Pruned]:
        layers = self._pruned(pruner)
        with layers.installed():
            yield layers.made

    @contextlib.contextmanager
    def attending(self, attend: Callable[[Attention], torch.Tensor]) -> Iterator[None]:
        before = self.options
        try:
            self.options = {**before, attention.OVERRIDE: attention.Override(attend, before.get(attention.OVERRIDE))}
            yield
        finally:
            self.options = before

    @contextlib.contextmanager
    def fusing_qkv(self) -> Iterator[Made]:
        host = self._host
        fused = host.once(FusedQKV, lambda: FusedQKV(host.module, host.device, host.hooked))
        with fused.installed():
            yield fused.made
