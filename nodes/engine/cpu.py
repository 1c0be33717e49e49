"""Everything that makes a processor faster, suggested by one node: a method's own node on the same model wins."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..methods.method import Configuration
from .node import pass_through, suggest
from .plan import models, registry


def speed_up(
    node: type[io.ComfyNode], model: Any, winograd: str | None, bf16: bool, sdpa: bool, filters_mib: int = 0
) -> io.NodeOutput:
    """The node's output.

    Args:
        node: the node class.
        model: ModelPatcher.
        winograd: the form of Winograd's convolutions; None for none.
        bf16: compute in bfloat16 where the processor has it. With Winograd's convolutions, the transformers only: they
            are as fast in float32, and lose nothing.
        sdpa: torch's own attention in the place of the host's.
        filters_mib: the most memory for Winograd's filters, in MiB; 0 for half of what was to spare.

    Raises:
        ValueError: another node that adds several methods suggests one with other settings.
    """
    about = models.describe(model, model.model_options)
    if about.device != "cpu":
        return pass_through(node, model, f"this model runs on {about.device}, and this node is for processors")
    wanted: list[Configuration] = []
    if winograd is not None and about.is_unet:
        wanted.append(registry.configuration("winograd", form=winograd, bf16=bf16, filters_mib=filters_mib))
    # Both have `auto` for what a processor gains by.
    if bf16:
        wanted.append(registry.configuration("precision", scope="transformers" if wanted else "model"))
    if sdpa:
        wanted.append(registry.configuration("attention_backend"))
    if not wanted:
        return pass_through(node, model, "all of it is switched off, or not for this kind of model")
    return suggest(node, model, wanted)
