"""One call of the host's UNet: whole, or its outer blocks alone on features kept from an earlier call."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from comfy.ldm.modules.attention import SpatialTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import apply_control, forward_timestep_embed
from comfy.ldm.modules.diffusionmodules.util import timestep_embedding


class HostUNetCall:
    """`methods.method.UNetCall` over the host's UNetModel.

    The arguments are those of the host's DIFFUSION_MODEL wrapper.

    Args:
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
        self.keys = self._keys(occurrences)

    def _keys(self, occurrences: dict[Hashable, int]) -> tuple[Hashable, ...]:
        """What identifies each condition of this batch from one evaluation to the next.

        A uuid alone does not: the host copies conditions with theirs into the other prompt, and
        context windows and tiling wrappers run one several times in an evaluation. Which copy of
        the model it runs on counts too (several GPUs).
        """
        conds = self.options.get("cond_or_uncond", ())
        uuids = self.options.get("uuids", ())
        window = getattr(self.options.get("context_window"), "index_list", None)
        if not conds or len(conds) != len(uuids) or self.x.shape[0] % len(conds):
            conds, uuids = (None,), (None,)
        shape = (self.x.shape[0] // len(conds), *self.x.shape[1:])
        keys = []
        for cond, uuid in zip(conds, uuids, strict=True):
            key = (id(self.unet), cond, uuid, str(window), shape)
            occurrences[key] = occurrences.get(key, -1) + 1
            keys.append((*key, occurrences[key]))
        return tuple(keys)

    def _forward(self, options: dict[str, Any]) -> torch.Tensor:
        return self.executor(self.x, self.timesteps, self.context, self.y, self.control, options, **self.kwargs)

    def full(self, branch: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        if branch is None:
            return self._forward(self.options), None
        position = ("output", len(self.unet.output_blocks) - 1 - branch)
        captured: list[torch.Tensor] = []

        def capture(h: torch.Tensor, skip: torch.Tensor, options: dict[str, Any]):
            if options["block"] == position:
                # A copy: core's FreeU, after us, writes into h.
                captured.append(h.clone())
            return h, skip

        patches = self.options.get("patches", {})
        before_all = [capture, *patches.get("output_block_patch", [])]
        output = self._forward({**self.options, "patches": {**patches, "output_block_patch": before_all}})
        return output, captured[0] if captured else None

    def partial(self, branch: int, deep: torch.Tensor) -> torch.Tensor:
        """The host's `UNetModel._forward` (0.8.0 to 0.33.0), less the blocks between the branch's
        input block and the output block that it joins."""
        unet, x, options = self.unet, self.x, self.options.copy()
        patches = options.get("patches", {})
        first = len(unet.output_blocks) - 1 - branch
        options["original_shape"] = list(x.shape)
        options["transformer_index"] = 0

        embedded = timestep_embedding(self.timesteps, unet.model_channels, repeat_only=False).to(x.dtype)
        emb = unet.time_embed(embedded)
        for patch in patches.get("emb_patch", []):
            emb = patch(emb, unet.model_channels, options)
        if unet.num_classes is not None:
            emb = emb + unet.label_emb(self.y)

        h = x
        skips = []
        for index, block in enumerate(unet.input_blocks[: branch + 1]):
            options["block"] = ("input", index)
            h = forward_timestep_embed(block, h, emb, self.context, options)
            h = apply_control(h, self.control, "input")
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
        outputs = (self.control or {}).get("output", [])
        for _ in range(min(first, len(outputs))):
            outputs.pop()

        h = deep
        for index, block in enumerate(unet.output_blocks[first:], first):
            options["block"] = ("output", index)
            skip = apply_control(skips.pop(), self.control, "output")
            for patch in patches.get("output_block_patch", []):
                h, skip = patch(h, skip, options)
            if skip is not None:
                h = torch.cat([h, skip], dim=1)
            output_shape = skips[-1].shape if skips else None
            h = forward_timestep_embed(block, h, emb, self.context, options, output_shape)
        h = h.type(x.dtype)
        return unet.id_predictor(h) if unet.predict_codebook_ids else unet.out(h)
