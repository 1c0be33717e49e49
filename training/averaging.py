"""The mean of a model's weights over training, which draws better than the last ones do."""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def follow(averaged: nn.Module, model: nn.Module, step: int, most: float) -> None:
    """Take a step into an exponential moving average of all parameters; the first steps are soon forgotten.

    Args:
        most: how much of the average stays, once there are steps enough.
    """
    decay = min(most, (1 + step) / (10 + step))
    for mean, value in zip(averaged.parameters(), model.parameters(), strict=True):
        mean.lerp_(value, 1 - decay)
