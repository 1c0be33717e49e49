"""The demo model's pictures, many at a time, by the host's own sampler and through the pack's own nodes.

Needs the host and the pack: `tests/loading.py` loads both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import hosted
import torch
from scenes import caption, draw
from torch import Tensor

CFG = 5.0
SAMPLER = "dpmpp_2m"
BATCH = 8


class Demo:
    """The three parts of the model, as `SlipstreamDemoModel` returns them."""

    def __init__(self, architecture: str = "UNet") -> None:
        self.architecture = architecture
        self.model, self.clip, self.vae = hosted.execute("SlipstreamDemoModel", architecture=architecture).result

    def sample(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        model: Any = None,
        steps: int = 30,
        cfg: float = CFG,
        sampler: str = SAMPLER,
        scheduler: str | None = None,
    ) -> Tensor:
        """One latent for each prompt and seed: (B, 4, 32, 32). A seed's noise is the same in any batch."""
        found = []
        for first in range(0, len(prompts), BATCH):
            some = slice(first, first + BATCH)
            noise = [torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds[some]]
            found.append(
                hosted.sample(
                    self.model if model is None else model,
                    self.conditioning(prompts[some]),
                    self.conditioning([""] * len(noise)),
                    steps=steps,
                    cfg=cfg,
                    sampler=sampler,
                    scheduler=scheduler or self.scheduler(sampler),
                    image=torch.zeros(len(noise), 4, 32, 32),
                    noise=torch.cat(noise),
                )
            )
        return torch.cat(found)

    def scheduler(self, sampler: str = SAMPLER) -> str:
        """What most would choose with it."""
        if self.architecture == "transformer":
            return "simple"
        return "karras" if sampler == "dpmpp_2m" else "normal"

    @property
    def digest(self) -> str:
        """Of the network's weights: SHA-256 of their file."""
        files = hosted.engine("demo_model")
        file = files.FILE if self.architecture == "UNet" else files.TRANSFORMER_FILE
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def conditioning(self, prompts: Sequence[str]) -> list[Any]:
        """A batch of prompts as one CONDITIONING."""
        encoded = [self.clip.encode(prompt) for prompt in prompts]
        return [[torch.cat(encoded), {}]]

    def decode(self, latents: Tensor) -> Tensor:
        """(B, H, W, 3) in 0..1."""
        with torch.inference_mode():
            return torch.cat([self.vae.decode(some) for some in latents.split(BATCH)])


def held_out(count: int, seed: int = 5_000_000) -> tuple[list[str], Tensor]:
    """Captions of combinations that training never saw, all different ones, and their choices (count, attributes)."""
    choices = torch.unique(draw(range(seed, seed + 4 * count), held_out=True).choices, dim=0)
    choices = choices[torch.randperm(len(choices), generator=torch.Generator().manual_seed(seed))][:count]
    if len(choices) < count:
        raise ValueError(f"count should be at most {len(choices)}, the combinations that {4 * count} seeds gave")
    return [caption(chosen) for chosen in choices.tolist()], choices
