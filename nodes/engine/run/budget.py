"""A budget for one model's weights, kept through the host's own partial loading.

The host tells a patcher how much memory it may take, by `partially_load`, and no wrapper or callback comes between.
So a model whose plan has a budget gets a patcher of its own class, which asks for less. Clones have that class too.
"""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import comfy.model_management
from comfy.model_patcher import ModelPatcher

from ...measuring.memory import MIB, PeakMemory
from ...methods.method import Loaded
from ..host import machine
from ..plan.plan import plan_of

NEXT_TO_NOTHING = 0.1
"""Bytes. The host takes a budget of 0 for none at all, and loads everything."""

INTERVAL_S = 0.05
"""Between two looks at the device. What is allocated there stays so for longer, in torch's cache."""

_loads: weakref.WeakKeyDictionary[Any, tuple[float, int, Any]] = weakref.WeakKeyDictionary()
"""For each inner model how its last load within a budget left it."""

_budgeted: dict[type, type] = {}
"""For each class of patcher the one that keeps to a budget."""


def _budget_of(patcher: Any) -> float | None:
    """Bytes that the plan grants a model's weights; None if it sets no budget, or another node spreads them."""
    if _spread(patcher):
        return None
    for entry in plan_of(patcher).entries:
        mib = getattr(entry.config, "budget_mib", None)
        if mib is not None:
            return float(max(mib * MIB, NEXT_TO_NOTHING))
    return None


def _spread(patcher: Any) -> str:
    """What ComfyUI-MultiGPU's DisTorch was told for a model; empty without. It loads such models by a code of its own,
    which asks no patcher for its budget."""
    told = getattr(patcher.model, "_distorch_v2_meta", None)
    if not told:
        return ""
    return str(told.get("full_allocation") or "as it likes") if isinstance(told, dict) else "as it likes"


class Budgeted(ModelPatcher):
    """A patcher that loads its model within its plan's budget. The plan is all that it knows: it has no state."""

    def partially_load(self, device_to: Any, extra_memory: float = 0, force_patch_weights: bool = False) -> Any:
        budget, used = _budget_of(self), self.loaded_size()
        # Else the host has less to give than the budget, or there is no other place to keep weights in.
        if budget is None or self.load_device == self.offload_device or used + extra_memory < budget:
            return super().partially_load(device_to, extra_memory, force_patch_weights=force_patch_weights)
        if used > budget or _loads.get(self.model) != self._state(budget):
            # Begin anew: what was loaded with another budget the host would add to and take from, layer by layer, so
            # that which layers stay would depend on history, and with them a LoRA's rounding.
            self.unpatch_model(self.offload_device)
            comfy.model_management.soft_empty_cache()
        super().partially_load(device_to, budget - self.loaded_size(), force_patch_weights=force_patch_weights)
        _loads[self.model] = self._state(budget)
        return max(0, self.loaded_size() - used)

    def _state(self, budget: float) -> tuple[float, int, Any]:
        return budget, self.loaded_size(), self.model.current_weight_patches_uuid

    def model_size(self) -> float:
        """What is to be loaded, in bytes: else the host would unload other models to make room for all of it."""
        size, budget = super().model_size(), _budget_of(self)
        if budget is None or self.load_device == self.offload_device:
            return float(size)
        return min(size, budget)

    def clone(self, *args: Any, **kwargs: Any) -> Any:
        other = super().clone(*args, **kwargs)
        # The host hands it `model_size()`, but another pack may take the clone for a patcher of its own class.
        other.size = self.size
        return other


def put_on(patcher: Any) -> None:
    """Have a patcher keep to the budget in its plan, if there is one. DynamicVRAM knows none."""
    if _budget_of(patcher) is None or isinstance(patcher, Budgeted) or machine.is_dynamic(patcher):
        return
    kind = type(patcher)
    if kind not in _budgeted:
        _budgeted[kind] = type(f"Budgeted{kind.__name__}", (Budgeted, kind), {})
    patcher.__class__ = _budgeted[kind]


class Watch:
    """Looks at how a model is loaded and at what is in use on its device, from now until `end`."""

    def __init__(self, patcher: Any):
        self._patcher = patcher
        self._until_end = contextlib.ExitStack()
        self._peak_mib: float | None = None
        self._memory: PeakMemory | None = None
        in_use, _, is_the_devices = machine.device_memory(patcher.load_device)
        if is_the_devices:
            self._memory = self._until_end.enter_context(PeakMemory(in_use, interval_s=INTERVAL_S))

    def end(self) -> None:
        """Never raises: a figure that can't be had must not cost the image."""
        with contextlib.suppress(RuntimeError):
            self._until_end.close()
            if self._memory is not None:
                self._peak_mib = self._memory.peaks[0].peak_mib

    def look(self) -> Loaded:
        """How the model is loaded now."""
        patcher = self._patcher
        layers = [
            module
            for module in patcher.model.modules()
            if hasattr(module, "comfy_cast_weights") and next(module.parameters(recurse=False), None) is not None
        ]
        return Loaded(
            size_mib=comfy.model_management.module_size(patcher.model) / MIB,
            resident_mib=patcher.loaded_size() / MIB,
            layers=len(layers),
            resident_layers=sum(getattr(layer, "comfy_patched_weights", False) for layer in layers),
            device=str(patcher.load_device),
            is_kept_there=patcher.load_device == patcher.offload_device,
            is_dynamic=machine.is_dynamic(patcher),
            spread=_spread(patcher),
            streams=comfy.model_management.NUM_STREAMS,
            peak_mib=self._peak_mib,
        )
