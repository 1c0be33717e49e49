"""One evaluation of the model: as the host's guider makes it, or with the positive alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..plan.plan import KEY

WITHOUT_NEGATIVE = f"{KEY}.without_negative"
"""The key of the wrapper around all that evaluate a positive alone."""


@dataclass(frozen=True)
class HostGuidance:
    """`methods.method.Guidance` over a CFGGuider.

    Attributes:
        executor, guider, x, timestep, model_options, seed: those of the host's PREDICT_NOISE wrapper.
        sigma: the timestep's noise level, read from the device.
    """

    executor: Any
    guider: Any
    x: torch.Tensor
    timestep: torch.Tensor
    model_options: dict[str, Any]
    seed: int | None
    sigma: float

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
    def has_own_arithmetic(self) -> bool:
        return "sampler_cfg_function" in self.model_options

    @property
    def conditions(self) -> int:
        return sum(
            cond.get("timestep_start", self.sigma) >= self.sigma >= cond.get("timestep_end", self.sigma)
            for conds in self.guider.conds.values()
            for cond in conds or ()
        )

    def guided(self) -> torch.Tensor:
        return self.executor(self.x, self.timestep, self.model_options, self.seed)

    def positive_alone(self) -> torch.Tensor:
        """What any guider comes to with guidance off.

        This is the host's `sampling_function` at cfg 1.0, except that the slot of the negative
        holds the positive prediction and not zeros: cfg++ samplers read it. Whatever combines the
        two (`sampler_cfg_function`, a guider's own arithmetic) is left out: it is the guidance, and
        some of it, as Perp-Neg, would divide by the norm of a difference that is zero.
        """
        options = {name: value for name, value in self.model_options.items() if name != "sampler_cfg_function"}
        evaluate = options.get("sampler_calc_cond_batch_function")
        if evaluate is not None:
            options["sampler_calc_cond_batch_function"] = lambda args: _in_both_slots(evaluate(args))
        transformer_options = options.get("transformer_options", {})
        wrappers = transformer_options.get("wrappers", {})
        of_kind = {WITHOUT_NEGATIVE: [_without_negative], **wrappers.get(WrappersMP.CALC_COND_BATCH, {})}
        options["transformer_options"] = {
            **transformer_options,
            "wrappers": {**wrappers, WrappersMP.CALC_COND_BATCH: of_kind},
        }
        negative = self.guider.conds.get("negative") if self._must_keep_negative else None
        options["sampler_post_cfg_function"] = [
            partial(_with_negative, function, negative) for function in options.get("sampler_post_cfg_function", [])
        ]
        # By its name: AnimateDiff-Evolved has its own there while it samples.
        denoised: torch.Tensor = comfy.samplers.sampling_function(
            self.guider.inner_model, self.x, self.timestep, None, self.guider.conds["positive"], 1.0, options, self.seed
        )
        return denoised


def _in_both_slots(predictions: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    # A copy: the host's slots are tensors of their own, and functions may write into them.
    return [predictions[0], predictions[0].clone()]


def _without_negative(executor: Any, model: Any, conds: list[Any], *args: Any) -> Any:
    """A wrapper at CALC_COND_BATCH: where there is no negative, the positive's prediction takes its slot."""
    predictions = executor(model, conds, *args)
    return _in_both_slots(predictions) if len(conds) == 2 and conds[1] is None else predictions


def _with_negative(function: Callable[..., torch.Tensor], negative: Any, args: dict[str, Any]) -> torch.Tensor:
    """A function after guidance, given the prompt that was not evaluated: some, such as SAG, evaluate it themselves."""
    return function({**args, "uncond": negative})
