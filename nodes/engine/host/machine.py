"""The machine and the host under a measurement: what they are, and how much memory is in use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import inspect
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import MethodType
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import psutil
import torch

from ...measuring.memory import MIB, PeakMemory

PACK = Path(__file__).resolve().parents[3]


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for whoever reads the figures elsewhere."""
    # The host has a placeholder for DirectML.
    has_memory = device.type != "privateuseone"
    return {
        "device": comfy.model_management.get_torch_device_name(device),
        "device_type": device.type,
        "device_memory_mib": round(comfy.model_management.get_total_memory(device) / MIB) if has_memory else None,
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_mib": round(psutil.virtual_memory().total / MIB),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions(),
    }


def versions() -> dict[str, str]:
    """Those of the host and of the pack."""
    return {"comfyui": _comfyui_version(), "slipstream": _own_version()}


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:  # no Linux
        names = []
    return next(iter(names), "") or platform.processor() or platform.machine()


def _comfyui_version() -> str:
    # An embedded host may lack the file.
    try:
        from comfyui_version import __version__
    except ImportError:
        return "unknown"
    return str(__version__)


@cache
def _own_version() -> str:
    found = re.search(r'^version = "(.+)"$', (PACK / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "unknown"


def waiting(device: torch.device) -> Callable[[], None] | None:
    """How to wait for all work on a device; None where that cannot be done, as with DirectML."""
    if device.type == "cpu":
        return lambda: None
    if device.type == "mps":
        return torch.mps.synchronize
    module: Any = getattr(torch, device.type, None)
    return partial(module.synchronize, device) if hasattr(module, "synchronize") else None


def synchronize(device: torch.device) -> None:
    """Wait for all work on a device, where it can be waited for: a clock read before shows when work was queued."""
    wait = waiting(device)
    if wait is not None:
        wait()


def clock(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    synchronize(device)
    return time.perf_counter()


_trial = threading.local()


@contextlib.contextmanager
def trial() -> Iterator[None]:
    """In this thread, what runs is only timed: a method counts none of it as part of the run."""
    _trial.is_on = True
    try:
        yield
    finally:
        _trial.is_on = False


def is_trial() -> bool:
    """Whether what runs in this thread is only timed."""
    return getattr(_trial, "is_on", False)


_process = psutil.Process()


def ram_in_use() -> int:
    """Bytes of this process that are in RAM."""
    return int(_process.memory_info().rss)


def spare_ram() -> int:
    """Bytes of RAM that may be filled for speed alone: what is free, less a quarter of all, for what comes after."""
    memory = psutil.virtual_memory()
    return int(memory.available - memory.total / 4)


def device_memory(device: torch.device) -> tuple[Callable[[], int], str, bool]:
    """How to read what is in use on a device, what that is in words, and whether it is the device's own figure.

    The device itself is asked: torch's allocator does not see what the host's DynamicVRAM takes. Where
    a device cannot be asked, or there is none but the CPU, it is the RAM of this process.
    """
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "mem_get_info"):

        def in_use() -> int:
            free, total = module.mem_get_info(device)
            return int(total - free)

        # Some Intel drivers have the function, but no answer.
        with contextlib.suppress(RuntimeError):
            in_use()
            return in_use, "peak in use on the whole device, other programs included, as the device tells", True
    if device.type == "mps":
        return torch.mps.driver_allocated_memory, "peak allocated by the Metal driver for this process", True
    words = "increase of this process's resident memory during the run, the weights it already had not included"
    return ram_in_use, words, False


def watch_memory(device: torch.device) -> PeakMemory:
    """Watches what is in use on a device, as `device_memory` reads it, and in RAM: two peaks."""
    return PeakMemory(device_memory(device)[0], ram_in_use)


def release_unused() -> None:
    """Give back what is freed but kept, or the next run would find it and seem to need less."""
    gc.collect()
    comfy.model_management.soft_empty_cache()
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> Any:
    """glibc's, which gives freed memory back to the system; None elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def take_off_device(models: Iterable[Any], device: torch.device) -> None:
    """Unload inner models: beside one of another variant, a model might be loaded in part only, and its
    memory could not be told from theirs."""
    if device.type != "cpu":
        unload(models, device)


def unload(models: Iterable[Any], device: torch.device) -> None:
    """Have the host unload inner models from the device they are used on, and no others."""
    loaded = comfy.model_management.current_loaded_models
    unwanted = {id(model) for model in models}
    kept = [one for one in loaded if one.model is None or id(one.model.model) not in unwanted]
    if len(kept) < len(loaded):
        comfy.model_management.free_memory(1e30, device, kept)


def release(patcher: Any) -> bool:
    """Have the host unload a model. Returns whether that gave memory back: its weights may have no other place."""
    before = patcher.loaded_size()
    if patcher.load_device == patcher.offload_device or not before:
        return False
    unload([patcher.model], patcher.load_device)
    return bool(patcher.loaded_size() < before)


def has_room(patcher: Any, shape: torch.Size) -> bool:
    """Whether a model, as a whole, can be loaded beside what is on its device, and sample a guided latent of this shape
    there: the host's own estimate."""
    host, device = comfy.model_management, patcher.load_device
    activations = patcher.memory_required([2 * shape[0], *shape[1:]]) + host.extra_reserved_memory()
    weights = patcher.model_size() - patcher.loaded_size()
    return bool(host.get_free_memory(device) >= 1.1 * weights + max(host.minimum_inference_memory(), activations))


def is_dynamic(patcher: Any) -> bool:
    """Whether the host's DynamicVRAM brings this model's weights to the device as they are used, in the first step."""
    return bool(getattr(patcher, "is_dynamic", lambda: False)())


def without_dynamic_vram(patcher: Any, title: str) -> Any:
    """The model, loaded a second time without DynamicVRAM if it has it: compiled code can't follow weights that come
    and go as they are used.

    Raises:
        RuntimeError: its loader does not say how to load it again.
    """
    if not is_dynamic(patcher):
        return patcher
    try:
        return patcher.clone(disable_dynamic=True)
    except RuntimeError as error:
        raise RuntimeError(
            f"{title}: DynamicVRAM brings this model's weights to the GPU as they are used, which compiled code can't "
            f"follow, and its loader has no way to load it without ({error}). Load it with ComfyUI's own loader, or "
            "start ComfyUI with --disable-dynamic-vram."
        ) from error


REPLACED = "another node replaced its code"
HOOKED = "another node has a hook inside"
"""Reasons of `unsuited` for which other packs' code runs in a module."""
OWN_ATTENTION = "the checkpoint names an attention of their own"


def has_own_attention(module: torch.nn.Module) -> bool:
    """Whether the checkpoint names an attention for this layer, which the host (0.39 and newer) uses unless something
    takes attention's place. What does is not told of which layer a call is."""
    own = getattr(module, "comfy_attention", None)
    return getattr(own, "function", None) is not None


OURS = f"{__name__.partition('.engine.')[0]}."
"""What the names of the pack's modules begin with."""


def is_host_s(code: Any) -> bool:
    """Whether a class or function is the host's own. What another pack's decorator made is that pack's, whatever it is
    named."""
    made_in = getattr(code, "__globals__", {}).get("__name__") or code.__module__
    return f"{code.__module__}.".startswith("comfy.") and f"{made_in}.".startswith(("comfy.", "torch."))


def is_ours(code: Any) -> bool:
    """Whether a function or method is the pack's own."""
    return str(code.__module__).startswith(OURS)


def is_others(module: torch.nn.Module) -> bool:
    """Whether a module's class is neither the host's, nor torch's, nor ours."""
    name = f"{type(module).__module__}."
    return not name.startswith(("comfy.", "torch.", OURS))


def is_forward_replaced(module: torch.nn.Module) -> bool:
    """Whether a module has another forward than its class's. What takes one back may leave the class's own on the
    instance, as the host's bypass LoRA does."""
    forward = module.__dict__.get("forward")
    return forward is not None and forward != MethodType(type(module).forward, module)


def unsuited(module: torch.nn.Module, device: torch.device) -> str | None:
    """Why no graph should be made of a module as it is now; None if one may."""
    for inner in module.modules():
        if _is_replaced(inner, inner is module):
            return REPLACED
        if hasattr(inner, "_v"):
            return "DynamicVRAM brings the weights to the device as they are used"
        if getattr(inner, "weight_function", None) or getattr(inner, "bias_function", None):
            return "weights are patched as they are used, since the model is loaded in part only"
        if inner is not module and (inner._forward_hooks or inner._forward_pre_hooks):
            return HOOKED
        if has_own_attention(inner):
            return OWN_ATTENTION
    if any(weight.device != device for weight in module.parameters()):
        return "weights are offloaded, since the model is loaded in part only"
    return None


def _is_replaced(module: torch.nn.Module, is_outermost: bool) -> bool:
    """Whether another node's code runs in a module that a graph would trace, and either is the outermost, or is given
    the transformer options: a graph has constant ones."""
    if is_forward_replaced(module):
        return True
    forward: Any = type(module).forward
    if is_host_s(forward) or forward.__module__.startswith(("torch.", OURS)):
        return False
    return is_outermost or _takes_options(forward)


def _takes_options(function: Any) -> bool:
    """Whether a function may be given the host's transformer options."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters
    any_name = inspect.Parameter.VAR_KEYWORD
    return "transformer_options" in parameters or any(one.kind == any_name for one in parameters.values())


def as_sampled(patcher: Any, *conditionings: Any) -> Any:
    """The model that the host will sample with these conditionings.

    With hooks on one of them (0.28 and newer), it is a copy of a dynamic model that is read from disk, once for
    each patcher: made here once, and not by each run's clone.
    """
    has_hooks = getattr(comfy.sampler_helpers, "cond_has_hooks", None)
    if has_hooks is None or not is_dynamic(patcher) or not any(has_hooks(cond) for cond in conditionings):
        return patcher
    return patcher.get_non_dynamic_delegate()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there was not enough memory, on a device or in RAM."""
    is_oom = getattr(comfy.model_management, "is_oom", None)  # since 0.28
    if is_oom(error) if is_oom is not None else isinstance(error, comfy.model_management.OOM_EXCEPTION):
        return True
    # On a CPU, torch and what it calls have no error of their own for it; on Apple's GPUs neither.
    texts = ("DefaultCPUAllocator", "bad_alloc", "MPS backend out of memory")
    return isinstance(error, MemoryError) or any(text in str(error) for text in texts)
