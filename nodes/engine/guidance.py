"""One evaluation of the model: as the host's guider makes it, or with the positive alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch


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
        model, options, sigma = self.guider.inner_model, self.model_options, self.timestep
        positive = self.guider.conds["positive"]
        negative = self.guider.conds.get("negative") if self._must_keep_negative else None
        common = {"model": model, "model_options": options, "input": self.x, "sigma": sigma}
        conds = [positive, None]
        calc_cond_batch = options.get("sampler_calc_cond_batch_function")
        if calc_cond_batch is not None:
            prediction = calc_cond_batch({**common, "conds": conds})[0]
        else:
            prediction = comfy.samplers.calc_cond_batch(model, conds, self.x, sigma, options)[0]
        # Copies: the host's slots are tensors of their own, and functions may write into them.
        predictions = [prediction, prediction.clone()]
        for function in options.get("sampler_pre_cfg_function", []):
            predictions = function(
                {**common, "conds": conds, "conds_out": predictions, "cond_scale": 1.0, "timestep": sigma}
            )
        denoised = predictions[0].clone()
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function(
                {
                    **common,
                    "denoised": denoised,
                    "cond": positive,
                    "uncond": negative,
                    "cond_scale": 1.0,
                    "cond_denoised": predictions[0],
                    "uncond_denoised": predictions[1],
                }
            )
        return denoised
