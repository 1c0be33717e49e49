"""Refiner Handoff: which steps of a run are the base's, and which the refiner's.

Source: D. Podell et al.: *SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis*,
arXiv:2307.01952. Fractions mean what they do in diffusers: ``denoising_end`` and ``denoising_start`` for the
ensemble, ``strength`` for image to image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from .method import check_choice, check_number

SPLITS = ("timesteps", "steps")
TITLE = "Refiner Handoff"


@dataclass(frozen=True)
class Ensemble:
    """The refiner goes on where the base stops, in one run.

    Attributes:
        handoff: the base's fraction of the run.
        split: what it is a fraction of: training timesteps, whatever the schedule, or the run's steps.
        exact_handoff: by timesteps: hand over exactly there, with one more step if none ends near it.
    """

    handoff: float = 0.8
    split: str = SPLITS[0]
    exact_handoff: bool = False

    TOLERANCE: ClassVar[float] = 1e-6
    """Relative: noise levels of one timestep that were computed in different ways are the same."""

    NEAR: ClassVar[float] = 0.005
    """Relative, about a training timestep: a step between noise levels this near is worth no evaluation."""

    def __post_init__(self) -> None:
        check_number(TITLE, "handoff", self.handoff, 0.0, 1.0)
        check_choice(TITLE, "split", self.split, SPLITS)

    def cutoff(self, timesteps: int) -> int:
        """The last training timestep that is the base's: it keeps the steps that begin there or above.

        Args:
            timesteps: how many the model was trained with: 1000.
        """
        return round(timesteps - self.handoff * timesteps)

    def legs(self, sigmas: Tensor, boundary: float) -> tuple[Tensor, Tensor]:
        """The noise levels of both: the refiner's begin where the base's end. One without a step has a single one.

        Args:
            sigmas: (steps + 1,) those of the whole run, falling.
            boundary: that of the cutoff's timestep. Not used if the split is by steps.
        """
        steps = max(len(sigmas) - 1, 0)
        if self.split == "steps":
            k = round(self.handoff * steps)
            return sigmas[: k + 1].clone(), sigmas[k:].clone()
        k = int((sigmas[:-1] >= boundary * (1 - self.TOLERANCE)).int().cumprod(0).sum())
        if self.exact_handoff and k > 0 and boundary > 0:
            near = [i for i in (k - 1, k) if abs(float(sigmas[i]) - boundary) <= boundary * self.NEAR]
            if not near:
                there = sigmas.new_tensor([boundary])
                return torch.cat([sigmas[:k], there]), torch.cat([there, sigmas[k:]])
            k = min(near, key=lambda i: abs(float(sigmas[i]) - boundary))
        return sigmas[: k + 1].clone(), sigmas[k:].clone()


@dataclass(frozen=True)
class ImageToImage:
    """The base makes the whole image, and the refiner noises it again and redoes the last part.

    Attributes:
        refiner_denoise: the refiner's fraction of the steps.
    """

    refiner_denoise: float = 0.3

    def __post_init__(self) -> None:
        check_number(TITLE, "refiner_denoise", self.refiner_denoise, 0.0, 1.0)

    def refining(self, sigmas: Tensor) -> Tensor:
        """The refiner's noise levels, a single one if there is no step for it.

        Args:
            sigmas: (steps + 1,) those of a whole run of the refiner.
        """
        steps = max(len(sigmas) - 1, 0)
        return sigmas[steps - int(steps * self.refiner_denoise) :].clone()
