"""What may outlive a run: compiled code, found again by what it was made for.

A model that carries a plan carries a `Keeper` too, which its clones share, and what a run makes is held
by the keeper of the model it ran on: it goes when the node is taken out or the model is deleted. Not at
once: a node that is executed again, since a LoRA before it changed, gives a new model, whose first run
takes over what the one before had.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Any, Protocol, runtime_checkable

import torch

from ...methods.method import Found

ATTACHMENT = "slipstream.artifacts"
ORPHANED_S = 60.0
"""How long what nobody keeps any more stays, for a model that comes in its place."""


class Artifact:
    """Something that was made.

    Args:
        module: the module that it was made for; None if it serves any.
        value: what was made. It must not refer to a module that it serves along with others.
    """

    def __init__(self, module: Any, value: Any):
        self._module = None if module is None else weakref.ref(module)
        self.value = value

    def is_for(self, module: Any) -> bool:
        """Whether it was made for this module, and not for one that had its place in memory before."""
        return self._module is None or self._module() is module


_known: dict[Hashable, Any] = {}
_made: weakref.WeakValueDictionary[tuple[int, Hashable], Artifact] = weakref.WeakValueDictionary()
_lock = threading.RLock()


def once(key: Hashable, make: Callable[[], Found]) -> Found:
    """What was found out under a key: once in this process, so that what is measured decides the same in each run."""
    with _lock:
        if key not in _known:
            _known[key] = make()
        found: Found = _known[key]
        return found


class Keeper:
    """Holds what the runs of one model made."""

    def __init__(self) -> None:
        self._held: list[Artifact] = []
        weakref.finalize(self, _linger, self._held)

    def get(self, module: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """What was made under a key, for a module or (None) for any; made now if there is none."""
        with _lock:
            artifact = _made.get((id(module), key))
            if artifact is None or not artifact.is_for(module):
                artifact = _made[id(module), key] = Artifact(module, make())
            if artifact not in self._held:
                self._held.append(artifact)
            return artifact.value

    def model_unloaded(self) -> None:
        """Free what takes memory for speed alone."""
        with _lock:
            for artifact in self._held:
                if isinstance(artifact.value, Releasable):
                    artifact.value.release()


def contents(weight: torch.Tensor) -> Hashable:
    """What tells whether a weight is still what something was made of: its dtype, and the sum of its bits, which any
    edit changes. Edits in place leave everything else as it is, another node may put another weight in its place, and
    the host an equal one elsewhere."""
    # As it lies in memory: any other order would copy it.
    strides = weight.stride()
    order = sorted(range(weight.ndim), key=strides.__getitem__, reverse=True)
    flat = weight.detach().permute(order).flatten()
    is_even = flat.nbytes % 8 == 0 and flat.storage_offset() * flat.element_size() % 8 == 0
    return weight.dtype, int(flat.view(torch.int64 if is_even else torch.uint8).sum())


@runtime_checkable
class Releasable(Protocol):
    """What can be made again."""

    def release(self) -> None:
        """Free it."""


def _linger(held: list[Artifact]) -> None:
    """A keeper is gone: keep what it held for a while."""
    if held:
        timer = threading.Timer(ORPHANED_S, held.clear)
        timer.daemon = True
        timer.start()
