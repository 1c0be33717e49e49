"""The demo model's autoencoder: TAESD's architecture, trained on our pictures.

TAESD: https://github.com/madebyollin/taesd (the architecture; the weights and the training are ours). The latents are
held near zero mean and unit variance, and the decoder sees them with some noise, so that what the diffusion model
leaves a little wrong is decoded all the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from comfy.taesd.taesd import TAESD, Block
from mixed import mixed
from progress import Progress
from scenes import draw_on
from torch import Tensor, nn
from torch.nn import functional

CROP = 64
BATCH = 8
LATENT_WEIGHT = 0.02
POOL = 48
NEW_PICTURE_EVERY = 2
"""Steps between two new pictures: drawing one costs a tenth of a step."""


def crops(device: torch.device, seed: int) -> Iterator[Tensor]:
    """Batches of (BATCH, 3, CROP, CROP) in 0..1, cut from a pool of pictures that is renewed all the time."""
    generator = torch.Generator().manual_seed(seed)
    pool = draw_on(device, range(seed, seed + POOL))[1]
    for step in itertools.count():
        if step % NEW_PICTURE_EVERY == 0:
            number = step // NEW_PICTURE_EVERY
            pool[number % POOL] = draw_on(device, [seed + POOL + number])[1][0]
        picture = torch.randint(POOL, (BATCH,), generator=generator).tolist()
        top, left = torch.randint(pool.shape[-1] - CROP + 1, (2, BATCH), generator=generator).tolist()
        corners = zip(picture, top, left, strict=True)
        yield torch.stack([pool[index, :, y : y + CROP, x : x + CROP] for index, y, x in corners])


@dataclass(frozen=True)
class Phase:
    """One rise and fall of the learning rate.

    Attributes:
        share: Of all steps.
        latent_noise: Standard deviation of the noise that the decoder must bear.
        edges: Weight of the error of neighbouring pixels' differences, which mean errors leave blurred.
    """

    share: float
    learning_rate: float
    latent_noise: float
    edges: float


PHASES = (Phase(4 / 7, 1.5e-3, 0.08, 0.0), Phase(3 / 7, 1.2e-3, 0.05, 1.0))
"""First colours and shapes, then what is fine."""


def _error(difference: Tensor) -> Tensor:
    return functional.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.02)


def train(steps: int, device: torch.device, seed: int = 0) -> TAESD:
    """Train the autoencoder.

    Args:
        steps: Batches of BATCH crops, in all phases.
        device: Where to train.
        seed: Of the weights and of the pictures.

    Returns:
        The autoencoder, in float32 on `device`.
    """
    torch.manual_seed(seed)
    model = TAESD(latent_channels=4)
    for module in model.modules():
        # The host leaves weights as they lie in memory, to be loaded. PyTorch's own initialization lets the signal fade
        # in so many layers: ten times as many steps go by until details appear.
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        # Blocks that begin close to the identity train from the start.
        if isinstance(module, Block):
            module.conv[-1].weight.data *= 0.1
    model.to(device, memory_format=torch.channels_last)
    for number, phase in enumerate(PHASES):
        _train_phase(model, phase, max(2, round(steps * phase.share)), crops(device, seed + 100_000 * number))
    return model.requires_grad_(False)


def _train_phase(model: TAESD, phase: Phase, steps: int, batches: Iterator[Tensor]) -> None:
    encoder, decoder = model.taesd_encoder, model.taesd_decoder
    parameters = [*encoder.parameters(), *decoder.parameters()]
    rate = phase.learning_rate
    # The schedule moves the first beta from 0.95 to 0.85 and back.
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.95, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.04)
    progress = Progress("autoencoder", steps)
    for step, pictures in enumerate(itertools.islice(batches, steps)):
        pictures = pictures.to(memory_format=torch.channels_last)
        with mixed(pictures.device):
            latent = encoder(pictures)
            decoded = decoder(latent + phase.latent_noise * torch.randn_like(latent))
        latent = latent.float()
        mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
        held = mean.square().mean() + (deviation - 1).square().mean()
        error = decoded.float() - pictures
        loss = _error(error) + phase.edges * (_error(error.diff(dim=2)) + _error(error.diff(dim=3)))
        loss = loss + LATENT_WEIGHT * held
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            progress(step, loss=loss, psnr_db=-10 * error.square().mean().log10(), latent_std=deviation.mean())
