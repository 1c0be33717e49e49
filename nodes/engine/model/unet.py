"""One call of the host's UNet: whole, or its outer blocks alone on features kept from an earlier call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules import openaimodel
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding
from comfy.patcher_extension import WrapperExecutor


class HostUNetCall:
    """`methods.method.UNetCall` over the host's UNetModel.

    The arguments are those of the host's DIFFUSION_MODEL wrapper.

    Args:
        latent: shape of the latent in this evaluation, (B, C, H, W).
        occurrences: how often each condition came so far in this evaluation; counted on.
    """

    def __init__(
        self,
        executor: Any,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor | None,
        y: torch.Tensor | None,
        control: dict[str, list[Any]] | None,
        transformer_options: dict[str, Any],
        kwargs: dict[str, Any],
        latent: torch.Size,
        occurrences: dict[Hashable, int],
    ):
        self.executor = executor
        self.unet = executor.class_obj
        self.x = x
        self.timesteps = timesteps
        self.context = context
        self.y = y
        self.control = control
        self.options = transformer_options
        self.kwargs = kwargs
        self.keys = self._keys(latent, occurrences)

    def _keys(self, latent: torch.Size, occurrences: dict[Hashable, int]) -> tuple[Hashable, ...]:
        """What identifies each part of this batch from one evaluation to the next.

        A condition's uuid alone does not: the host copies conditions with theirs into the other
        prompt, and windows and tiles run one several times in an evaluation. Which copy of the
        model it runs on counts too (several GPUs).

        Each condition has as many rows as the latent has images, unless frames are windowed, whose
        numbers are then part of the key (windows move, so only known ones will do), or tiles
        are batched, in an order that is the wrapper's own: such a batch is one part, or none.
        """
        conds = tuple(self.options.get("cond_or_uncond", ()))
        uuids = tuple(self.options.get("uuids", ()))
        window = self._window()
        rows = self.x.shape[0] / max(1, len(conds))
        is_known = len(conds) == len(uuids) > 0 and (rows == latent[0] or (window is not None and rows % 1 == 0))
        if is_known:
            parts: list[Hashable] = list(zip(conds, uuids, strict=True))
        elif self.x.shape[-2:] != latent[-2:]:
            parts = [(conds, uuids)]
        else:
            return ()
        keys = []
        for part in parts:
            key = (id(self.unet), part, window, tuple(self.x.shape[1:]), self.x.shape[0] // len(parts))
            occurrences[key] = occurrences.get(key, -1) + 1
            keys.append((*key, occurrences[key]))
        return tuple(keys)

    def _window(self) -> tuple[int, ...] | None:
        """The frames of a context window: core's, or AnimateDiff-Evolved's."""
        frames = getattr(self.options.get("context_window"), "index_list", None)
        if frames is None:
            frames = (self.options.get("ad_params") or {}).get("sub_idxs")
        return None if frames is None else tuple(frames)

    @property
    def has_wrappers_inside(self) -> bool:
        """Whether wrappers of other packs stand between us and the UNet: ones that were added while it runs."""
        return bool(self.executor.idx + 1 < len(self.executor.wrappers))

    def full(self, branch: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        captured: list[torch.Tensor] = []
        options = self.options if branch is None else capturing(self.unet, branch, self.options, captured)
        output = self._next(self.executor, options)
        # A wrapper inside may run the UNet several times, and which is which it alone knows.
        return output, captured[0] if len(captured) == 1 else None

    def partial(self, branch: int, deep: torch.Tensor) -> torch.Tensor:
        may_run_twice = self.has_wrappers_inside

        def outer(x, timesteps=None, context=None, y=None, control=None, transformer_options=None, **kwargs):
            # Core's FreeU writes into what it gets.
            features, options = deep.clone() if may_run_twice else deep, transformer_options or {}
            return outer_blocks(self.unet, branch, features, x, timesteps, context, y, control, options)

        # Wrappers inside, which joined after the run had begun, stand around whatever runs.
        executor = WrapperExecutor.new_class_executor(outer, self.unet, self.executor.wrappers, self.executor.idx)
        return self._next(executor, self.options)

    def _next(self, executor: Any, options: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = executor(
            self.x, self.timesteps, self.context, self.y, self.control, options, **self.kwargs
        )
        return output


def capturing(unet: Any, branch: int, options: dict[str, Any], captured: list[torch.Tensor]) -> dict[str, Any]:
    """Transformer options with which the host's forward puts a copy of the features that enter the output block which
    skip connection `branch` joins into `captured`, before any patch touches them."""
    position = ("output", len(unet.output_blocks) - 1 - branch)

    def capture(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]):
        if options["block"] == position:
            # A copy: core's FreeU, after us, writes into h.
            captured.append(h.clone())
        return h, skip

    patches = options.get("patches", {})
    return {
        **options,
        "patches": {**patches, "output_block_patch": [capture, *patches.get("output_block_patch", [])]},
    }


def outer_blocks(
    unet: Any,
    branch: int,
    deep: torch.Tensor,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    context: torch.Tensor | None,
    y: torch.Tensor | None,
    control: dict[str, list[Any]] | None,
    transformer_options: dict[str, Any],
) -> torch.Tensor:
    """The host's `UNetModel._forward` (0.8.0 to 0.33.0), less the blocks between the branch's
    input block and the output block that it joins."""
    options = transformer_options.copy()
    patches = options.get("patches", {})
    first = len(unet.output_blocks) - 1 - branch
    options["original_shape"] = list(x.shape)
    options["transformer_index"] = 0

    embedded = timestep_embedding(timesteps, unet.model_channels, repeat_only=False).to(x.dtype)
    emb = unet.time_embed(embedded)
    for patch in patches.get("emb_patch", []):
        emb = patch(emb, unet.model_channels, options)
    if unet.num_classes is not None:
        emb = emb + unet.label_emb(y)

    h = x
    skips = []
    for index, block in enumerate(unet.input_blocks[: branch + 1]):
        options["block"] = ("input", index)
        h = openaimodel.forward_timestep_embed(block, h, emb, context, options)
        h = openaimodel.apply_control(h, control, "input")
        for patch in patches.get("input_block_patch", []):
            h = patch(h, options)
        skips.append(h)
        for patch in patches.get("input_block_patch_after_skip", []):
            h = patch(h, options)

    skipped = [*unet.input_blocks[branch + 1 :], unet.middle_block, *unet.output_blocks[:first]]
    options["transformer_index"] += sum(
        isinstance(layer, SpatialTransformer) for block in skipped if block is not None for layer in block
    )
    # The host takes one from the end of this list for each output block.
    outputs = (control or {}).get("output", [])
    for _ in range(min(first, len(outputs))):
        outputs.pop()

    h = deep
    for index, block in enumerate(unet.output_blocks[first:], first):
        options["block"] = ("output", index)
        skip = openaimodel.apply_control(skips.pop(), control, "output")
        for patch in patches.get("output_block_patch", []):
            h, skip = patch(h, skip, options)
        if skip is not None:
            h = torch.cat([h, skip], dim=1)
        output_shape = skips[-1].shape if skips else None
        h = openaimodel.forward_timestep_embed(block, h, emb, context, options, output_shape)
    h = h.type(x.dtype)
    return unet.id_predictor(h) if unet.predict_codebook_ids else unet.out(h)
