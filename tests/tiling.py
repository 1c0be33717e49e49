"""What the tests and the benchmark of tiles have in common: how near two results are, how much of a seam is seen, and
what would lie on a device where there is only a CPU."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


def decibel(value: Tensor, expected: Tensor) -> float:
    """The error against the range of what is expected: for pictures with black and white in them, the PSNR."""
    span = expected.max() - expected.min()
    return float(20 * torch.log10(span / (value - expected).float().square().mean().sqrt()))


def seam_energy(images: Tensor, side: int) -> float:
    """The mean step from pixel to pixel across the borders of tiles over that everywhere else.

    Args:
        images: (B, H, W, C).
        side: of the tiles, of which as many lie side by side as it takes, all of about one size.
    """
    across: list[Tensor] = []
    elsewhere: list[Tensor] = []
    for dim in (1, 2):
        steps = images.diff(dim=dim).abs().mean([other for other in range(4) if other != dim])
        count = -(-images.shape[dim] // side)
        is_border = torch.zeros(len(steps), dtype=torch.bool)
        is_border[[images.shape[dim] * index // count - 1 for index in range(1, count)]] = True
        across.append(steps[is_border])
        elsewhere.append(steps[~is_border])
    return float(torch.cat(across).mean() / torch.cat(elsewhere).mean())


class Accounting(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is on, as long as they live.

    What kernels take for themselves is not among them.

    Attributes:
        peak: the most that lived at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._is_elsewhere = False
        self._known = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return result

    @contextlib.contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made meanwhile does not count."""
        self._is_elsewhere = True
        try:
            yield
        finally:
            self._is_elsewhere = False

    def _add(self, storage: Any) -> None:
        if storage in self._known:
            return
        size = 0 if self._is_elsewhere else storage.nbytes()
        self._known[storage] = size
        self._live += size
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._remove, size)

    def _remove(self, size: int) -> None:
        self._live -= size


@contextlib.contextmanager
def on_device(tiled_vae: Any) -> Iterator[Accounting]:
    """Accounting of what tiles take on a device: as if tiles were copied there, and feature maps waited elsewhere.

    Args:
        tiled_vae: the module `methods.tiled_vae`.
    """
    accounting = Accounting()
    load, make, make_empty = tiled_vae.Tiler._load, tiled_vae.Waiting.__init__, tiled_vae.Waiting.empty

    def copied(*args: Any) -> Tensor:
        return load(*args).clone()

    def made(self: Any, values: Tensor, *args: Any) -> None:
        with accounting.elsewhere():
            make(self, values.view_as(values), *args)

    def made_empty(*args: Any) -> Any:
        with accounting.elsewhere():
            return make_empty(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiled_vae.Tiler, "_load", copied)
        patch.setattr(tiled_vae.Waiting, "__init__", made)
        patch.setattr(tiled_vae.Waiting, "empty", made_empty)
        with accounting:
            yield accounting
