"""The CPU's inner loops of inference, in C (cpu.c), compiled for this machine at first use.

A decode step of a small model is hundreds of tiny operations, each dominated by the cost of starting it, and attention
over a paged cache has no operation in torch that does not copy the cache first. Tried instead: torch.compile (a minute
to start, recompiles with the batch, still copies), a torch extension (half a minute to compile torch's headers). This
file compiles in two seconds with any C compiler, is kept in the user's cache folder, and is called through ctypes.

Where there is no compiler, no CPU tensor, or another dtype than fp32 and bf16, callers use torch instead.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from raytron.parallel.compiled import load

__all__ = ["KEYS", "Attend", "attend", "library", "linear", "padded", "rms_norm", "swiglu", "usable"]

KEYS = 32  # cache blocks must be a multiple of it
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_SOURCE = Path(__file__).with_name("cpu.c")
_WIDEST = 16  # floats of a vector


class Attend(ctypes.Structure):
    """Arguments of `rt_attend`, see cpu.c."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("out", "q", "k", "v")]
        + [(name, ctypes.c_int64) for name in ("qs", "ks", "vs")]
        + [(name, ctypes.c_void_p) for name in ("kc", "vc", "cosine", "sine", "sequence", "position", "tables")]
        + [(name, ctypes.c_int64) for name in ("width", "tokens", "heads", "groups", "d", "dp", "block")]
        + [("scale", ctypes.c_float), ("dtype", ctypes.c_int), ("threads", ctypes.c_int)]
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where they cannot be compiled."""
    loaded = load(_SOURCE, "inference on the CPU")
    if loaded is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    loaded.rt_linear.argtypes = [pointer, pointer, number, *[pointer] * 2, *[number] * 3, *[ctypes.c_int] * 2]
    loaded.rt_rms_norm.argtypes = [pointer, pointer, number, pointer, number, number, ctypes.c_float, ctypes.c_int]
    loaded.rt_rms_norm.restype = loaded.rt_swiglu.restype = loaded.rt_attend.restype = None
    loaded.rt_swiglu.argtypes = [pointer, pointer, number, number, ctypes.c_int]
    loaded.rt_attend.argtypes = [ctypes.POINTER(Attend)]
    return loaded


def usable(x: Tensor) -> bool:
    """Whether the kernels compute with tensors like `x`."""
    return x.dtype in _DTYPES and x.device.type == "cpu" and library() is not None


def padded(head_dim: int) -> int:
    """Elements a head's value takes in the cache: whole vectors."""
    return -(-head_dim // _WIDEST) * _WIDEST


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] weight [N, K]^T + bias [N] -> [..., N]; one dtype. A row's bits depend on that row only."""
    K, N = weight.shape[1], weight.shape[0]
    rows = x if x.dim() == 2 and x.stride(1) == 1 else x.reshape(-1, K).contiguous()
    M = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], N))
    assert weight.is_contiguous(), "rows of weights are read one after the other"
    assert weight.dtype == x.dtype, f"weights of {weight.dtype} for an input of {x.dtype}"
    failed = M and library().rt_linear(
        out.data_ptr(),
        rows.data_ptr(),
        rows.stride(0),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        M,
        N,
        K,
        _DTYPES[x.dtype],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for a linear map of {M} rows of {K} and {N}")
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim."""
    D = x.shape[-1]
    if x.dim() == 2 and x.stride(1) == 1:
        rows, stride = x, x.stride(0)
    else:
        rows, stride = x.contiguous(), D
    out = x.new_empty(x.shape)
    count = x.numel() // D
    library().rt_rms_norm(out.data_ptr(), rows.data_ptr(), stride, weight.data_ptr(), count, D, eps, _DTYPES[x.dtype])
    return out


def swiglu(x: Tensor) -> Tensor:
    """[..., gate F | up F] -> silu(gate) * up [..., F]."""
    F = x.shape[-1] // 2
    x = x.contiguous()
    out = x.new_empty((*x.shape[:-1], F))
    library().rt_swiglu(out.data_ptr(), x.data_ptr(), x.numel() // (2 * F), F, _DTYPES[x.dtype])
    return out


def attend(
    q_THd: Tensor,
    k_TKd: Tensor,
    v_TKd: Tensor,
    keys: Tensor,
    values: Tensor,
    cosine: Tensor,
    sine: Tensor,
    sequence_T: Tensor,
    position_T: Tensor,
    tables: Tensor,
) -> Tensor:
    """Turn q and k by their positions, put k and v into the cache, attend to everything up to each token.

    Args:
        q_THd, k_TKd, v_TKd: rows may be apart, a row's heads stand together.
        keys: [blocks, K, d, block], values: [blocks, K, block, padded(d)]: the cache of one layer, written in place.
        cosine, sine: fp32 [positions, d / 2].
        sequence_T, position_T: int32; tokens of a sequence stand together, in order.
        tables: int32 [sequences, width], the blocks of each.

    Returns: [T, H * d].
    """
    T, H, d = q_THd.shape
    out = q_THd.new_empty((T, H * d))
    arguments = Attend(
        out.data_ptr(), q_THd.data_ptr(), k_TKd.data_ptr(), v_TKd.data_ptr(),
        q_THd.stride(0), k_TKd.stride(0), v_TKd.stride(0), keys.data_ptr(), values.data_ptr(),
        cosine.data_ptr(), sine.data_ptr(), sequence_T.data_ptr(), position_T.data_ptr(), tables.data_ptr(),
        tables.shape[1], T, H, k_TKd.shape[1], d, values.shape[-1], values.shape[-2], d**-0.5,
        _DTYPES[q_THd.dtype], torch.get_num_threads(),
    )  # fmt: skip
    library().rt_attend(ctypes.byref(arguments))
    return out
