"""What things are by what is in them: the same in every process, where an id or a uuid is not, and the same after a run
as before it."""

from __future__ import annotations

import dis
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch

TENSORS = 256
"""At most so many of a model's weights are looked at, and of each a few numbers: another checkpoint differs in all."""

NUMBERS = 16
SHORT = 16

MANY = 16
"""A mapping to more tensors than so many is a model's weights, or a LoRA's."""

SET_BY_RUNS = frozenset(
    {
        # The host's hooks: where in their keyframes a run is.
        *("curr_t", "_curr_t", "start_t", "_skip_adding"),
        *("_current_keyframe", "_current_used_steps", "_current_index", "_current_strength"),
        # Its ControlNets: what is made of the hint, for the model at hand.
        *("cond_hint", "extra_concat", "timestep_range", "model_sampling_current"),
    }
)
"""Attributes that a run sets on what it was given."""

NAMES_OF_THEIR_OWN = ("uuid", "hook_id")
"""What attributes are called that are made up anew for each object."""


def digest(*values: Any) -> str:
    """A short text that is equal for equal values: plain ones, tensors, and what is made of them.

    Of other objects, such as ControlNets and hooks, it goes by their class and by what of that kind is in them.
    """
    found = _Digest()
    for value in values:
        found.add(value)
    return found.text()


class _Digest:
    """What values come to, one after the other."""

    def __init__(self) -> None:
        self._found = hashlib.sha256()
        self._within: set[int] = set()
        """Ids of what is being added: things may hold each other."""

    def text(self) -> str:
        return self._found.hexdigest()[:SHORT]

    def say(self, text: str) -> None:
        self._found.update(f"{text}\n".encode())

    def add(self, value: Any) -> None:
        """All that is in a value."""
        if isinstance(value, torch.Tensor):
            self.say(f"tensor {tuple(value.shape)} {value.dtype}")
            self._found.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
        elif value is None or isinstance(value, bytes | torch.dtype) or _is_plain(value):
            self.say(f"{type(value).__name__} {value!r}")
        elif self._begins(value):
            self._add_parts(value)
            self._within.discard(id(value))

    def _begins(self, value: Any) -> bool:
        if id(value) in self._within:
            self.say("itself")
            return False
        self._within.add(id(value))
        return True

    def _add_parts(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self.say(f"mapping {len(value)}")
            if len(value) > MANY and all(any(True for _ in _tensors(one)) for one in value.values()):
                self.add_weights(value)
                return
            for key in sorted(value, key=str):
                self.say(str(key))
                self.add(value[key])
        elif isinstance(value, list | tuple | set | frozenset):
            self.say(f"sequence {len(value)}")
            for one in sorted(value, key=repr) if isinstance(value, set | frozenset) else value:
                self.add(one)
        elif hasattr(value, "model_options") and hasattr(value, "model"):
            self.say(f"{_name(value)} {of_weights(value)}")
            self.add_patches(value)
        elif isinstance(value, torch.nn.Module):
            self.say(_name(value))
            self.add_weights(value.state_dict())
        elif callable(value):
            self._add_settings(value)
        else:
            self.say(_name(value))
            own = vars(value) if hasattr(value, "__dict__") else {}
            self.add({name: one for name, one in own.items() if _is_own(name)})

    def add_weights(self, weights: Mapping[str, Any], backup: Mapping[str, Any] | None = None) -> None:
        """The shapes of all, and a few numbers of some.

        Args:
            weights: tensors, or what holds some.
            backup: what the host will put back in their place.
        """
        names = sorted(weights)
        for name in names:
            self.say(f"{name} {[tuple(one.shape) for one in _tensors(weights[name])]}")
        for name in names[:: max(1, len(names) // TENSORS)]:
            for weight in _tensors(getattr((backup or {}).get(name), "weight", weights[name])):
                self._add_some(weight)

    def _add_some(self, weight: torch.Tensor) -> None:
        """A few numbers of a tensor, spread over it."""
        # Packed and quantized weights are classes of their own: what they hold is what they are.
        data = getattr(weight, "_qdata", weight).detach()
        if data.numel():
            places = torch.linspace(0, data.numel() - 1, min(NUMBERS, data.numel()), dtype=torch.float64).long()
            some = data.reshape(-1)[places.to(data.device)]
            self._found.update(some.to("cpu", torch.float32).numpy().tobytes())

    def add_patches(self, patcher: Any) -> None:
        """What other nodes put on a model: patches of weights by what is in them, functions by what they were made
        with."""
        for name in sorted(patcher.patches, key=str):
            self.say(str(name))
            for patch in patcher.patches[name]:
                for part in patch:
                    for tensor in _tensors(part):
                        self._add_some(tensor)
                    if isinstance(part, int | float):
                        self.say(repr(part))
        options = patcher.model_options
        for group in (options.get("transformer_options", {}), options, patcher.object_patches, patcher.wrappers):
            self._add_settings(group)

    def _add_settings(self, value: Any) -> None:
        """Names, and plain values: what else functions and objects of other packs hold, a run may fill in."""
        if value is None or _is_plain(value):
            self.say(repr(value))
        elif self._begins(value):
            if isinstance(value, Mapping):
                for key in sorted(value, key=str):
                    self.say(str(key))
                    self._add_settings(value[key])
            elif isinstance(value, list | tuple):
                for one in value:
                    self._add_settings(one)
            elif isinstance(value, torch.nn.Module):
                # Such as a schedule that another node put in the place of the model's: its class alone says little.
                self.say(_name(value))
                self.add([_plain(vars(value)), dict(value.named_buffers())])
            else:
                self.say(_name(value))
                for name, one in _made_with(value):
                    self.say(name)
                    self._add_settings(one)
            self._within.discard(id(value))


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str)


def _is_own(name: str) -> bool:
    return name not in SET_BY_RUNS and not any(one in name for one in NAMES_OF_THEIR_OWN)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of some values is plain, or a row of plain ones."""
    return {
        name: one
        for name, one in values.items()
        if _is_own(name) and (_is_plain(one) or (isinstance(one, list | tuple) and one and all(map(_is_plain, one))))
    }


def _made_with(value: Any) -> Iterator[tuple[str, Any]]:
    """The plain values that a function, or an object of another pack, was made with; and the functions in it."""
    if isinstance(value, partial):
        yield "function", value.func
        yield from _kept({**{str(place): one for place, one in enumerate(value.args)}, **value.keywords})
    elif isinstance(value, MethodType):
        yield "function", value.__func__
        yield from _plain(_attributes(value.__self__)).items()
    elif isinstance(value, FunctionType):
        code = value.__code__
        cells = dict(zip(code.co_freevars, value.__closure__ or (), strict=True))
        # What the function itself assigns to counts its calls, or keeps what the last one gave.
        fixed = set(cells) - _assigned(code, "STORE_DEREF")
        yield from _kept({name: content for name in fixed for content in _content(cells[name])})
        yield from _kept({str(place): one for place, one in enumerate(value.__defaults__ or ())})
        yield from _kept(value.__kwdefaults__ or {})
    elif not isinstance(value, type):
        yield from _plain(_attributes(value)).items()


def _kept(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    plain = _plain(values)
    for name in sorted(values):
        if name in plain or isinstance(values[name], FunctionType | MethodType | partial):
            yield name, values[name]


def _attributes(value: Any) -> dict[str, Any]:
    # A module's are for the host to set: where it is, how much of it is loaded.
    if isinstance(value, torch.nn.Module | type) or hasattr(value, "model_options") or not hasattr(value, "__dict__"):
        return {}
    # What its methods assign to is what a run came to.
    functions = [one for kind in type(value).__mro__ for one in vars(kind).values() if isinstance(one, FunctionType)]
    later = [_assigned(one.__code__, "STORE_ATTR") for one in functions if one.__name__ != "__init__"]
    return {name: vars(value)[name] for name in sorted(set(vars(value)).difference(*later))}


def _content(cell: Any) -> Iterator[Any]:
    """What is in a closure's cell, unless nothing was put there yet."""
    try:
        yield cell.cell_contents
    except ValueError:
        return


def _assigned(code: CodeType, by: str) -> set[str]:
    """The names that a function, or a function in it, assigns to by an instruction of Python's."""
    found = {one.argval for one in dis.get_instructions(code) if one.opname == by}
    return found.union(*(_assigned(one, by) for one in code.co_consts if isinstance(one, CodeType)))


def _name(value: Any) -> str:
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', '')}.{named.__qualname__}"


def of_weights(patcher: Any) -> str:
    """Of a model's own weights, without patches, whether it is loaded or not.

    Args:
        patcher: ModelPatcher.
    """
    found = _Digest()
    # Where the host has patched in place, the backup is what it will put back.
    found.add_weights(patcher.model.state_dict(), getattr(patcher, "backup", {}))
    return found.text()


def of_patches(patcher: Any) -> str:
    """Of what other nodes put on a model (ModelPatcher)."""
    found = _Digest()
    found.add_patches(patcher)
    return found.text()


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)
    elif hasattr(value, "weights"):
        yield from _tensors(value.weights)
