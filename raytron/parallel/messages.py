"""Small control messages between ranks: plain JSON, never pickles, over any axis.

Whoever has a thread of its own, such as a checkpoint being saved, takes an axis of its own: its messages must not come
between the training thread's collectives.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from raytron.parallel.collectives import Axis

__all__ = ["gather", "share"]


def gather(axis: Axis, value: Any) -> list[Any]:
    """Every rank's JSON-ready value, in axis order, on every rank."""
    if axis.size == 1:
        return [value]
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = axis.all_gather(torch.tensor([payload.numel()])).tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: payload.numel()] = payload
    rows = axis.all_gather(padded[None])
    return [json.loads(row[:n].numpy().tobytes()) for row, n in zip(rows, lengths, strict=True)]


def share(axis: Axis, value: Any) -> Any:
    """The JSON-ready value of the axis's first rank, on every rank."""
    if axis.size == 1:
        return value
    payload = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    length = int(axis.broadcast_(torch.tensor([payload.numel()])))
    data = payload if axis.index == 0 else torch.empty(length, dtype=torch.uint8)
    return json.loads(axis.broadcast_(data).numpy().tobytes())
