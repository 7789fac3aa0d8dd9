"""Matrix products of bf16 tensors, computed with whatever the processor is fast at.

A CPU without bf16 instructions emulates bf16 products at a quarter of its fp32 speed. There operands are widened to
fp32 (exactly), multiplied, and the result rounded once: the same format in and out, faster and no less accurate.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BF16_INSTRUCTIONS", "NATIVE_BF16", "linear"]


def _bf16_instructions() -> frozenset[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return frozenset(flags) & {"avx512_bf16", "amx_bf16", "bf16"}


# What this CPU multiplies bf16 with (AVX512-BF16, AMX, Arm's BF16), and whether it can; nothing where nothing says so.
# Constants and no functions, for torch.compile traces the code that asks.
BF16_INSTRUCTIONS = _bf16_instructions()
NATIVE_BF16 = bool(BF16_INSTRUCTIONS)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype, or autocast's."""
    if x.device.type != "cpu" or NATIVE_BF16:
        return F.linear(x, weight, bias)
    if torch.is_autocast_enabled("cpu"):
        x, weight = _autocast(x), _autocast(weight)
    if x.dtype != torch.bfloat16:
        return F.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(torch.bfloat16)


def _autocast(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype("cpu"))
