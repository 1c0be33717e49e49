"""What training multiplies in."""

from __future__ import annotations

import torch
from slipstream_pack.nodes.methods.method import has_bf16


def mixed(device: torch.device) -> torch.autocast:
    """bfloat16 where the device computes in it. A processor that goes by way of float32 takes many times as long."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu" or has_bf16())
