"""The LATENT that a node of ours samples, and the one it returns."""

from __future__ import annotations

from typing import Any

import comfy.sample
import torch

from .node import supported

RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""The host's own spelling."""


def as_sampled(model: Any, latent: dict[str, Any]) -> torch.Tensor:
    """The latent as the host samples it: an empty one gets the model's channels and scale."""
    fix = comfy.sample.fix_empty_latent_channels
    return fix(model, latent["samples"], **supported(fix, **{name: latent.get(name) for name in RATIOS}))


def like(latent: dict[str, Any], samples: torch.Tensor) -> dict[str, Any]:
    """A LATENT as the host's KSampler returns it: these samples, and what else came with `latent`."""
    return {**{name: value for name, value in latent.items() if name not in RATIOS}, "samples": samples}
