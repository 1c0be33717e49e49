"""The UNet's 3x3 convolutions, handed to a method: installed for each call of the UNet, and taken back after it.

They are called through an opaque operation, so that a compiled graph neither traces what the method does nor keeps
it: where no run hands them out, the operation is the host's own convolution.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from ...methods.method import Found, MethodRun
from ..host import artifacts, machine
from ..plan import models
from .attention import NAMESPACE

_now = threading.local()


def room() -> int:
    """Bytes that may be taken for what is derived from weights: half of the RAM that was to spare when this was first
    asked. It stays so for the process, since what fits decides bits."""
    return artifacts.once(room, lambda: max(0, machine.spare_ram() // 2))


class Convolutions:
    """Those of one run.

    Args:
        method: takes each call.
        patcher: the guider's ModelPatcher.
        keeper: holds what was derived from the weights, for the next run.
    """

    def __init__(self, method: MethodRun, patcher: Any, keeper: artifacts.Keeper):
        self.method = method
        # They change weights within the run, which what was derived can't follow.
        self._hooked = models.hooked_weights(patcher)
        self._keeper = keeper
        self._derived: dict[int, Derived] = {}
        self._fits: dict[tuple[Derived, Hashable], bool] = {}
        self._taken = 0
        # The host samples on several devices in threads.
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def installed(self, unet: nn.Module) -> Iterator[None]:
        """The UNet's convolutions call the method, for one call of it. Weights cast or patched by the host and what
        is around a convolution, such as hooks, stay."""
        found = {name: module for name, module in unet.named_modules() if _is_suited(module)}
        # In this call the tensors are where they are; nothing tells them from copies but their place.
        owners = {
            module.weight.data_ptr(): module for name, module in found.items() if f"{name}.weight" not in self._hooked
        }
        before = getattr(_now, "call", None)
        _now.call = lambda x, weight, bias: self.method.convolution(Call(self, owners, x, weight, bias))
        try:
            for module in found.values():
                module.__dict__["_conv_forward"] = _convolution
            yield
        finally:
            for module in found.values():
                module.__dict__.pop("_conv_forward", None)
            _now.call = before

    def derived(self, module: nn.Conv2d, key: Hashable, size: int, make: Callable[[], Found]) -> Found | None:
        """What was made of a convolution's weight; None where it takes more than what this run took before leaves.

        What other runs made does not count, so that the same fits in each run: it goes where it is in the way.
        """
        with self._lock:
            derived = self._derived.get(id(module))
            if derived is None:
                derived = self._derived[id(module)] = self._keeper.get(module, __name__, Derived)
                derived.follow(module.weight)
            if (derived, key) not in self._fits:
                self._fits[derived, key] = self._taken + size <= room()
                self._taken += size if self._fits[derived, key] else 0
            if not self._fits[derived, key]:
                return None
            if key not in derived.values:
                if size + sum(other.size for other in _all) > room():
                    for other in list(_all):
                        other.release([key for owner, key in self._fits if owner is other])
                derived.values[key] = size, make()
            made: Found = derived.values[key][1]
            return made


class Call:
    """`methods.method.Convolution`.

    Args:
        run: whose it is.
        owners: the convolutions by where their weights are, but those whose weights change within the run.
        x, weight, bias: what the host calls it with.
    """

    def __init__(
        self,
        run: Convolutions,
        owners: dict[int, nn.Conv2d],
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ):
        self._run = run
        self._owner = owners.get(weight.data_ptr())
        self.x = x
        self.weight = weight
        self.bias = bias
        self.memory_format = _format(x, weight)

    @property
    def is_patched(self) -> bool:
        return self._owner is None

    @property
    def is_counted(self) -> bool:
        return not machine.is_trial()

    @property
    def room(self) -> int:
        return room()

    def host(self) -> torch.Tensor:
        return functional.conv2d(self.x, self.weight, self.bias, padding=1)

    def derived(self, key: Hashable, size: int, make: Callable[[], Found]) -> Found | None:
        assert self._owner is not None
        return self._run.derived(self._owner, key, size, make)

    def once(self, key: Hashable, make: Callable[[], Found]) -> Found:
        return artifacts.once((type(self._run.method).__name__, key), make)


class Derived:
    """What was derived from one weight: none of it stays when the weight becomes another."""

    def __init__(self) -> None:
        self.values: dict[Hashable, tuple[int, Any]] = {}
        self._contents: Hashable = None
        _all.add(self)

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(size for size, _ in self.values.values())

    def follow(self, weight: torch.Tensor) -> None:
        """Forget all if the weight is no longer what it was."""
        contents = artifacts.contents(weight)
        if contents != self._contents:
            self.release()
            self._contents = contents

    def release(self, but: Collection[Hashable] = ()) -> None:
        """Forget all but these; it can be made again."""
        self.values = {key: value for key, value in self.values.items() if key in but}


_all: weakref.WeakSet[Derived] = weakref.WeakSet()


def _is_suited(module: nn.Module) -> bool:
    """Whether a module is a 3x3 convolution of stride 1, with zeros around, that computes as torch's does."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation, module.groups) == ((3, 3), (1, 1), (1, 1), 1)
        and (module.padding, module.padding_mode) == ((1, 1), "zeros")
        and type(module)._conv_forward is nn.Conv2d._conv_forward
        and "_conv_forward" not in module.__dict__
    )


def _format(x: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """What torch's convolution gives its output in: channels last if one of its inputs is that alone."""
    is_last = _is_channels_last(x) or _is_channels_last(weight)
    return torch.channels_last if is_last else torch.contiguous_format


def _is_channels_last(tensor: torch.Tensor) -> bool:
    # Where sizes are 1, a tensor is both.
    return tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def _convolution(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What stands in the place of a convolution's `_conv_forward`: input, weight and bias as the host has cast them."""
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return functional.conv2d(x, weight, bias, padding=1)
    y: torch.Tensor = _convolve(x, weight, bias, _format(x, weight))
    return y


def _convolve_now(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, memory_format: torch.memory_format
) -> torch.Tensor:
    call = getattr(_now, "call", None)
    y: torch.Tensor = functional.conv2d(x, weight, bias, padding=1) if call is None else call(x, weight, bias)
    return y.contiguous(memory_format=memory_format)


def _empty(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, memory_format: torch.memory_format
) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], *x.shape[2:]).contiguous(memory_format=memory_format)


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("convolve(Tensor x, Tensor weight, Tensor? bias, MemoryFormat memory_format) -> Tensor")
_library.impl("convolve", _convolve_now, "CompositeExplicitAutograd")
torch.library.register_fake(f"{NAMESPACE}::convolve", _empty, lib=_library)
_convolve = getattr(torch.ops, NAMESPACE).convolve.default
