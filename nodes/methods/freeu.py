"""FreeU: rebalances backbone and skip features in the UNet's decoder, at no cost.

The backbone features of the two deepest widths are amplified by b, the low frequencies of the
skips that join them are scaled by s. Version 1 scales the first half of the channels by a
constant; version 2 by a map that follows the features' mean.

Source: "FreeU: Free Lunch in Diffusion U-Net" (Si et al., 2023, arXiv:2309.11497). Over the full
range the result has the bits of ComfyUI's own FreeU and FreeU_V2 at the same values.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from .method import (
    Configuration,
    Evaluation,
    MethodRun,
    Model,
    Run,
    State,
    check_choice,
    check_number,
    check_range,
    check_unet,
)

VERSIONS = ("v1", "v2")

PRESETS: dict[str, tuple[float, float, float, float]] = {
    "SD 1.4": (1.3, 1.4, 0.9, 0.2),
    "SD 1.5": (1.5, 1.6, 0.9, 0.2),
    "SD 2.1": (1.4, 1.6, 0.9, 0.2),
    "SDXL": (1.3, 1.4, 0.9, 0.2),
}
"""(b1, b2, s1, s2) that the authors' repository recommends for each model."""

AUTO = {"SD1": "SD 1.5", "SD2": "SD 2.1", "SDXL": "SDXL", "SDXL refiner": "SDXL"}
"""The preset for each model family; SD 1.4 and SD 1.5 are one architecture."""


@dataclass(frozen=True)
class FreeU(Configuration):
    """Attributes:
    b1: backbone factor at 4 x model_channels channels, 0 to 10; 1 changes nothing.
    b2: backbone factor at 2 x model_channels channels.
    s1: skip factor where b1 acts, 0 to 10; 1 changes nothing.
    s2: skip factor where b2 acts.
    version: ``v1`` or ``v2``.
    start_percent: fraction of the training timesteps at which it begins, 0.0 the noisiest.
    end_percent: fraction at which it ends.
    """

    b1: float
    b2: float
    s1: float
    s2: float
    version: str = "v2"
    start_percent: float = 0.0
    end_percent: float = 1.0

    stem = "freeu"
    title = "FreeU"
    phase = "evaluate"
    is_exact = False

    def __post_init__(self) -> None:
        for name in ("b1", "b2", "s1", "s2"):
            check_number(self.title, name, getattr(self, name), 0.0, 10.0)
        check_choice(self.title, "version", self.version, VERSIONS)
        check_range(self.title, self.start_percent, self.end_percent)

    def off(self) -> str | None:
        if (self.b1, self.b2, self.s1, self.s2) == (1.0, 1.0, 1.0, 1.0):
            return "b1, b2, s1 and s2 are all 1"
        if self.start_percent == self.end_percent:
            return "start_percent equals end_percent"
        return None

    def check(self, model: Model) -> None:
        check_unet(self.title, model, "There is nothing that takes its place; remove or bypass it.")

    def begin(self, run: Run) -> FreeURun:
        return FreeURun(self, run)


def preset_values(name: str, model: Model) -> tuple[float, float, float, float]:
    """(b1, b2, s1, s2) of a preset; ``auto`` picks the one of the model's family.

    Raises:
        RuntimeError: ``auto`` on a model that is no Stable Diffusion UNet, or none we know.
        ValueError: no such preset.
    """
    if name == "auto":
        check_unet(FreeU.title, model, "There is nothing that takes its place; remove or bypass it.")
        if model.family is None:
            raise RuntimeError(
                f"{FreeU.title}: preset auto knows {', '.join(AUTO)}, but the model is {model.name}. "
                "Choose a preset yourself, or custom."
            )
        name = AUTO[model.family]
    check_choice(FreeU.title, "preset", name, tuple(PRESETS))
    return PRESETS[name]


def scale_backbone(h: Tensor, b: float, version: str) -> Tensor:
    """Amplify the first half of the channels.

    Args:
        h: (B, C, H, W) features; not written to.
        b: factor.
        version: ``v1``: by b; ``v2``: by 1 to b, following the mean over channels, which is
            normalized to 0 to 1 within each image.
    """
    half = h.shape[1] // 2
    if version == "v1":
        return torch.cat([h[:, :half] * b, h[:, half:]], dim=1)
    mean = h.mean(1, keepdim=True)
    flat = mean.flatten(1)
    high, low = flat.amax(-1)[:, None, None, None], flat.amin(-1)[:, None, None, None]
    span = high - low
    # Where all means are equal (a single pixel, in the middle of a 64x64 image) there is no map to follow.
    mean = (mean - low) / torch.where(span > 0, span, 1)
    return torch.cat([h[:, :half] * ((b - 1) * mean + 1), h[:, half:]], dim=1)


def scale_low_frequencies(skip: Tensor, s: float) -> Tensor:
    """Scale the four lowest spatial frequencies, as the paper's Fourier mask of radius 1 does.

    Args:
        skip: (B, C, H, W) features; not written to.
        s: factor.
    """
    frequencies = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    row, column = skip.shape[-2] // 2, skip.shape[-1] // 2
    mask = torch.ones(skip.shape[-2:], device=skip.device)
    mask[row - 1 : row + 1, column - 1 : column + 1] = s
    filtered: Tensor = torch.fft.ifftn(torch.fft.ifftshift(frequencies * mask, dim=(-2, -1)), dim=(-2, -1))
    return filtered.real.to(skip.dtype)


def has_fft(device: torch.device) -> bool:
    """Whether a device can do it; DirectML and some others cannot. Tried on next to nothing, so that
    what fails later, such as memory, is not mistaken for it."""
    try:
        scale_low_frequencies(torch.ones(1, 1, 2, 2, device=device), 1.0)
    except (RuntimeError, NotImplementedError):
        return False
    return True


class FreeURun(MethodRun):
    """Acts before each output block whose width it knows, within the range."""

    def __init__(self, config: FreeU, run: Run):
        channels = run.model.channels or 0
        self.config = config
        self.in_range = run.sigma_range(config.start_percent, config.end_percent)
        self.factors = {4 * channels: (config.b1, config.s1), 2 * channels: (config.b2, config.s2)}
        self.evaluations = 0
        self.last: Evaluation | None = None
        self.blocks = 0
        self.passed = 0
        self.has_fft: bool | None = None
        # The host samples on several GPUs in threads; counts are shared between them.
        self.lock = threading.Lock()

    def output_block(self, evaluation: Evaluation, h: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        factors = self.factors.get(h.shape[1])
        if factors is None or not self.in_range(evaluation.sigma):
            with self.lock:
                self.passed += 1
            return h, skip
        b, s = factors
        with self.lock:
            self.blocks += 1
            self.evaluations += evaluation is not self.last
            self.last = evaluation
        return scale_backbone(h, b, self.config.version), self._filtered(skip, s)

    def _filtered(self, skip: Tensor, s: float) -> Tensor:
        if self.has_fft is None:
            self.has_fft = has_fft(skip.device)
        if self.has_fft:
            return scale_low_frequencies(skip, s)
        return scale_low_frequencies(skip.cpu(), s).to(skip.device)

    def verdict(self) -> tuple[State, str]:
        c = self.config
        values = f"{c.version} with b1 {c.b1:g}, b2 {c.b2:g}, s1 {c.s1:g}, s2 {c.s2:g}"
        if not self.blocks:
            return "inert", f"changed nothing: {self._why_inert()}"
        text = f"{values}, on {self.blocks} block outputs in {self.evaluations} evaluations"
        if self.has_fft is False:
            text += "; this device has no FFT, so the CPU filtered the skips, which is slow"
        return "active", text

    def _why_inert(self) -> str:
        if not self.passed:
            return "no output block ran"
        c = self.config
        widths = " or ".join(str(width) for width in sorted(self.factors))
        return (
            f"no output block with {widths} channels ran between start_percent {c.start_percent:g} "
            f"and end_percent {c.end_percent:g}"
        )
