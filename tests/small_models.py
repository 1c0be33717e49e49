"""Small models in real ModelPatchers, built from the host's own classes. Needs the host, not the pack."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class Transformer:
    """A family of the host's transformers in small.

    Attributes:
        family: the host's class in `comfy.supported_models`.
        config: its model's settings.
        width: of the prompt's tokens.
        latent: (C, ...) of the smallest latent that is of use.
        tokens: of the prompt.
        values: beside the tokens, what its prompt carries: shapes of tensors without the batch, or values as they are.
            A guidance is one that bf16 can hold a thousandfold, as Flux embeds it.
    """

    family: Any
    config: dict[str, Any]
    width: int
    latent: tuple[int, ...]
    tokens: int = 8
    values: dict[str, Any] = field(default_factory=dict)


FLUX_LIKE = {
    "hidden_size": 64,
    "mlp_ratio": 2.0,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 2,
    "axes_dim": [8, 12, 12],
    "theta": 10000,
    "patch_size": 2,
    "qkv_bias": True,
    "context_in_dim": 64,
    "txt_ids_dims": [],
    "in_channels": 16,
    "out_channels": 16,
    "vec_in_dim": 32,
}
WAN = {
    "image_model": "wan2.1",
    "model_type": "t2v",
    "dim": 64,
    "ffn_dim": 128,
    "freq_dim": 32,
    "text_dim": 64,
    "text_len": 16,
    "in_dim": 16,
    "out_dim": 16,
    "num_heads": 2,
    "num_layers": 2,
    "patch_size": (1, 2, 2),
}
COSMOS = {
    "max_img_h": 32,
    "max_img_w": 32,
    "max_frames": 16,
    "in_channels": 16,
    "out_channels": 16,
    "patch_spatial": 2,
    "patch_temporal": 1,
    "model_channels": 64,
    "num_blocks": 2,
    "num_heads": 2,
    "crossattn_emb_channels": 64,
    "pos_emb_cls": "rope3d",
    "use_adaln_lora": True,
    "adaln_lora_dim": 16,
}
NEXT = {
    "image_model": "lumina2",
    "patch_size": 2,
    "in_channels": 16,
    "dim": 64,
    "cap_feat_dim": 64,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "qk_norm": True,
    "n_heads": 2,
    "n_kv_heads": 1,
    "multiple_of": 32,
    "axes_dims": [8, 12, 12],
    "axes_lens": [64, 64, 64],
}

FAMILIES: dict[str, Transformer] = {
    "AuraFlow": Transformer(*DIT, width=64, latent=(4, 16, 16)),
    "Chroma": Transformer(
        families.Chroma,
        {
            **FLUX_LIKE,
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "in_dim": 64,
            "out_dim": 64,
            "hidden_dim": 64,
            "n_layers": 1,
        },
        width=64,
        latent=(16, 16, 16),
    ),
    "Cosmos": Transformer(
        families.CosmosT2V,
        {
            **COSMOS,
            "image_model": "cosmos",
            "block_x_format": "THWBD",
            "affline_emb_norm": True,
            "extra_per_block_abs_pos_emb": True,
            "extra_per_block_abs_pos_emb_type": "learnable",
        },
        width=64,
        latent=(16, 2, 16, 16),
    ),
    "Cosmos Predict2": Transformer(
        families.CosmosT2IPredict2,
        {**COSMOS, "image_model": "cosmos_predict2", "pos_emb_learnable": True, "rope_enable_fps_modulation": False},
        width=64,
        latent=(16, 1, 16, 16),
    ),
    "Flux": Transformer(
        families.Flux,
        {**FLUX_LIKE, "image_model": "flux", "guidance_embed": True},
        width=64,
        latent=(16, 16, 16),
        values={"pooled_output": (32,), "guidance": 4.0},
    ),
    "Flux 2": Transformer(
        families.Flux2,
        {
            **FLUX_LIKE,
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "patch_size": 1,
            "axes_dim": [8, 8, 8, 8],
            "theta": 2000,
            "txt_ids_dims": [3],
            "vec_in_dim": None,
            "qkv_bias": False,
            "ops_bias": False,
            "global_modulation": True,
            "mlp_silu_act": True,
            "guidance_embed": True,
        },
        width=64,
        latent=(128, 8, 8),
        values={"guidance": 4.0},
    ),
    "HiDream": Transformer(
        families.HiDream,
        {
            "image_model": "hidream",
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "axes_dims_rope": [16, 8, 8],
            "caption_channels": [64, 64],
            "llama_layers": [0, 1],
            "max_resolution": [32, 32],
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "text_emb_dim": 32,
        },
        width=64,
        latent=(16, 16, 16),
        values={"pooled_output": (32,), "conditioning_llama3": (2, 8, 64)},
    ),
    "HunyuanDiT": Transformer(
        families.HunyuanDiT,
        {
            "image_model": "hydit",
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "text_states_dim": 64,
            "text_states_dim_t5": 32,
            "text_len": 8,
            "text_len_t5": 8,
        },
        width=64,
        latent=(4, 16, 16),
        values={
            "conditioning_mt5xl": (8, 32),
            "attention_mask": torch.ones(1, 8, dtype=torch.int64),
            "attention_mask_mt5xl": torch.ones(1, 8, dtype=torch.int64),
        },
    ),
    "HunyuanVideo": Transformer(
        families.HunyuanVideo,
        {
            **{key: value for key, value in FLUX_LIKE.items() if key != "txt_ids_dims"},
            "image_model": "hunyuan_video",
            "patch_size": [1, 2, 2],
            "theta": 256,
            "guidance_embed": True,
            "byt5": False,
            "meanflow": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
        width=64,
        latent=(16, 2, 16, 16),
        values={"pooled_output": (32,), "guidance": 8.0},
    ),
    "Kandinsky 5": Transformer(
        families.Kandinsky5Image,
        {
            "image_model": "kandinsky5",
            "in_visual_dim": 16,
            "out_visual_dim": 16,
            "visual_embed_dim": 64,
            "in_text_dim": 64,
            "in_text_dim2": 32,
            "time_dim": 32,
            "model_dim": 64,
            "ff_dim": 128,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (8, 12, 12),
            "rope_scale_factor": (1.0, 1.0, 1.0),
        },
        width=64,
        latent=(16, 1, 16, 16),
        values={"pooled_output": (32,)},
    ),
    "LTXV": Transformer(
        families.LTXV,
        {
            "image_model": "ltxv",
            "in_channels": 128,
            "cross_attention_dim": 64,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "caption_channels": 64,
            "num_layers": 2,
        },
        width=64,
        latent=(128, 2, 8, 8),
        values={"attention_mask": torch.ones(1, 8, dtype=torch.int64)},
    ),
    "Lumina 2": Transformer(families.Lumina2, NEXT, width=64, latent=(16, 16, 16)),
    "Mochi": Transformer(
        families.GenmoMochi,
        {
            "image_model": "mochi_preview",
            "depth": 2,
            "patch_size": 2,
            "num_heads": 2,
            "hidden_size_x": 32,
            "hidden_size_y": 32,
            # The host demands this width.
            "mlp_ratio_x": 1536 * 8 / 32,
            "mlp_ratio_y": 2.0,
            "learn_sigma": False,
            "in_channels": 12,
            "qk_norm": True,
            "qkv_bias": False,
            "out_bias": True,
            "attn_drop": 0.0,
            "posenc_preserve_area": True,
            "timestep_scale": 1000.0,
            "use_t5": True,
            "t5_feat_dim": 64,
            "t5_token_length": 8,
        },
        width=64,
        latent=(12, 2, 16, 16),
        values={"attention_mask": torch.ones(1, 8, dtype=torch.int64)},
    ),
    "OmniGen 2": Transformer(
        families.Omnigen2,
        {
            "image_model": "omnigen2",
            "patch_size": 2,
            "in_channels": 16,
            "hidden_size": 64,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 32,
            "axes_dim_rope": [8, 12, 12],
            "axes_lens": [64, 64, 64],
            "text_feat_dim": 64,
            "timestep_scale": 1000.0,
        },
        width=64,
        latent=(16, 16, 16),
        values={"attention_mask": torch.ones(1, 8, dtype=torch.int64)},
    ),
    "PixArt": Transformer(
        families.PixArtSigma,
        {
            "image_model": "pixart_sigma",
            "input_size": 40,
            "pe_interpolation": 1,
            "hidden_size": 64,
            "depth": 2,
            "num_heads": 2,
            "mlp_ratio": 2.0,
            "caption_channels": 64,
            "model_max_length": 8,
            "micro_condition": False,
        },
        width=64,
        # Its positions are for no less than 33.
        latent=(4, 40, 40),
    ),
    "Qwen-Image": Transformer(
        families.QwenImage,
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 2,
            "attention_head_dim": 32,
            "num_attention_heads": 2,
            "joint_attention_dim": 64,
            "pooled_projection_dim": 32,
            "axes_dims_rope": [8, 12, 12],
        },
        width=64,
        latent=(16, 1, 16, 16),
    ),
    "SD3": Transformer(
        families.SD3,
        {
            "input_size": None,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "depth": 2,
            "num_blocks": 2,
            "adm_in_channels": 32,
            "context_embedder_config": {
                "target": "torch.nn.Linear",
                "params": {"in_features": 64, "out_features": 128},
            },
            "context_size": 64,
            "pos_embed_max_size": 32,
            "pos_embed_scaling_factor": None,
            "num_patches": 1024,
            "qk_norm": "rms",
        },
        width=64,
        latent=(16, 16, 16),
        values={"pooled_output": (32,)},
    ),
    "Wan 2.1": Transformer(families.WAN21_T2V, WAN, width=64, latent=(16, 2, 16, 16)),
    "Wan 2.1 I2V": Transformer(
        families.WAN21_I2V,
        {**WAN, "model_type": "i2v", "in_dim": 36},
        width=64,
        latent=(16, 2, 16, 16),
    ),
    "Z-Image": Transformer(
        families.ZImage,
        {
            **NEXT,
            # Its modulation is at least that wide.
            "dim": 256,
            "n_kv_heads": 2,
            "axes_dims": [32, 48, 48],
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
        width=64,
        latent=(16, 16, 16),
    ),
}
"""The families of transformers that the host samples, each in milliseconds an evaluation."""


VARIANTS: dict[str, Transformer] = {
    "Wan 2.1 VACE": Transformer(
        families.WAN21_Vace,
        {**WAN, "model_type": "vace", "num_layers": 4, "vace_layers": 4, "vace_in_dim": 96},
        width=64,
        latent=(16, 2, 16, 16),
    ),
}
"""Whose blocks are of another making than those of their family."""


DEEPER: dict[str, dict[str, Any]] = {
    "Flux": {"depth": 2, "depth_single_blocks": 3},
    "Qwen-Image": {"num_layers": 3},
    "Wan 2.1": {"num_layers": 3},
    "LTXV": {"num_layers": 3},
    "Z-Image": {"n_layers": 3, "n_refiner_layers": 2},
    "Mochi": {"depth": 3},
    "SD3": {
        "depth": 3,
        "num_blocks": 3,
        "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 64, "out_features": 192}},
    },
}
"""Of a kind, two blocks at least: the last ones of SD 3 and Mochi are of another kind than those before."""


def described(name: str) -> Transformer:
    """A family, or a variant of one."""
    return FAMILIES[name] if name in FAMILIES else VARIANTS[name]


def transformer(
    name: str,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    more: dict[str, Any] | None = None,
) -> ModelPatcher:
    """A small model of a family or variant, random weights throughout, with more settings than its own."""
    one = described(name)
    patcher = build(one.family({**one.config, **(more or {})}), seed, dtype, device)
    module, generator = patcher.model.diffusion_model, torch.Generator().manual_seed(seed)
    # Buffers that a file would bring are as uninitialized as weights.
    for key, value in module.state_dict().items():
        if key not in dict(module.named_parameters()):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    return patcher


def deep(name: str, seed: int = 0) -> ModelPatcher:
    """A small model with blocks that repeat."""
    return transformer(name, seed, more=DEEPER.get(name))


def transformer_prompt(name: str, seed: int, batch: int = 1) -> list[Any]:
    """A CONDITIONING for a model of a family, as its own text encoders would make it."""
    one, generator = described(name), torch.Generator().manual_seed(seed)
    context = torch.randn(batch, one.tokens, one.width, generator=generator)
    values = {}
    for key, value in one.values.items():
        if isinstance(value, tuple):
            value = torch.randn(batch, *value, generator=generator)
        elif isinstance(value, torch.Tensor):
            value = value.expand(batch, *value.shape[1:]).clone()
        values[key] = value
    return [[context, values]]


def transformer_latent(name: str, batch: int = 1) -> torch.Tensor:
    """An empty latent for a model of a family: (B, C, H, W), or (B, C, T, H, W) of a video model."""
    return torch.zeros(batch, *described(name).latent)


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


HALVES = (torch.bfloat16, torch.float16)


def _image_vae(channels: int, **config: Any) -> comfy.sd.VAE:
    """A KL autoencoder of images with so many latent channels.

    Args:
        config: what of `KL` is to be otherwise beside that.
    """
    params = {"ddconfig": {**KL, "z_channels": channels, **config}, "embed_dim": channels}
    autoencoder = AutoencoderKL(**params)
    initialize(autoencoder, 1)
    made = comfy.sd.VAE(sd=autoencoder.state_dict(), config={"params": params})
    made.latent_channels = channels
    return made


def _packed_vae() -> comfy.sd.VAE:
    """Flux 2's, whose latents are 2x2 pixels of 32 channels each."""
    made = _image_vae(32, batch_norm_latent=True)
    made.latent_channels, made.downscale_ratio, made.upscale_ratio = 128, 16, 16
    return made


def _video_vae(
    module: torch.nn.Module,
    channels: int,
    time: int,
    space: int = 8,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
) -> comfy.sd.VAE:
    """The host's VAE around a module for video, which it would build in its full size from a file.

    Args:
        channels: of its latents.
        time: frames to a latent one.
        space: pixels to a latent one, each way.
        dtypes: beside fp32, what the host computes it in.
    """
    initialize(module, 1)
    for name, values in module.named_buffers():
        # What LTXV's file would bring of its latents.
        if "per_channel_statistics" in name:
            values.fill_(1.0 if "std" in name else 0.0)
    made = kl_vae()
    made.first_stage_model = module.eval()
    made.patcher = ModelPatcher(module, load_device=CPU, offload_device=CPU)
    made.latent_channels, made.latent_dim = channels, 3
    made.working_dtypes = [*dtypes, torch.float32]
    made.upscale_ratio = (lambda frames: max(0, (frames - 1) * time + 1), space, space)
    made.downscale_ratio = (lambda frames: max(0, (frames + time - 1) // time), space, space)
    made.upscale_index_formula = made.downscale_index_formula = (time, space, space)
    made.memory_used_decode = made.memory_used_encode = lambda shape, dtype: 2**20
    return made


def _wan_vae() -> comfy.sd.VAE:
    from comfy.ldm.wan.vae import WanVAE

    config = {"dim": 16, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "num_res_blocks": 1, "attn_scales": []}
    return _video_vae(WanVAE(**config, temperal_downsample=[False, True, True], dropout=0.0), 16, 4, dtypes=HALVES)


def _hunyuan_vae() -> comfy.sd.VAE:
    config = {**KL, "z_channels": 16, "conv3d": True, "time_compress": 4}
    return _video_vae(AutoencoderKL(ddconfig=config, embed_dim=16), 16, 4, dtypes=HALVES)


def _ltxv_vae() -> comfy.sd.VAE:
    from comfy.ldm.lightricks.vae.causal_video_autoencoder import VideoVAE

    one, down, up = ["res_x", {"num_layers": 1}], {"multiplier": 2}, {"residual": True, "multiplier": 2}
    config = {
        "dims": 3,
        "latent_channels": 128,
        "encoder_blocks": [
            *(one, ["compress_space_res", down]),
            *(one, ["compress_time_res", down]),
            *(one, ["compress_all_res", down]),
            *(one, ["compress_all_res", down]),
            one,
        ],
        "decoder_blocks": [one, *[block for _ in range(3) for block in (["compress_all", up], one)]],
        "norm_layer": "pixel_norm",
        "patch_size": 4,
        "latent_log_var": "uniform",
        "encoder_base_channels": 16,
        "decoder_base_channels": 16,
    }
    return _video_vae(VideoVAE(config=config), 128, 8, 32)


def _cosmos_vae() -> comfy.sd.VAE:
    from comfy.ldm.cosmos.vae import CausalContinuousVideoTokenizer

    config = {"z_channels": 16, "latent_channels": 16, "z_factor": 1, "resolution": 64, "in_channels": 3}
    config |= {"out_channels": 3, "channels": 16, "channels_mult": [2, 4, 4], "num_res_blocks": 1, "patch_size": 4}
    config |= {"attn_resolutions": [], "dropout": 0.0, "num_groups": 1, "temporal_compression": 8}
    return _video_vae(CausalContinuousVideoTokenizer(**config, spacial_compression=8), 16, 8)


def _mochi_vae() -> comfy.sd.VAE:
    from comfy.ldm.genmo.vae.model import Decoder, Encoder, VideoVAE

    def small(part: type, **values: Any) -> torch.nn.Module:
        return part(
            base_channels=32,
            channel_multipliers=[1, 2, 3, 4],
            num_res_blocks=[1, 1, 1, 1, 1],
            latent_dim=12,
            padding_mode="replicate",
            **values,
        )

    module = VideoVAE.__new__(VideoVAE)
    torch.nn.Module.__init__(module)
    module.encoder = small(
        Encoder,
        in_channels=15,
        temporal_reductions=[1, 2, 3],
        spatial_reductions=[2, 2, 2],
        prune_bottlenecks=[False] * 5,
        has_attentions=[False, True, True, True, True],
        affine=True,
        bias=True,
        input_is_conv_1x1=True,
    )
    module.decoder = small(
        Decoder,
        out_channels=3,
        temporal_expansions=[1, 2, 3],
        spatial_expansions=[2, 2, 2],
        has_attention=[False] * 5,
        output_norm=False,
        nonlinearity="silu",
        output_nonlinearity="silu",
        causal=True,
    )
    return _video_vae(module, 12, 6, dtypes=(torch.float16,))


VAES = {
    "SDXL": lambda: _image_vae(4),
    "SD3": lambda: _image_vae(16),
    "Flux": lambda: _image_vae(16),
    "Flux2": _packed_vae,
    "Wan21": _wan_vae,
    "HunyuanVideo": _hunyuan_vae,
    "LTXV": _ltxv_vae,
    "Cosmos1CV8x8x8": _cosmos_vae,
    "Mochi": _mochi_vae,
}
"""Small VAEs with random weights, by the latent formats of `FAMILIES` that they are for."""


def vae_files() -> dict[str, dict[str, torch.Tensor]]:
    """Weights of small VAEs, by their files' names, as the host's Load VAE takes them. An image's has no encoder: the
    host would want it in its full size."""
    from comfy.ldm.wan.vae import WanVAE

    config = {**KL, "z_channels": 16, "ch_mult": [1, 2, 4, 4], "num_res_blocks": 2}
    image = AutoencoderKL(ddconfig=config, embed_dim=16)
    video = WanVAE(dim=16, z_dim=16, num_res_blocks=2, temperal_downsample=[False, True, True], dropout=0.0)
    for module in (image, video):
        initialize(module, 1)
    decoder = {name: value for name, value in image.state_dict().items() if name.startswith("decoder.")}
    return {"ae": decoder, **{name: video.state_dict() for name in ("qwen_image_vae", "wan_2.1_vae")}}
