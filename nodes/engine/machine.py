"""The machine and the host under a measurement: what they are, and how much memory is in use."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import comfy.model_management
import psutil
import torch

from ..measuring.memory import MIB, PeakMemory

PACK = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions, for whoever reads the figures elsewhere."""
    return {
        "device": comfy.model_management.get_torch_device_name(device),
        "device_type": device.type,
        "device_memory_mib": round(comfy.model_management.get_total_memory(device) / MIB),
        "processor": _processor(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ram_mib": round(psutil.virtual_memory().total / MIB),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "comfyui": _comfyui_version(),
        "slipstream": _own_version(),
    }


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


def synchronize(device: torch.device) -> None:
    """Wait for all work on a device, where it can be waited for: a clock read before shows when work was queued."""
    if device.type == "mps":
        torch.mps.synchronize()
        return
    # DirectML has no module of its own.
    module: Any = getattr(torch, device.type, None)
    if device.type != "cpu" and hasattr(module, "synchronize"):
        module.synchronize(device)


def clock(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    synchronize(device)
    return time.perf_counter()


def ram_in_use() -> int:
    """Bytes of this process that are in RAM."""
    return int(psutil.Process().memory_info().rss)


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


def leave_alone_on_device(patcher: Any) -> None:
    """Take all other models off the device: beside one of another variant, a model might be loaded in part
    only, and its memory could not be told from theirs."""
    device = patcher.load_device
    if device.type == "cpu":
        return
    loaded = comfy.model_management.current_loaded_models
    kept = [one for one in loaded if one.model is not None and one.model.model is patcher.model]
    comfy.model_management.free_memory(1e30, device, kept)
