"""Small models in real ModelPatchers, built from the host's own classes. Needs the host, not the pack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.supported_models as families
import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.model_patcher import ModelPatcher
from comfy.taesd.taesd import TAESD
from safetensors import safe_open

TRAINED = Path(__file__).with_name("kl.safetensors")
CPU = torch.device("cpu")

UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 64,
    "use_spatial_transformer": True,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
    "legacy": False,
    "num_classes": None,
    "adm_in_channels": None,
}

XL = {
    **UNET,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 3, 3],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 3, 3, 3],
    "transformer_depth_middle": 3,
    "use_linear_in_transformer": True,
    "num_classes": "sequential",
    "adm_in_channels": 2816,
}

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "SD15": (families.SD15, UNET),
    "SD20": (families.SD20, {**UNET, "use_linear_in_transformer": True, "model_channels": 64}),
    "SDXL": (families.SDXL, {**XL, "model_channels": 64}),
    "SSD1B": (families.SSD1B, {**XL, "model_channels": 64, "transformer_depth_middle": -1}),
    "SDXLRefiner": (
        families.SDXLRefiner,
        {
            **UNET,
            "model_channels": 64,
            "transformer_depth": [0, 0, 2, 2, 2, 2, 0, 0],
            "transformer_depth_output": [0, 0, 0, 2, 2, 2, 2, 2, 2, 0, 0, 0],
            "transformer_depth_middle": 2,
            "use_linear_in_transformer": True,
            "num_classes": "sequential",
            "adm_in_channels": 2560,
        },
    ),
}

MINIMAL = {
    **UNET,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "transformer_depth": [1, 1],
    "transformer_depth_output": [1, 1, 1, 1],
}
"""What an SD 1.5 UNet needs at least to be one, where each block costs time: compiling."""

TINIEST = {
    **UNET,
    "num_res_blocks": [1],
    "channel_mult": [1],
    "transformer_depth": [1],
    "transformer_depth_output": [1, 1],
}
"""One level, for real compilers."""

TWO_LEVELS = {"num_res_blocks": [1, 1], "channel_mult": [1, 2], "transformer_depth": [0, 1]}
BASE = {
    **CONFIGS["SDXL"][1],
    **TWO_LEVELS,
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
    "context_dim": 768 + 64,
}
REFINER = {
    **CONFIGS["SDXLRefiner"][1],
    **TWO_LEVELS,
    "transformer_depth_output": [0, 0, 1, 1],
    "transformer_depth_middle": 1,
}
"""SDXL's base and its refiner, as small as they can be; the base's prompts are the refiner's behind CLIP-L's."""

DIT = (
    families.AuraFlow,
    {"max_seq": 64, "cond_seq_dim": 64, "n_double_layers": 1, "n_layers": 3, "in_channels": 4, "dim": 64, "n_heads": 4},
)


def initialize(module: torch.nn.Module, seed: int) -> None:
    """Weights that keep activations near 1. The host leaves them uninitialized, to be loaded."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                fan_in = parameter[0].numel()
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
            else:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1 and "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)


def build(config: Any, seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = CPU) -> ModelPatcher:
    config.set_inference_dtype(dtype, None)
    model = config.get_model({}, "", device=CPU)
    initialize(model.diffusion_model, seed)
    return ModelPatcher(model, load_device=device, offload_device=CPU)


def model(
    name: str = "SD15", seed: int = 0, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> ModelPatcher:
    """A small model of a family, or ``DiT``, ``minimal``, ``tiniest``, ``base`` or ``refiner``."""
    others = {
        "DiT": DIT,
        "minimal": (families.SD15, MINIMAL),
        "tiniest": (families.SD15, TINIEST),
        "base": (families.SDXL, BASE),
        "refiner": (families.SDXLRefiner, REFINER),
    }
    family, config = others.get(name) or CONFIGS[name]
    return build(family(dict(config)), seed, dtype, device)


KL = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [],
    "dropout": 0.0,
}


def kl_vae(**config: Any) -> comfy.sd.VAE:
    """A small KL autoencoder of Stable Diffusion's architecture, with random weights.

    Args:
        config: what of `KL` is to be otherwise.
    """
    params = {"ddconfig": {**KL, **config}, "embed_dim": 4}
    autoencoder = AutoencoderKL(**params)
    initialize(autoencoder, 1)
    return comfy.sd.VAE(sd=autoencoder.state_dict(), config={"params": params})


def full_vae() -> comfy.sd.VAE:
    """The KL autoencoder of SD 1.x and SDXL in its full size, with random weights."""
    return kl_vae(resolution=256, ch=128, ch_mult=[1, 2, 4, 4], num_res_blocks=2)


def trained_vae() -> comfy.sd.VAE:
    """A KL autoencoder of that layout, narrower, that encodes and decodes pictures: `training/train_kl.py` made it."""
    with safe_open(TRAINED, framework="pt") as file:
        weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
        params = {"ddconfig": json.loads(file.metadata()["ddconfig"]), "embed_dim": 4}
    return comfy.sd.VAE(sd=weights, config={"params": params})


def vae() -> comfy.sd.VAE:
    """A TAESD with random weights. Untrained models leave latents of any size: scaled down, they give a picture."""
    taesd = TAESD()
    initialize(taesd, 1)
    return comfy.sd.VAE(sd={**taesd.state_dict(), "vae_scale": torch.tensor(0.02), "vae_shift": torch.tensor(0.0)})
