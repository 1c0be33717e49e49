"""Reads a picture's attributes back from its pixels: how we know that a picture shows what its caption says.

A small convolutional network, trained on the generator's own pictures alone: it never sees the diffusion model's.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import torch
from progress import Progress
from safetensors.torch import load_file
from scenes import ATTRIBUTES, draw_on
from torch import Tensor, nn
from torch.nn import functional

SIZE = 64
"""It looks at pictures of this many pixels a side."""
BATCH = 32
FRESH = 4
"""New pictures in each step; the others of a batch were seen before."""
LEARNING_RATE = 3e-3


class Judge(nn.Module):
    """(B, 3, H, W) pictures in 0..1 to logits of every attribute."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 4 * width)
        self.features = nn.Sequential()
        for before, after in itertools.pairwise(widths):
            self.features += nn.Sequential(
                nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)
            )
        # Where something stands matters as much as what it is: nothing is averaged over the picture.
        self.heads = nn.Linear(widths[-1] * (SIZE // 16) ** 2, sum(map(len, ATTRIBUTES.values())))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        small = functional.interpolate(pictures, (SIZE, SIZE), mode="bilinear", antialias=True)
        logits = self.heads(self.features(small - 0.5).flatten(1))
        return logits.split([len(options) for options in ATTRIBUTES.values()], dim=1)

    @classmethod
    def load(cls, file: Path) -> Judge:
        """A trained one."""
        judge = cls()
        judge.load_state_dict(load_file(file))
        return judge.eval()

    @torch.no_grad()
    def read(self, pictures: Tensor) -> Tensor:
        """The choices it sees: (B, attributes) int64."""
        return torch.stack([logits.argmax(1) for logits in self(pictures)], dim=1)


def agreement(seen: Tensor, said: Tensor) -> tuple[float, float]:
    """How far what is seen agrees with what was said: the share of attributes, and of pictures that have all right."""
    right = seen == said
    return right.float().mean().item(), right.all(1).float().mean().item()


def train(steps: int, device: torch.device, seed: int = 0) -> Judge:
    """Train a judge.

    Args:
        steps: Batches of BATCH pictures, FRESH of them new.
        device: Where to train.
        seed: Of the weights and the pictures.
    """
    torch.manual_seed(seed)
    judge = Judge().to(device)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    progress = Progress("judge", steps, lines=10)
    pictures = torch.empty(steps * FRESH, 3, SIZE, SIZE, device=device)
    choices = torch.empty(steps * FRESH, len(ATTRIBUTES), dtype=torch.long, device=device)
    for step in range(steps):
        seen = slice(step * FRESH, (step + 1) * FRESH)
        scenes, drawn = draw_on(device, range(seed + seen.start, seed + seen.stop))
        pictures[seen] = functional.interpolate(drawn, (SIZE, SIZE), mode="bilinear", antialias=True)
        choices[seen] = scenes.choices
        picked = torch.randint(seen.stop, (BATCH,), generator=generator).to(device)
        # What a decoder leaves a little wrong must not matter: noise, and a little more or less light.
        light = 1 + 0.1 * (torch.rand(BATCH, 1, 1, 1, generator=generator).to(device) - 0.5)
        noise = 0.02 * torch.randn(BATCH, 3, SIZE, SIZE, generator=generator).to(device)
        logits = judge(pictures[picked] * light + noise)
        loss = torch.stack(
            [functional.cross_entropy(one, said) for one, said in zip(logits, choices[picked].T, strict=True)]
        ).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        progress(step, loss=loss)
    return judge.eval().requires_grad_(False)
