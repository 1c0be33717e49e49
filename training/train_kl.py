"""Trains the KL autoencoder that the tests decode tiles with: `python training/train_kl.py --comfyui <folder>`.

Stable Diffusion's own layout at a quarter of the width and less: with random weights every part of a picture has the
same statistics, which flatters whatever estimates them. Half an hour on two CPU cores. It ends by writing the
weights into the tests, with what they reach in the header.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from train import load_host, save

WEIGHTS = Path(__file__).parents[1] / "tests" / "kl.safetensors"
CROPS, WHOLES = 2000, 500
"""Steps on small crops, which teach most in little time; then on whole pictures, since a group norm takes other
statistics from those."""
RATES = 1.5e-3, 7e-4
SIZES = {128: 4, 256: 2, 512: 1}
"""Of whole pictures, and how many at once."""
KL_WEIGHT = 1e-3
DDCONFIG = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
"""As of SD 1.x, where `ch` is 128 and `ch_mult` 1, 2, 4, 4."""


def initialized() -> Any:
    """The host's module, whose blocks begin close to the identity: the host leaves weights as they lie in memory."""
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.model import AttnBlock, ResnetBlock
    from torch import nn

    model = AutoencoderKL(ddconfig=DDCONFIG, embed_dim=4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, (ResnetBlock, AttnBlock)):
            last = module.conv2 if isinstance(module, ResnetBlock) else module.proj_out
            last.weight.data *= 0.1
    # Little noise on the latents at first, or nothing is learned for long.
    model.quant_conv.bias.data[4:] = -4
    return model


def wholes(device: Any, seed: int) -> Iterator[Any]:
    """Batches of whole pictures, (B, 3, size, size) in 0..1, the small ones more often."""
    import torch
    from scenes import draw, render

    generator = torch.Generator().manual_seed(seed)
    shares = torch.tensor([1.0 / size for size in SIZES])
    while True:
        size, count = list(SIZES.items())[int(torch.multinomial(shares, 1, generator=generator))]
        seeds = range(seed, seed := seed + count)
        yield render(draw(seeds), size).to(device)


def train(device: Any, seed: int = 0) -> Any:
    """Train it.

    Args:
        device: where to train.
        seed: of the weights and of the pictures.

    Returns:
        AutoencoderKL, in float32 on `device`.
    """
    import torch
    from autoencoder import crops

    torch.manual_seed(seed)
    model = initialized().to(device, memory_format=torch.channels_last)
    train_on_(model, crops(device, seed), CROPS, RATES[0])
    train_on_(model, wholes(device, seed + 1_000_000), WHOLES, RATES[1])
    return model.requires_grad_(False).eval()


def train_on_(model: Any, batches: Iterator[Any], steps: int, rate: float) -> None:
    """Train a model for as many steps, on batches of pictures in 0..1, with one rise and fall of the learning rate."""
    import torch
    from comfy.ldm.modules.distributions.distributions import DiagonalGaussianDistribution
    from mixed import mixed
    from progress import Progress
    from torch import nn
    from torch.nn import functional

    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.95, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    progress = Progress("KL autoencoder", steps)
    for step, pictures in enumerate(itertools.islice(batches, steps)):
        pixels = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
        with mixed(pixels.device):
            posterior = DiagonalGaussianDistribution(model.quant_conv(model.encoder(pixels)).float())
            decoded = model.decode(posterior.sample())
        error = (decoded.float() - pixels) / 2
        information = posterior.kl().mean() / posterior.mean[0].numel()
        loss = functional.smooth_l1_loss(error, torch.zeros_like(error), beta=0.02) + KL_WEIGHT * information
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            decibel = -10 * error.square().mean().log10()
            progress(step, loss=loss, psnr_db=decibel, kl=information, latent_std=posterior.mean.std())


def psnr_db(model: Any, device: Any, count: int = 16) -> float:
    """Of pictures that training never saw, as the host encodes and decodes them: whole, without noise."""
    import torch
    from scenes import draw_on

    errors = []
    with torch.inference_mode():
        for seed in range(7_000_000, 7_000_000 + count):
            pictures = draw_on(device, [seed], held_out=True)[1]
            decoded = model.decode(model.encode(pictures * 2 - 1)).clamp(-1, 1)
            errors.append((decoded / 2 + 0.5 - pictures).square().mean())
    return float(-10 * torch.stack(errors).mean().log10())


def keep(model: Any, device: Any, path: Path) -> None:
    weights = {name: value.half() for name, value in model.state_dict().items()}
    # What is kept is what is measured.
    model.load_state_dict(weights)
    reached = psnr_db(model, device)
    print(f"{reached:.1f} dB on pictures that it never saw")
    header = {
        "ddconfig": json.dumps(DDCONFIG),
        "psnr_db": f"{reached:.1f}",
        "license": "GPL-3.0-or-later",
        "description": "Trained on pictures drawn by the Slipstream pack's training/scenes.py alone, for its tests.",
    }
    save(weights, path, header)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    load_host(arguments.comfyui, is_cpu=device.type == "cpu")
    model = train(device)
    keep(model, device, arguments.weights)


if __name__ == "__main__":
    main()
