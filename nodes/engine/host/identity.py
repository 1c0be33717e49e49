"""What things are by what is in them: the same in every process, where an id or a uuid is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch

TENSORS = 256
"""At most so many of a model's weights are looked at, and of each a few numbers: another checkpoint differs in all."""

NUMBERS = 16
DEEPEST = 6
SHORT = 16


def digest(*values: Any) -> str:
    """A short text that is equal for equal values: plain ones, tensors, and what is made of them.

    Of other objects, such as ControlNets, it goes by their class and by what of that kind is in them.
    """
    found = hashlib.sha256()
    for value in values:
        _add(found, value, 0)
    return found.hexdigest()[:SHORT]


def _add(found: Any, value: Any, depth: int) -> None:
    if isinstance(value, torch.Tensor):
        found.update(f"tensor {tuple(value.shape)} {value.dtype}".encode())
        found.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    elif value is None or isinstance(value, bool | int | float | str | bytes):
        found.update(f"{type(value).__name__} {value!r}".encode())
    elif isinstance(value, Mapping):
        found.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=str):
            found.update(str(key).encode())
            _add(found, value[key], depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        found.update(f"sequence {len(value)}".encode())
        for one in value:
            _add(found, one, depth + 1)
    else:
        found.update(_name(value).encode())
        is_model = isinstance(value, torch.nn.Module) or hasattr(value, "model_options")
        if not is_model and depth < DEEPEST and hasattr(value, "__dict__"):
            plain = {name: one for name, one in vars(value).items() if not callable(one) and "uuid" not in name}
            _add(found, plain, depth + 1)


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


def of_weights(patcher: Any) -> str:
    """Of a model's own weights, without patches, whether it is loaded or not.

    Args:
        patcher: ModelPatcher.
    """
    weights = patcher.model.state_dict()
    # Where the host has patched in place, these are what it will put back.
    backup = getattr(patcher, "backup", {})
    found = hashlib.sha256()
    names = sorted(weights)
    for name in names:
        found.update(f"{name} {tuple(weights[name].shape)}".encode())
    for name in names[:: max(1, len(names) // TENSORS)]:
        weight = getattr(backup.get(name), "weight", weights[name])
        _add_some(found, weight)
    return found.hexdigest()[:SHORT]


def _add_some(found: Any, weight: torch.Tensor) -> None:
    """A few numbers of a tensor, spread over it."""
    # Packed and quantized weights are classes of their own: what they hold is what they are.
    data = getattr(weight, "_qdata", weight).detach()
    if data.numel():
        places = torch.linspace(0, data.numel() - 1, min(NUMBERS, data.numel()), dtype=torch.float64).long()
        some = data.reshape(-1)[places.to(data.device)]
        found.update(some.to("cpu", torch.float32).numpy().tobytes())


def of_patches(patcher: Any) -> str:
    """Of what other nodes put on a model: patches of weights by what is in them, functions by their names."""
    found = hashlib.sha256()
    for name in sorted(patcher.patches):
        found.update(str(name).encode())
        for patch in patcher.patches[name]:
            for part in patch:
                for tensor in _tensors(part, 0):
                    _add_some(found, tensor)
                if isinstance(part, int | float):
                    found.update(repr(part).encode())
    options = patcher.model_options
    for group in (options.get("transformer_options", {}), options, patcher.object_patches, patcher.wrappers):
        found.update(repr(sorted(_names(group, 0))).encode())
    return found.hexdigest()[:SHORT]


def _tensors(value: Any, depth: int) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif depth < DEEPEST and isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one, depth + 1)
    elif depth < DEEPEST and hasattr(value, "weights"):
        yield from _tensors(value.weights, depth + 1)


def _names(value: Any, depth: int) -> Iterable[str]:
    """Keys, and the names of functions and classes in them. Nothing that differs from process to process."""
    if isinstance(value, Mapping) and depth < DEEPEST:
        for key, one in value.items():
            for name in _names(one, depth + 1) or ("",):
                yield f"{key} {name}"
    elif isinstance(value, list | tuple) and depth < DEEPEST:
        for one in value:
            yield from _names(one, depth + 1)
    elif value is None or isinstance(value, bool | int | float | str):
        yield repr(value)
    elif isinstance(value, torch.nn.Module):
        # Such as a schedule that another node put in the place of the model's: its class alone says little.
        plain = {name: one for name, one in vars(value).items() if isinstance(one, bool | int | float | str)}
        yield f"{_name(value)} {digest(plain, dict(value.named_buffers()))}"
    else:
        yield _name(value)
