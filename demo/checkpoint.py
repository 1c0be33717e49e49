"""SD 1.5 checkpoints: one with random weights that ComfyUI loads as any other, and what tells one from its header."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

SD15: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "context_dim": 768,
    "num_heads": 8,
    "legacy": False,
    "use_spatial_transformer": True,
    "channel_mult": [1, 2, 4, 4],
    "num_res_blocks": [2, 2, 2, 2],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}

CLIP_L = {
    "num_hidden_layers": 12,
    "hidden_size": 768,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
}
"""Whole, because the host fills what a checkpoint lacks with uninitialised memory."""


def random_weights(shapes: dict[str, torch.Size], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Weights that keep a signal's variance through a layer: normal, divided by the square root of the fan-in."""
    weights = {}
    for name, shape in shapes.items():
        if len(shape) > 1:
            weight = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
        else:
            weight = torch.ones(shape) if name.endswith("weight") else torch.zeros(shape)
        weights[name] = weight.half()
    return weights


def make_random_sd15(path: Path) -> None:
    """Write a checkpoint. ComfyUI must be importable, and set to the CPU where that is all there is."""
    from comfy.clip_model import CLIPTextModel
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
    from comfy.ops import disable_weight_init
    from comfy.taesd.taesd import TAESD

    with torch.device("meta"):  # shapes only
        modules = {
            "model.diffusion_model.": UNetModel(**SD15, operations=disable_weight_init),
            "cond_stage_model.transformer.": CLIPTextModel(CLIP_L, torch.float16, "meta", disable_weight_init),
            "first_stage_model.": TAESD(),
        }
    shapes = {
        prefix + name: value.shape for prefix, module in modules.items() for name, value in module.state_dict().items()
    }
    weights = random_weights(shapes, torch.Generator().manual_seed(0))
    weights["first_stage_model.vae_scale"] = torch.tensor(1.0)
    weights["first_stage_model.vae_shift"] = torch.tensor(0.0)
    save_file(weights, path)


def is_sd15(path: Path) -> bool:
    """Whether a safetensors file is an SD 1.5 text-to-image checkpoint, from its header alone."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
    except (OSError, ValueError, struct.error):
        return False
    unet = {name: value["shape"] for name, value in header.items() if name.startswith("model.diffusion_model.")}
    first = unet.get("model.diffusion_model.input_blocks.0.0.weight")
    context = next((shape[-1] for name, shape in unet.items() if name.endswith("attn2.to_k.weight")), 0)
    return bool(first == [320, 4, 3, 3] and context == 768)
