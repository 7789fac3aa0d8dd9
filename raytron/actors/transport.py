"""The Ray object store's transport of the layout algebra: moves between actors that share no process group.

The driver runs the plan and touches no tensor. For each bucket it asks every sending actor to pack its part, and passes
the references on to the receivers; Ray carries the bytes. Receivers that need the same boxes get the same message, so
replicas on one node read one copy of it, in place.

Messages are numpy arrays of bytes, which Ray shares without a copy; torch tensors it would serialise, at a tenth of the
speed. Where both ends are in one process group, `parallel.transport.Distributed` is faster still.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from ray.exceptions import RayTaskError

from raytron.actors.failures import WorkerError
from raytron.parallel.boxes import Box, volume
from raytron.parallel.pieces import ITEMSIZE, Place, Spot
from raytron.parallel.planning import Plan
from raytron.parallel.storage import Buffers, copy_, find, torch_dtype, view

__all__ = ["Cut", "Message", "ObjectStore", "messages", "pack", "unpack"]

ALIGN = 16  # bytes: every segment of a message starts where any dtype may be viewed
AHEAD = 2  # buckets under way: bounds what the object store holds


class Cut(NamedTuple):
    """One end of a move: `box` of a tensor, at `spot` of a flat buffer of `place`, travelling as dtype `wire`."""

    place: Place
    box: Box
    spot: Spot
    wire: str


class Message(NamedTuple):
    """What one actor sends: `cuts` in order, read into the same number of cuts on every receiver."""

    sender: Any
    cuts: tuple[Cut, ...]
    receivers: Mapping[Any, tuple[Cut, ...]]


def messages(bucket: Plan, sender_of: Callable[[Place], Any], receiver_of: Callable[[Place], Any]) -> Iterator[Message]:
    """A bucket as messages: one per sender and set of cuts, however many receive it. Pure; actors are any hashables."""
    pairs: dict[tuple[Any, Any], list[tuple[Cut, Cut]]] = {}
    for move in bucket.moves:
        wire = bucket.wire(move.name)
        for src, dst in move.pairs():
            ends = Cut(src, move.box, move.at, wire), Cut(dst, move.box, move.to, wire)
            pairs.setdefault((sender_of(src), receiver_of(dst)), []).append(ends)
    grouped: dict[tuple[Any, tuple[Cut, ...]], dict[Any, tuple[Cut, ...]]] = {}
    for (sender, receiver), ends in pairs.items():
        at, to = zip(*ends, strict=True)
        grouped.setdefault((sender, at), {})[receiver] = to
    for (sender, at), receivers in grouped.items():
        yield Message(sender, at, receivers)


def pack(cuts: Sequence[Cut], buffers: Buffers) -> np.ndarray:
    """The cuts' elements, as uint8 [bytes], each segment aligned to 16 bytes."""
    data = np.empty(_offsets(cuts)[-1], np.uint8)
    for cut, part in _segments(cuts, torch.from_numpy(data)):
        copy_(part, view(find(buffers, cut.place, cut.spot.buffer), cut.box, cut.spot))
    return data


def unpack(data: np.ndarray, cuts: Sequence[Cut], buffers: Buffers) -> None:
    """Write what `pack` made of equal boxes to these cuts. `data` is only read: it may lie in the object store."""
    with warnings.catch_warnings():  # torch knows no read-only tensors
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        tensor = torch.from_numpy(data)
    for cut, part in _segments(cuts, tensor):
        copy_(view(find(buffers, cut.place, cut.spot.buffer), cut.box, cut.spot), part)


def _offsets(cuts: Sequence[Cut]) -> list[int]:
    """Where each cut's segment starts, and where the last one ends."""
    offsets = [0]
    for cut in cuts:
        nbytes = volume(cut.box) * ITEMSIZE[cut.wire]
        offsets.append(offsets[-1] + -(-nbytes // ALIGN) * ALIGN)
    return offsets


def _segments(cuts: Sequence[Cut], data: torch.Tensor) -> Iterator[tuple[Cut, torch.Tensor]]:
    for cut, at in zip(cuts, _offsets(cuts), strict=False):
        nbytes = volume(cut.box) * ITEMSIZE[cut.wire]
        yield cut, data[at : at + nbytes].view(torch_dtype(cut.wire)).view([hi - lo for lo, hi in cut.box])


class ObjectStore:
    """A `Transport` for `raytron.parallel.transport.run`, used in the driver.

    Args:
        senders, receivers: place -> the `Worker` actor that owns it (`ActorGroup.workers`).
        buffers: name of the engines' method that returns their `Buffers`, (place, buffer name) -> flat tensor.
    """

    def __init__(self, senders: Mapping[Place, Any], receivers: Mapping[Place, Any], buffers: str = "buffers") -> None:
        self._senders, self._receivers, self._buffers = senders, receivers, buffers
        self._underway: list[list[ray.ObjectRef]] = []

    def move(self, bucket: Plan) -> None:
        """Send a bucket on its way; waits only for the bucket before the previous one."""
        while len(self._underway) >= AHEAD:
            _wait(self._underway.pop(0))
        acknowledged = []
        for message in messages(bucket, self._senders.__getitem__, self._receivers.__getitem__):
            data = message.sender.pack.remote(self._buffers, message.cuts)
            acknowledged += [to.unpack.remote(self._buffers, cuts, data) for to, cuts in message.receivers.items()]
        self._underway.append(acknowledged)

    def finish(self) -> None:
        """Wait until every receiver has written everything sent so far.

        Raises:
            WorkerError: an actor failed to pack or unpack.
        """
        while self._underway:
            _wait(self._underway.pop(0))


def _wait(refs: list[ray.ObjectRef]) -> None:
    try:
        ray.get(refs)
    except RayTaskError as error:
        raise (error.cause if isinstance(error.cause, WorkerError) else error) from None
