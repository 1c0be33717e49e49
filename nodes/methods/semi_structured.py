"""2:4 sparsity: of each four weights in a row of a linear layer two become zero, and the rest make up for them.

A layer's error is what its outputs lose, |X (W - V)^T| with its inputs X (rows, in). The inputs' second moments
H = X^T X / rows tell it for any V, so that few inputs are kept: of wide layers in blocks along the diagonal, which
bounds the memory. Which pair of each four goes is the one whose loss costs least when all other weights make up for it
(optimal brain surgeon's w_p^T [H^-1]_pp^-1 w_p, for all six pairs); a quarter of the fours at a time, those first that
cost most, and after each quarter all weights that are left are fitted anew by conjugate gradients, all rows at once.

Source: "Accelerating Sparse Deep Neural Networks" (Mishra et al., 2021, arXiv:2104.08378) for the form; "Second order
derivatives for network pruning: Optimal Brain Surgeon" (Hassibi, Stork, 1992) and "SparseGPT" (Frantar, Alistarh, 2023,
arXiv:2301.00774) for the correction.
"""

from __future__ import annotations

import warnings
import weakref
from itertools import combinations
from math import ceil, inf, isfinite
from typing import Any

import torch
from torch import Tensor

FOUR = 4
SPAN = 512
"""Inputs whose second moments with each other are kept; between two of such spans they count as none."""
ROWS = 4096
"""Of one call's inputs, those that are looked at, evenly spread."""
SAMPLED = 64
"""Of one call's inputs, those that are kept, to tell the error by."""
CALLS = 16
"""Of which inputs are kept. Tiles and regions make many."""

DAMPING = 0.01
"""Of the mean of an input's squares: what is added to each, so that no weight grows by what is hardly there."""
QUARTERS = 4
STEPS = 4
"""Of conjugate gradients after each quarter; twice as many in the end."""
AT_ONCE = 4096
"""Rows of a weight: what is computed beside it is several times as large."""


def lacks_kernels(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why products with sparse weights are computed as any others; None where there are kernels for them."""
    if device.type != "cuda":
        return "a CPU has no kernels for it" if device.type == "cpu" else f"torch has no kernels for it on {device}"
    if torch.version.hip is not None:
        return "torch has no kernels for it on AMD's GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 0):
        needs = "its kernels need an NVIDIA GPU of compute capability 8.0 (RTX 30, A100) or newer"
        return f"{needs}, and this has {major}.{minor}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels are for fp16 and bf16, and this model computes in {str(dtype).removeprefix('torch.')}"
    return None


def packed(weight: Tensor) -> Tensor:
    """A weight with two zeros in each four, as torch's kernels take it: nine sixteenths of the memory."""
    sparse: Any = torch.sparse
    has_cusparselt = torch.backends.cusparselt.is_available()
    kind = sparse.SparseSemiStructuredTensorCUSPARSELT if has_cusparselt else sparse.SparseSemiStructuredTensorCUTLASS
    with warnings.catch_warnings():
        # That its interface may change, once a process.
        warnings.simplefilter("ignore", UserWarning)
        found: Tensor = kind.from_dense(weight.contiguous())
    return found


class Inputs:
    """What is kept of a layer's inputs, or of several layers' that are given the same ones.

    Args:
        features: of each input.
        device: where they are.

    Attributes:
        seen: how many there were.
        rows: how many of them were looked at.
        moments: H in blocks along its diagonal, each times `rows`.
    """

    def __init__(self, features: int, device: torch.device):
        parts = ceil(features / SPAN)
        span = ceil(features / parts / FOUR) * FOUR
        self.seen = self.rows = 0
        self.spans = [slice(first, min(first + span, features)) for first in range(0, features, span)]
        self.moments = [torch.zeros(one.stop - one.start, one.stop - one.start, device=device) for one in self.spans]
        self._samples: list[Tensor] = []
        self._last: weakref.ref[Tensor] | None = None

    def add(self, x: Tensor) -> None:
        """(..., features) of one call. The same tensor twice in a row, as q, k and v are given it, counts once."""
        if self._last is not None and self._last() is x:
            return
        self._last = weakref.ref(x)
        rows = x.detach().reshape(-1, x.shape[-1])
        if not len(rows):
            return
        self.seen += len(rows)
        if len(self._samples) < CALLS:
            self._samples.append(rows[:: ceil(len(rows) / SAMPLED)].float())
        rows = rows[:: ceil(len(rows) / ROWS)].float()
        self.rows += len(rows)
        for span, moments in zip(self.spans, self.moments, strict=True):
            moments.addmm_(rows[:, span].T, rows[:, span])

    def error(self, weight: Tensor, pruned: Tensor) -> float:
        """How far the outputs of two weights (out, in) are apart, relative to the first's; infinite where nothing can
        be said: outputs that are zero, or not finite."""
        sample = torch.cat(self._samples)
        error = float((sample @ (weight - pruned).float().T).norm() / (sample @ weight.float().T).norm())
        return error if isfinite(error) else inf


def magnitudes(weight: Tensor, inputs: Inputs) -> Tensor:
    """A weight (out, in) with the smaller two of each four zero, uncorrected: what the correction is measured by."""
    fours = weight.view(len(weight), -1, FOUR)
    kept = fours.abs().topk(2, -1).indices
    return torch.zeros_like(fours).scatter_(-1, kept, fours.gather(-1, kept)).flatten(-2)


def prune(weight: Tensor, inputs: Inputs) -> Tensor:
    """A weight (out, in), float32, with two of each four zero and the others corrected for these inputs.

    Inputs that are not finite make it so.
    """
    found = torch.empty_like(weight)
    for span, moments in zip(inputs.spans, inputs.moments, strict=True):
        damped = moments / inputs.rows
        damped.diagonal().add_(DAMPING * damped.diagonal().mean() + torch.finfo(damped.dtype).tiny)
        if not torch.isfinite(damped).all():
            return found.fill_(torch.nan)
        costs = _Costs(damped)
        for rows in range(0, len(weight), AT_ONCE):
            part = slice(rows, rows + AT_ONCE)
            found[part, span] = _pruned(weight[part, span], damped, costs)
    return found


class _Costs:
    """What it costs to lose a pair of four weights, when all others make up for it.

    Args:
        moments: H (in, in), positive definite.
    """

    def __init__(self, moments: Tensor):
        self.pairs = torch.tensor(list(combinations(range(FOUR), 2)), device=moments.device)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
        size = len(inverse)
        # The blocks of four along the diagonal: (in / 4, 4, 4).
        blocks = inverse.view(size // FOUR, FOUR, size // FOUR, FOUR).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        self._inner = torch.linalg.inv(blocks[:, self.pairs[:, :, None], self.pairs[:, None, :]])

    def least(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """For each four of a weight (out, in): what its cheapest pair costs (out, in / 4), and which that is."""
        pairs = weight.reshape(len(weight), -1, FOUR)[:, :, self.pairs]
        a, b = pairs.unbind(-1)
        inner = self._inner
        costs = a * a * inner[..., 0, 0] + 2 * a * b * inner[..., 0, 1] + b * b * inner[..., 1, 1]
        cost, which = costs.min(-1)
        return cost, which


def _pruned(weight: Tensor, moments: Tensor, costs: _Costs) -> Tensor:
    out, size = weight.shape
    fours = size // FOUR
    kept = torch.ones(out, fours, FOUR, device=weight.device)
    is_done = torch.zeros(out, fours, dtype=torch.bool, device=weight.device)
    now = weight
    for quarter in range(QUARTERS):
        cost, which = costs.least(now)
        number = ceil(fours * (quarter + 1) / QUARTERS) - ceil(fours * quarter / QUARTERS)
        # Those that cost most go while most weights are left to make up for them.
        chosen = cost.masked_fill(is_done, -1).topk(number, -1).indices
        lost = costs.pairs[which.gather(-1, chosen)]
        left = torch.ones(out, number, FOUR, device=weight.device).scatter_(-1, lost, 0)
        kept.scatter_(1, chosen[..., None].expand_as(left), left)
        is_done.scatter_(1, chosen, True)
        now = _fitted(weight, now, kept.view(out, size), moments, 2 * STEPS if quarter == QUARTERS - 1 else STEPS)
    return now


def _fitted(weight: Tensor, start: Tensor, kept: Tensor, moments: Tensor, steps: int) -> Tensor:
    """The weights that are kept, nearer to those whose outputs are those of `weight`: each row a system of its own, and
    one step of conjugate gradients in all of them one product."""
    scale = 1 / moments.diagonal()
    now = start * kept
    residual = kept * ((weight - now) @ moments)
    direction = residual * scale
    power = (residual * direction).sum(-1, keepdim=True)
    for _ in range(steps):
        change = kept * (direction @ moments)
        # A row that is exact already has no direction.
        length = power / (direction * change).sum(-1, keepdim=True).clamp(min=torch.finfo(power.dtype).tiny)
        now = now + length * direction
        residual = residual - length * change
        scaled = residual * scale
        before, power = power, (residual * scaled).sum(-1, keepdim=True)
        direction = scaled + power / before.clamp(min=torch.finfo(power.dtype).tiny) * direction
    return now
