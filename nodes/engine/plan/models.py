"""What the host's models are, in the words that methods understand."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from comfy import supported_models
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

from ...methods.method import Model

# Most specific first: the host derives SSD-1B and others from SDXL, SD 2.x variants from SD20.
FAMILIES = (
    (supported_models.SDXLRefiner, "SDXL refiner"),
    (supported_models.SDXL, "SDXL"),
    (supported_models.SD20, "SD2"),
    (supported_models.SD15, "SD1"),
)


def is_image_unet(module: Any) -> bool:
    """Whether a diffusion model is a UNet of Stable Diffusion's blocks for images; SVD's is one for video."""
    return isinstance(module, UNetModel) and not module.use_temporal_resblocks


def describe(patcher: Any, model_options: dict[str, Any]) -> Model:
    """What a method may know of a model.

    Args:
        patcher: ModelPatcher.
        model_options: the options in force: the patcher's own, or the guider's during a run.
    """
    # Packs may put other things than the host's BaseModel into a patcher.
    config = getattr(patcher.model, "model_config", patcher.model)
    module: Any = getattr(patcher.model, "diffusion_model", None)
    family = next((name for kind, name in FAMILIES if isinstance(config, kind)), None)
    name = type(config).__name__
    caches = _caches(model_options.get("transformer_options", {}))
    compiler = "ComfyUI's TorchCompileModel" if "torch_compile_kwargs" in model_options else None
    device = patcher.load_device.type
    if not is_image_unet(module):
        return Model(name, None, None, 0, 0, caches, compiler, device)
    depth = len(module.input_blocks)
    blocks = depth + len(module.output_blocks) + (module.middle_block is not None)
    return Model(name, family, module.model_channels, depth, blocks, caches, compiler, device)


def hooked_weights(patcher: Any) -> set[str]:
    """Names, inside the diffusion model, of the weights that hooks on conditionings may patch between two calls."""
    return {key.removeprefix("diffusion_model.") for patches in patcher.hook_patches.values() for key in patches}


def weights_version(patcher: Any) -> Hashable:
    """What a model's weights are, LoRA and the like included: its own, and those of the models that are put into it
    when it is loaded, such as AnimateDiff's."""
    additional = patcher.get_nested_additional_models()
    return patcher.patches_uuid, *(one.patches_uuid for one in additional)


def _caches(transformer_options: dict[str, Any]) -> tuple[str, ...]:
    """Core's EasyCache and LazyCache, which share one slot of the transformer options."""
    holder = transformer_options.get("easycache")
    return () if holder is None else (holder.name,)
