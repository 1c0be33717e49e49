"""What other nodes patch into a model, where it computes in another dtype than the host would.

Patches bring weights and tensors of their own in the dtype that the host computes in: GLIGEN, hypernetworks, IPAdapter,
ControlNets of transformers. Each is given what the host would give it, and what it returns goes on in what is computed
where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..host.machine import OURS

ORIGINAL_BLOCK = "original_block"
"""What the host hands to a block's replacement, to run the block."""


def in_dtype(theirs: torch.dtype, ours: torch.dtype, options: dict[str, Any]) -> dict[str, Any]:
    """Transformer options with which other nodes' patches and replacements get values in one dtype while the model
    computes in another. What is no callable, and our own, stays as it is.

    Args:
        theirs: what the host would compute in.
        ours: what is computed in.
        options: those of the call; not written to.
    """

    def patch(value: Any) -> Any:
        if isinstance(value, tuple):
            # The class of the layers that a handler runs, and the handler.
            return tuple(patch(one) for one in value)
        # What our methods put there computes in any dtype.
        is_ours = (getattr(value, "__module__", None) or "").startswith(OURS)
        if not callable(value) or isinstance(value, (type, Abroad)) or is_ours:
            return value
        return Abroad(value, theirs, ours)

    changed: dict[str, Any] = {}
    patches, replacements = options.get("patches"), options.get("patches_replace")
    if patches:
        changed["patches"] = {name: [patch(one) for one in listed] for name, listed in patches.items()}
    if replacements:
        changed["patches_replace"] = {
            name: {place: patch(one) for place, one in placed.items()} for name, placed in replacements.items()
        }
    return {**options, **changed} if changed else options


class Abroad:
    """A function that is given values in its own dtype, and whose results come back in that of what it was given.

    Args:
        patch: another node's patch, or the forward of a module of theirs; its attributes can be read here.
        theirs, ours: as for `in_dtype`.
    """

    def __init__(self, patch: Callable[..., Any], theirs: torch.dtype, ours: torch.dtype):
        self.patch = patch
        self.theirs = theirs
        self.ours = ours

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["patch"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Some take all that they need in one dict; elsewhere a dict is the host's options.
        if args and isinstance(args[0], dict):
            first, *rest = args
            exchange = _Exchange(self.theirs, self.ours, {**first, **kwargs})
            given = (exchange.gives_each(first), *map(exchange.gives_blocks, rest))
        else:
            exchange = _Exchange(self.theirs, self.ours, {**dict(enumerate(args)), **kwargs})
            given = tuple(map(exchange.gives, args))
        with exchange.running_layers(args):
            result = self.patch(*given, **exchange.gives_each(kwargs))
        return exchange.takes(result)


class Returning(Abroad):
    """A part that computes in what it is given, but may return what the host would compute in."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.patch(*args, **kwargs)
        first = args[0] if args else None
        is_ours = isinstance(first, torch.Tensor) and first.dtype == self.ours
        if is_ours and isinstance(result, torch.Tensor) and result.dtype == self.theirs:
            return result.to(self.ours)
        return result


class _Exchange:
    """The values of one call of a patch, there and back.

    Each tensor is handed over once, so that what is one there is one here, and what is handed back as it was is the
    tensor that it was made of. What is written into one is written into the other.

    Args:
        arguments: what the patch is called with, by name or number.
    """

    def __init__(self, theirs: torch.dtype, ours: torch.dtype, arguments: dict[Any, Any]):
        self.theirs = theirs
        self.ours = ours
        self.arguments = arguments
        # By the ids of both.
        self._pairs: dict[int, tuple[torch.Tensor, torch.Tensor, int]] = {}

    def gives(self, value: Any) -> Any:
        """A value as the patch expects it."""
        if isinstance(value, (list, tuple)):
            return _of_type(value, [self.gives(one) for one in value])
        # The host's timesteps, the only ones in one dimension, are float32 whatever it computes in.
        if not isinstance(value, torch.Tensor) or value.dtype != self.ours or value.ndim < 2:
            return value
        if id(value) not in self._pairs:
            handed = value.to(self.theirs)
            pair = (value, handed, _version(handed))
            self._pairs[id(value)] = self._pairs[id(handed)] = pair
        return self._pairs[id(value)][1]

    def gives_each(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: self.gives(value) for name, value in values.items()}

    def gives_blocks(self, value: Any) -> Any:
        """The second argument of a block's replacement: what it calls to run the block is ours."""
        if isinstance(value, dict) and callable(value.get(ORIGINAL_BLOCK)):
            run = value[ORIGINAL_BLOCK]
            block = self._home(lambda **args: run(args))
            return {**value, ORIGINAL_BLOCK: lambda args: block(**args)}
        return value

    def _home(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A function of the model that the patch may call with what it was given."""

        def home(*args: Any, **kwargs: Any) -> Any:
            self._settle()
            result = function(*(self._back(arg, None) for arg in args), **self._back_each(kwargs))
            self._refresh()
            return self.gives_each(result) if isinstance(result, dict) else self.gives(result)

        return home

    @contextmanager
    def running_layers(self, args: tuple[Any, ...]) -> Iterator[None]:
        """While a handler has a layer of the model to run, the layer gets what it computes in."""
        layers = [arg for arg in args if isinstance(arg, nn.Module)] if self._pairs else []
        before = [layer.__dict__.get("forward") for layer in layers]
        try:
            for layer in layers:
                layer.__dict__["forward"] = self._home(layer.forward)
            yield
        finally:
            for layer, forward in zip(layers, before, strict=True):
                if forward is None:
                    del layer.__dict__["forward"]
                else:
                    layer.__dict__["forward"] = forward

    def takes(self, result: Any) -> Any:
        """What a patch returned, as what it was given was."""
        self._settle()
        if isinstance(result, dict):
            return self._back_each(result)
        if isinstance(result, (list, tuple)):
            return _of_type(result, [self._back(one, place) for place, one in enumerate(result)])
        return self._back(result, None)

    def _back_each(self, values: dict[str, Any]) -> dict[str, Any]:
        return {name: self._back(value, name) for name, value in values.items()}

    def _back(self, value: Any, place: Any) -> Any:
        """A value that came from the patch, in the dtype of what it was given in this place; where nothing was, of the
        first that it was given."""
        if isinstance(value, (list, tuple)):
            return _of_type(value, [self._back(one, place) for one in value])
        if not isinstance(value, torch.Tensor) or not self._pairs:
            return value
        if id(value) in self._pairs:
            return self._pairs[id(value)][0]
        if any(value is argument for argument in self.arguments.values()):
            return value
        like = self.arguments.get(place)
        if not isinstance(like, torch.Tensor) or not like.is_floating_point():
            like = next(iter(self._pairs.values()))[0]
        return value.to(like.dtype) if value.dtype == self.theirs else value

    def _settle(self) -> None:
        """What the patch wrote into what it was handed is written into what that was made of."""
        for ours, handed, version in self._each():
            if version == _version(handed) != -1 or _overlaps(ours):
                continue
            back = handed.to(ours.dtype)
            if torch.promote_types(ours.dtype, handed.dtype) != handed.dtype:
                # What it did not write lost nothing.
                back = torch.where(handed == ours.to(handed.dtype), ours, back)
            ours.copy_(back)

    def _refresh(self) -> None:
        """What the model wrote, as some blocks do, is written into what the patch was handed."""
        for ours, handed, _ in self._each():
            handed.copy_(ours)

    def _each(self) -> list[tuple[torch.Tensor, torch.Tensor, int]]:
        return list({id(pair): pair for pair in self._pairs.values()}.values())


def _version(tensor: torch.Tensor) -> int:
    """A number that changes when the tensor is written to; -1 where torch keeps none, as in inference mode."""
    return -1 if tensor.is_inference() else tensor._version


def _overlaps(tensor: torch.Tensor) -> bool:
    """Whether elements share their memory: nobody can have written to it."""
    return any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _of_type(like: Any, values: list[Any]) -> Any:
    """A list or tuple of a kind."""
    return type(like)(*values) if hasattr(like, "_fields") else type(like)(values)
