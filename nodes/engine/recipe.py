"""A plan for a goal, from what this machine has and what the model is."""

from __future__ import annotations

from typing import Any

import comfy.model_management
from comfy.model_base import BaseModel
from comfy_api.latest import io
from torch import nn

from ..measuring.memory import MIB
from ..methods.method import has_bf16
from ..methods.recipe import Given, choose
from .host import machine
from .model.quantized import sorted_out
from .node import pass_through, suggest
from .plan import models, registry

SIDE = 1024
"""Of the picture that memory is reckoned for, in pixels."""


def plan_for(node: type[io.ComfyNode], model: Any, goal: str) -> io.NodeOutput:
    """The node's output: the model with the methods of a recipe in its plan, as suggestions.

    Args:
        node: the node class.
        model: ModelPatcher.
        goal: one of `methods.recipe.GOALS`.
    """
    if not isinstance(model.model, BaseModel):
        return pass_through(node, model, "this model is none of ComfyUI's own kinds, so that nothing is known of it")
    recipe = choose(goal, given(model), registry.kind)
    if not recipe.chosen:
        return pass_through(node, model, f"nothing to choose. {recipe}")
    return suggest(node, model, [choice.config for choice in recipe.chosen], str(recipe))


def given(patcher: Any) -> Given:
    """What a recipe for a model is chosen by. What other nodes put on it is no part of that: it may come later."""
    host, device = comfy.model_management, patcher.load_device
    side = SIDE // getattr(patcher.model.latent_format, "spacial_downscale_ratio", 8)  # since 0.28
    return Given(
        model=models.describe(patcher, {}),
        device_mib=host.get_total_memory(device) / MIB,
        size_mib=host.module_size(patcher.model) / MIB,
        int8_mib=_int8_mib(patcher.model.diffusion_model),
        # The inner model's own: a patcher's is another where DynamicVRAM loads it.
        activations_mib=patcher.model.memory_required([2, 1, side, side]) / MIB,
        has_bf16=has_bf16() if device.type == "cpu" else host.should_use_bf16(device),
        # Apple's GPUs have the RAM for memory.
        has_ram_apart=device != patcher.offload_device and device.type != "mps",
        is_dynamic=machine.is_dynamic(patcher),
        is_reloadable=getattr(patcher, "cached_patcher_init", None) is not None,
    )


def _int8_mib(module: nn.Module) -> float:
    """What Quantize Model would make of a diffusion model's weights."""
    paths = {part: path for path, part in module.named_modules()}
    layers = sorted_out(paths, registry.kind("quantize")("int8 weight-only", min_features=0))
    taken = sum(layer.in_features * layer.out_features for layer, _, why in layers if why is None)
    # A scale for each row of at least 256.
    return 1.02 * taken / MIB
