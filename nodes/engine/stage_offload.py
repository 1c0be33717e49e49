"""Stage Offload: models that have done their part leave the device before what comes next needs the room."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import comfy.model_management
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io

from ..measuring.memory import MIB
from ..methods.method import State
from .host import machine
from .node import node_of
from .telling import verdicts

TEXT_ENCODERS, DIFFUSION_MODELS, ALL_BUT = "text encoders", "diffusion models", "all but the input's"
STAGES = (TEXT_ENCODERS, DIFFUSION_MODELS, ALL_BUT)


def free_stages(node: type[io.ComfyNode], value: Any, stages: str) -> io.NodeOutput:
    """The output of the node: the value as it came, once the stages are unloaded and the node has told of it."""
    where = verdicts.current_prompt()
    line = verdicts.Line(*_freed(_chosen(stages, value), stages))
    verdicts.publish(where, node_of(node), line, {}, (1, "stage_offload"))
    return io.NodeOutput(value)


def _chosen(stages: str, value: Any) -> list[Any]:
    """Patchers of the loaded models that belong to the stages."""
    loaded = [one.model for one in comfy.model_management.current_loaded_models if one.model is not None]
    needed = {id(patcher.model) for patcher in _patchers_in(value)}
    belongs: dict[str, Callable[[Any], bool]] = {
        TEXT_ENCODERS: lambda patcher: patcher.is_clip,
        DIFFUSION_MODELS: lambda patcher: isinstance(patcher.model, BaseModel),
        ALL_BUT: lambda patcher: id(patcher.model) not in needed,
    }
    return list(filter(belongs[stages], loaded))


def _patchers_in(value: Any) -> Iterator[Any]:
    """The patchers of what a node passes on: a MODEL, CLIP, VAE, GUIDER, CONTROL_NET, or a CONDITIONING with one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for inner in value:
            yield from _patchers_in(inner)
        return
    get_models = getattr(value, "get_models", None)
    # A guider may have a second model, and ControlNets in its conditionings.
    yield from _patchers_in(getattr(value, "original_conds", ()))
    found = [value, *(getattr(value, name, None) for name in ("patcher", "model_patcher", "uncond_model_patcher"))]
    found += get_models() if callable(get_models) else []
    for patcher in found:
        if isinstance(patcher, ModelPatcher):
            yield from (patcher, *patcher.model_patches_models(), *patcher.get_nested_additional_models())


def _freed(patchers: list[Any], stages: str) -> tuple[State, str]:
    """Unload models. Returns the state and what to say of it."""
    in_use = {patcher.load_device: machine.device_memory(patcher.load_device) for patcher in patchers}
    machine.release_unused()
    room = {device: read() for device, (read, *_) in in_use.items()}
    held = [_held(patcher) for patcher in patchers]
    for device in in_use:
        machine.unload([patcher.model for patcher in patchers], device)
    machine.release_unused()
    freed = {}
    for patcher, before in zip(patchers, held, strict=True):
        if before > _held(patcher):
            freed[patcher] = before - _held(patcher)
    if not freed:
        return "inert", f"freed nothing: {_why_nothing(patchers, stages)}"
    told = [f"{_name(patcher)} {size / MIB:.0f} MiB" for patcher, size in freed.items()]
    for device in dict.fromkeys(patcher.load_device for patcher in freed):
        read, _, is_the_devices = in_use[device]
        where = device if is_the_devices else "this process's RAM"
        told.append(f"in use of {where}: {room[device] / MIB:.0f} MiB before, {read() / MIB:.0f} MiB after")
    return "active", f"freed {sum(freed.values()) / MIB:.0f} MiB: {'; '.join(told)}"


def _is_kept_there(patcher: Any) -> bool:
    """Whether a model's weights stay on the device that it is used on, also when it is unloaded."""
    return bool(patcher.load_device == patcher.offload_device)


def _held(patcher: Any) -> int:
    """Bytes that unloading a model gives back: where its weights stay, those of the copies that a LoRA made of them."""
    if _is_kept_there(patcher):
        return sum(original.weight.nbytes for original in patcher.backup.values())
    return int(patcher.loaded_size())


def _name(patcher: Any) -> str:
    name = type(patcher.model).__name__
    return f"{name}'s patched weights" if _is_kept_there(patcher) else name


def _why_nothing(patchers: list[Any], stages: str) -> str:
    kept = [f"{type(patcher.model).__name__} on {patcher.load_device}" for patcher in filter(_is_kept_there, patchers)]
    if kept:
        return f"weights are kept where they are used ({', '.join(kept)})"
    if patchers:
        return f"nothing of {', '.join(map(_name, patchers))} is on a device"
    return "no other model is loaded" if stages == ALL_BUT else f"no {stages} are loaded"
