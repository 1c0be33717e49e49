"""The demo model's transformer, trained on the latents of our pictures and the words that the UNet learned.

ComfyUI's own AuraFlow transformer in small: flow matching (Lipman et al. 2023, https://arxiv.org/abs/2210.02747) along
straight lines from picture to noise, with AuraFlow's shift, so that most training goes where most of sampling goes.
Most of it sees latents of half the size, at a quarter of the cost: where things stand is learned there, and how they
look afterwards; at last, by rates that only fall, how the latents' edges are. Matrices are trained by
Muon (https://kellerjordan.github.io/posts/muon/), the rest by AdamW.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import comfy.ops
import numpy
import torch
import vocabulary
from averaging import follow
from comfy.ldm.aura.mmdit import MMDiT
from comfy.model_sampling import time_snr_shift
from mixed import mixed
from progress import Progress
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, avg_pool2d

CONFIG: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 4,
    "patch_size": 2,
    "dim": 192,
    "n_layers": 10,
    "n_double_layers": 2,
    "n_heads": 6,
    "global_conddim": 192,
    "cond_seq_dim": vocabulary.WIDTH,
    "max_seq": 16 * 16,
}
SHIFT = 1.73
"""AuraFlow's, as the host samples it."""
SMALL = 0.7
"""The share of the steps that see latents of half the size."""
BATCH = 32
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 5e-3, 3e-3, 1e-2
WARM_UP, COOL_DOWN, GOING_ON = 0.03, 0.5, 0.5
EMA = 0.997
DEVIATION = 0.02
"""Of the weights at first."""
FLIPPED = 0.5
"""How often a latent is mirrored: no word says where in it a thing is. Its edges are then another picture's, since the
VAE's are no mirror images of each other: what goes on is trained without."""


class Transformer(MMDiT):
    """The host's, which also reads a picture at half its size: a token is then where four were."""

    def __init__(self) -> None:
        super().__init__(**CONFIG, operations=comfy.ops.disable_weight_init, dtype=torch.float32)

    def apply_pos_embeds(self, x: Tensor, h: int, w: int) -> Tensor:
        """(B, h / 2 * w / 2, dim) tokens with their places; the host would take those in the picture's middle."""
        places = self.positional_encoding.view(self.h_max, self.w_max, -1).movedim(-1, 0)
        return x + adaptive_avg_pool2d(places, (h // self.patch_size, w // self.patch_size)).flatten(1).mT

    def initialize(self, seed: int) -> None:
        """The host's layers leave initialization out, since theirs are loaded. The whole begins as zero."""
        torch.manual_seed(seed)
        for name, layer in self.named_modules():
            if isinstance(layer, nn.Linear):
                is_modulation = name.endswith(("modC.1", "modX.1", "modCX.1", "modF.1"))
                nn.init.normal_(layer.weight, std=DEVIATION if is_modulation else layer.in_features**-0.5)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.final_linear.weight)
        nn.init.normal_(self.positional_encoding, std=DEVIATION)
        nn.init.normal_(self.register_tokens, std=DEVIATION)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Muon for the matrices within blocks, AdamW for what reads, writes or places."""
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, value in self.named_parameters():
            (matrices if value.ndim == 2 and "_layers." in name else rest).append(value)
        return [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
        ]


def train(
    latents: Tensor,
    choices: Tensor,
    words: Tensor,
    steps: int,
    device: torch.device,
    seed: int = 0,
    learned: Mapping[str, Tensor] | None = None,
) -> Transformer:
    """Train the transformer, or go on with one.

    Args:
        latents: (N, 4, 32, 32), of zero mean and unit variance, more or less.
        choices: (N, attributes), their scenes'.
        words: (words, WIDTH), the embedding that the UNet was trained with; it stays.
        steps: Batches of BATCH latents, the first of half their size unless one goes on.
        device: Where to train.
        seed: Of the weights, the noise and the order.
        learned: The weights to go on with, at rates that only fall.

    Returns:
        The exponential moving average of the model, in float32 on `device`.
    """
    model = Transformer()
    model.initialize(seed)
    if learned is not None:
        model.load_state_dict(learned)
    model.to(device)
    averaged = copy.deepcopy(model).requires_grad_(False)
    words = words.to(device, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    random = numpy.random.default_rng(seed)
    small = avg_pool2d(latents.float(), 2)
    small = small / small.std()
    optimizers = model.optimizers()
    at = rate(steps) if learned is None else falling(steps)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, at) for optimizer in optimizers]
    progress = Progress("transformer" if learned is None else "transformer, finished", steps, lines=60)
    first_full = SMALL * steps if learned is None else 0
    scenes = choices.tolist()
    for step in range(steps):
        picked = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = (small if step < first_full else latents)[picked].float()
        is_flipped = torch.rand(BATCH, 1, 1, 1, generator=generator) < (FLIPPED if learned is None else 0)
        clean = torch.where(is_flipped, clean.flip(-1), clean).to(device)
        # One time from each part of the schedule: the same mean with less scatter.
        time = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
        time = time_snr_shift(SHIFT, time).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        noisy = torch.lerp(clean, noise, time.view(-1, 1, 1, 1))
        said = vocabulary.batch([vocabulary.shortened(scenes[index], random) for index in picked.tolist()], device)
        with mixed(device):
            predicted = model(noisy, time, words[said])
        loss = (predicted.float() - (noise - clean)).square().mean()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        follow(averaged, model, step, EMA)
        with torch.no_grad():
            progress(step, loss=loss)
    return averaged


def rate(steps: int) -> Callable[[int], float]:
    """A schedule: a short warm-up, then even, then down to nothing."""

    def at(step: int) -> float:
        return min(1.0, (step + 1) / (WARM_UP * steps), (steps - step) / (COOL_DOWN * steps))

    return at


def falling(steps: int) -> Callable[[int], float]:
    """Rates for one that goes on: from a share of the even ones down to nothing."""
    return lambda step: GOING_ON * min(1.0, (step + 1) / (WARM_UP * steps)) * (steps - step) / steps
