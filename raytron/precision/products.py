"""Matrix products of bf16 tensors, computed with whatever the processor is fast at.

A CPU without bf16 instructions emulates bf16 products at a quarter of its fp32 speed. There operands are widened to
fp32 (exactly), multiplied, and the result rounded once: the same format in and out, faster and no less accurate.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NATIVE_BF16", "linear"]


def _native_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])
    return any(name in flags for name in ("avx512_bf16", "amx_bf16", "bf16"))


# Whether this CPU multiplies bf16 in hardware (AVX512-BF16, AMX, or Arm's BF16); False where nothing says so. A
# constant and not a function, for torch.compile traces the code that asks.
NATIVE_BF16 = _native_bf16()


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
