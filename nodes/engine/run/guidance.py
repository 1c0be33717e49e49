"""One evaluation of the model: as the host's guider makes it, or with the positive alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch

from .without_negative import WithoutNegative, working_on_negative


@dataclass(frozen=True)
class HostGuidance:
    """`methods.method.Guidance` over a CFGGuider.

    Attributes:
        executor, guider, x, timestep, model_options, seed: those of the host's PREDICT_NOISE wrapper.
        sigma: the timestep's noise level, read from the device.
        left_out: names of the nodes that were left out with the guidance.
    """

    executor: Any
    guider: Any
    x: torch.Tensor
    timestep: torch.Tensor
    model_options: dict[str, Any]
    seed: int | None
    sigma: float
    left_out: set[str] = field(default_factory=set)

    @property
    def is_guided(self) -> bool:
        conds = self.guider.conds
        if not conds.get("positive") or not any(conds[name] for name in conds if name != "positive"):
            return False
        # DualModelGuider, which loads its second model only if it will be needed.
        if getattr(self.guider, "uncond_inner", self) is None:
            return False
        # Only the plain guider's cfg is its whole guidance; others keep the attribute's default.
        is_plain = type(self.guider).predict_noise is comfy.samplers.CFGGuider.predict_noise
        return not (is_plain and math.isclose(self.guider.cfg, 1.0) and not self._must_keep_negative)

    @property
    def _must_keep_negative(self) -> bool:
        return bool(self.model_options.get("disable_cfg1_optimization", False))

    @property
    def conditions(self) -> int:
        return sum(
            cond.get("timestep_start", self.sigma) >= self.sigma >= cond.get("timestep_end", self.sigma)
            for conds in self.guider.conds.values()
            for cond in conds or ()
        )

    @property
    def needing_negative(self) -> set[str]:
        is_needed = bool(self.guider.model_options.get("disable_cfg1_optimization", False))
        return working_on_negative(self.model_options.get("transformer_options", {})) if is_needed else set()

    def guided(self) -> torch.Tensor:
        return self.executor(self.x, self.timestep, self.model_options, self.seed)

    def positive_alone(self) -> torch.Tensor:
        """What any guider comes to with guidance off.

        This is the host's `sampling_function` at cfg 1.0, except that the slot of the negative
        holds the positive prediction and not zeros: cfg++ samplers read it. What other nodes have
        around guidance goes on as far as `WithoutNegative` finds it can; a guider's own arithmetic
        is left out.
        """
        is_needed = bool(self.guider.model_options.get("disable_cfg1_optimization", False))
        without = WithoutNegative(self.model_options, is_needed)
        # By its name: AnimateDiff-Evolved has its own there while it samples.
        denoised: torch.Tensor = comfy.samplers.sampling_function(
            self.guider.inner_model,
            self.x,
            self.timestep,
            None,
            self.guider.conds["positive"],
            1.0,
            without.options,
            self.seed,
        )
        self.left_out.update(without.left_out)
        return denoised
