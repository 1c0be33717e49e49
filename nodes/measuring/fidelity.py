"""How far one picture is from another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SSIM_WINDOW = 11
"""Side of the Gaussian window, in pixels, as in the paper."""


@dataclass(frozen=True)
class Fidelity:
    """A variant's result against the baseline's.

    Attributes:
        latent_error: norm of the difference of the latents over the norm of the baseline's.
        is_identical: whether the latents have the same bits.
        ssim: mean structural similarity of the pictures, 1 for equal ones; None without pictures.
        psnr_db: peak signal-to-noise ratio of the pictures; None without pictures, or for equal ones,
            where it is infinite.
    """

    latent_error: float
    is_identical: bool
    ssim: float | None = None
    psnr_db: float | None = None


def compare(
    baseline: Tensor, variant: Tensor, baseline_images: Tensor | None = None, variant_images: Tensor | None = None
) -> Fidelity:
    """Compare latents, and pictures where there are any.

    Args:
        baseline, variant: latents of one shape.
        baseline_images, variant_images: (B, H, W, C), float, 0 to 1.

    Source: PSNR and SSIM are kornia's (Z. Wang et al., "Image Quality Assessment: From Error
    Visibility to Structural Similarity", 2004; whole windows only).
    """
    difference = torch.linalg.vector_norm(variant.float() - baseline.float())
    error = float(difference / torch.linalg.vector_norm(baseline.float()).clamp_min(torch.finfo(torch.float32).tiny))
    is_identical = torch.equal(baseline, variant)
    if baseline_images is None or variant_images is None:
        return Fidelity(error, is_identical)
    # Not at the top: it takes seconds, which a start of the host should not.
    from kornia.metrics import psnr, ssim

    first, second = (images.float().movedim(-1, 1).clamp(0, 1) for images in (baseline_images, variant_images))
    window = min(SSIM_WINDOW, first.shape[-2], first.shape[-1])
    window -= 1 - window % 2
    # One by one: the filters' buffers of a whole video would not fit.
    similar = [
        float(ssim(*pair, window, padding="valid").mean()) for pair in zip(first[:, None], second[:, None], strict=True)
    ]
    similarity = math.fsum(similar) / len(similar)
    decibel = float(psnr(second, first, 1.0))
    return Fidelity(error, is_identical, similarity, decibel if math.isfinite(decibel) else None)


def mean(found: Sequence[Fidelity]) -> Fidelity:
    """Of several pictures; the noise of PSNR is averaged, not its decibel."""
    similar = [one.ssim for one in found if one.ssim is not None]
    noise = math.fsum(10 ** (-one.psnr_db / 10) for one in found if one.psnr_db is not None)
    return Fidelity(
        math.fsum(one.latent_error for one in found) / len(found),
        all(one.is_identical for one in found),
        math.fsum(similar) / len(similar) if similar else None,
        -10 * math.log10(noise / len(similar)) if noise else None,
    )


def worst(found: Sequence[Fidelity]) -> Fidelity:
    """The worst of each figure of several pictures."""
    return Fidelity(
        max(one.latent_error for one in found),
        all(one.is_identical for one in found),
        min((one.ssim for one in found if one.ssim is not None), default=None),
        min((one.psnr_db for one in found if one.psnr_db is not None), default=None),
    )


def amplified_difference(baseline_images: Tensor, variant_images: Tensor, factor: float = 8.0) -> Tensor:
    """The absolute difference of two (B, H, W, C) pictures, 0 to 1, made visible."""
    return ((variant_images - baseline_images).abs() * factor).clamp(0, 1)
