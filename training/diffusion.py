"""The demo model's UNet and word embedding, trained on the latents of our pictures.

ComfyUI's own UNet in the shape of SD 1.x: noise prediction on its schedule of 1000 steps. The loss is weighted by
min-SNR-5 (Hang et al. 2023, https://arxiv.org/abs/2303.09556). Offset noise
(https://www.crosslabs.org/blog/diffusion-with-offset-noise) lets the picture's brightness follow the caption, where
the schedule, which never quite reaches pure noise, would let it follow what shines through.
"""

from __future__ import annotations

import copy
from typing import Any

import comfy.ops
import numpy
import torch
import vocabulary
from averaging import follow
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, UNetModel
from comfy.taesd.taesd import TAESD
from mixed import mixed
from progress import Progress
from scenes import draw_on
from torch import Tensor, nn

CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    # Widths of 1, 2 and 4 times this, as in SD 1.x: FreeU acts on those of 2 and 4.
    "model_channels": 32,
    "channel_mult": [1, 2, 4],
    "num_res_blocks": [2, 2, 1],
    # Most parameters read the context, so that text comes in at five places and not at nine.
    "transformer_depth": [0, 0, 0, 1, 0],
    "transformer_depth_output": [0, 0, 0, 0, 1, 1, 0, 1],
    "transformer_depth_middle": 1,
    "num_heads": -1,
    "num_head_channels": 32,
    "use_linear_in_transformer": False,
    "context_dim": vocabulary.WIDTH,
    "adm_in_channels": None,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "legacy": False,
}
BATCH = 32
LEARNING_RATE = 1.2e-3
WARM_UP = 0.04
EMA = 0.999
OFFSET_NOISE = 0.1
SNR_LIMIT = 5.0
TIMESTEPS = 1000
LAYERS: tuple[Any, ...] = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)


def alphas_cumprod() -> Tensor:
    """(1000,) float64, Stable Diffusion's schedule."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, TIMESTEPS, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0)


class Denoiser(nn.Module):
    """The UNet with its word embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = UNetModel(**CONFIG, operations=comfy.ops.disable_weight_init, dtype=torch.float32)
        self.words = nn.Embedding(len(vocabulary.WORDS), vocabulary.WIDTH)

    def forward(self, noisy: Tensor, timestep: Tensor, tokens: Tensor) -> Tensor:
        """The noise in (B, 4, H, W) latents at timesteps (B,), for tokens (B, LENGTH)."""
        return self.unet(noisy, timestep, self.words(tokens))

    def initialize(self, seed: int) -> None:
        """PyTorch's own initialization, which the host's layers leave out since theirs are loaded; but each residual
        branch begins close to zero, so that the first steps don't have to undo it."""
        torch.manual_seed(seed)
        for module in self.modules():
            for layer in LAYERS:
                if isinstance(module, layer):
                    layer.reset_parameters(module)
        for module in self.unet.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.out_layers[-1].weight)
            if isinstance(module, SpatialTransformer):
                nn.init.zeros_(module.proj_out.weight)
        nn.init.zeros_(self.unet.out[-1].weight)


def encode(autoencoder: TAESD, count: int, device: torch.device, seed: int, batch: int = 4) -> tuple[Tensor, Tensor]:
    """Draw pictures and encode them.

    Returns:
        Latents (count, 4, 32, 32) float16, and the scenes' choices (count, attributes).
    """
    latents, choices = [], []
    progress = Progress("latents", -(-count // batch), lines=10)
    for first in range(seed, seed + count, batch):
        scenes, pictures = draw_on(device, range(first, min(first + batch, seed + count)))
        with torch.inference_mode(), mixed(device):
            latents.append(autoencoder.taesd_encoder(pictures.to(memory_format=torch.channels_last)).half())
        choices.append(scenes.choices)
        progress((first - seed) // batch)
    return torch.cat(latents).contiguous(), torch.cat(choices)


def train(
    latents: Tensor,
    choices: Tensor,
    steps: int,
    device: torch.device,
    seed: int = 0,
) -> Denoiser:
    """Train the UNet and the embedding together.

    Args:
        latents: (N, 4, 32, 32), of zero mean and unit variance, more or less.
        choices: (N, attributes), their scenes'.
        steps: Batches of BATCH latents.
        device: Where to train.
        seed: Of the weights, the noise and the order.

    Returns:
        The exponential moving average of the model, in float32 on `device`.
    """
    model = Denoiser()
    model.initialize(seed)
    model.to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    random = numpy.random.default_rng(seed)
    cumulative = alphas_cumprod()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.95, 0.99), weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=WARM_UP)
    progress = Progress("denoiser", steps, lines=60)
    scenes = choices.tolist()
    for step in range(steps):
        picked = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = latents[picked].float()
        # One timestep from each part of the schedule: the same mean with less scatter.
        timestep = ((torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) * (TIMESTEPS / BATCH)).long()
        # Rounding can reach the end.
        timestep.clamp_(max=TIMESTEPS - 1)
        noise = torch.randn(clean.shape, generator=generator)
        noise += OFFSET_NOISE * torch.randn(BATCH, clean.shape[1], 1, 1, generator=generator)
        alpha = cumulative[timestep]
        signal_to_noise = alpha / (1 - alpha)
        weight = (signal_to_noise.clamp(max=SNR_LIMIT) / signal_to_noise).float().to(device)
        alpha = alpha.float().view(-1, 1, 1, 1).to(device)
        noise = noise.to(device)
        noisy = alpha.sqrt() * clean.to(device) + (1 - alpha).sqrt() * noise
        said = vocabulary.batch([vocabulary.shortened(scenes[index], random) for index in picked.tolist()], device)
        with mixed(device):
            predicted = model(noisy, timestep.to(device), said)
        error = (predicted.float() - noise).square().mean((1, 2, 3))
        loss = (weight * error).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        follow(averaged, model, step, EMA)
        with torch.no_grad():
            progress(step, loss=loss, error=error.mean())
    return averaged
