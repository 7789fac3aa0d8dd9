"""`run(plan, transport)`: carry a plan out. Transports are small; each moves one bucket of whole tensors at a time.

    for bucket in plan.buckets(max_bytes):     # every rank derives the same buckets
        transport.move(bucket)                 # copies, messages or file reads; elementwise casts only
        transport.finish()                     # what was moved has arrived everywhere: only now free a source
        after(bucket)                          # the caller's: free sources, acknowledge, count

Three live here: `InProcess` copies, `Distributed` messages (point to point over one axis), and safetensors files
(`files.py`). The Ray object store's is in actors/. What is derived from weights (fused FP8 scales, kernel repacks, low
precision copies of masters) is never moved: whoever owns it rebuilds it when `run` returns. A collective per tensor
(gather everywhere, keep a slice) was rejected: it moves a multiple of the floor and needs the whole tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch

from raytron.parallel.boxes import volume
from raytron.parallel.file_layout import file_layout, shards
from raytron.parallel.files import FileReader, FileWriter
from raytron.parallel.pieces import ITEMSIZE, Place
from raytron.parallel.planning import Move, Plan
from raytron.parallel.storage import Buffers, allocate, as_bytes, copy_, find, torch_dtype, view

__all__ = [
    "Buffers",
    "Distributed",
    "FileReader",
    "FileWriter",
    "InProcess",
    "Transport",
    "allocate",
    "file_layout",
    "run",
    "shards",
]

_ALIGN = 16  # bytes: every segment of a message starts where any dtype may be viewed


class Transport(Protocol):
    """What `run` needs. `move` carries out this process's part of a bucket; `finish` returns when everything moved so
    far has arrived at every target, and may be called more than once."""

    def move(self, bucket: Plan) -> None: ...

    def finish(self) -> None: ...


def run(
    plan: Plan, transport: Transport, max_bytes: int = 1 << 28, after: Callable[[Plan], None] | None = None
) -> None:
    """Carry out a plan bucket by bucket. Source and target storage must not overlap, except where they coincide.

    max_bytes: what one place may send, receive and copy in a bucket; bounds the staging memory.
    after: called with each bucket once every target has it (for freeing its sources); None waits only at the end.
    """
    for bucket in plan.buckets(max_bytes):
        transport.move(bucket)
        if after is not None:
            transport.finish()
            after(bucket)
    transport.finish()


def _copy_move(move: Move, source: torch.Tensor, target: torch.Tensor) -> None:
    """One copy inside this process; nothing where both ends are the same memory."""
    values, to = view(source, move.box, move.at), view(target, move.box, move.to)
    if values.data_ptr() == to.data_ptr() and values.stride() == to.stride() and values.dtype == to.dtype:
        return
    copy_(to, values)


class InProcess:
    """All places' buffers are tensors of this process: tests, conversion, a single process's own copies.

    sources, targets: (place, buffer) -> flat tensor (targets default to the sources: new buffers under new names).
    """

    def __init__(self, sources: Buffers, targets: Buffers | None = None):
        self._sources, self._targets = sources, sources if targets is None else targets

    def move(self, bucket: Plan) -> None:
        for move in bucket.moves:
            for src, dst in move.pairs():
                source, target = find(self._sources, src, move.at.buffer), find(self._targets, dst, move.to.buffer)
                _copy_move(move, source, target)

    def finish(self) -> None:
        """Copies have arrived when `move` returns."""


class Handle(Protocol):
    """A message under way."""

    def wait(self) -> None: ...


class Neighbours(Protocol):
    """The part of `collectives.Axis` that point-to-point transport needs."""

    index: int
    size: int

    def isend(self, tensor: torch.Tensor, dst: int) -> Handle: ...

    def irecv(self, tensor: torch.Tensor, src: int) -> Handle: ...

    def barrier(self) -> None: ...


class Distributed:
    """Point-to-point messages over one axis: one packed message per pair of ranks and bucket. Collective: every rank of
    the axis runs the same plan, and carries out its own part of it.

    axis: this rank's neighbours. index: place -> axis index, for every place of the plan (a rank may own several: its
    actor, its host memory, the files it writes). sources, targets: the buffers of this rank's places.
    """

    def __init__(self, axis: Neighbours, index: Mapping[Place, int], sources: Buffers, targets: Buffers | None = None):
        self._axis, self._index = axis, index
        self._sources, self._targets = sources, sources if targets is None else targets

    def move(self, bucket: Plan) -> None:
        local, sends, receives = self._mine(bucket)
        incoming = {peer: _Message(bucket, items, self._targets, "to") for peer, items in receives.items()}
        waits = {peer: self._axis.irecv(message.data, peer) for peer, message in incoming.items()}
        outgoing = {peer: _Message(bucket, items, self._sources, "at").pack() for peer, items in sends.items()}
        sent = [self._axis.isend(message.data, peer) for peer, message in outgoing.items()]
        for move, src, dst in local:
            source, target = find(self._sources, src, move.at.buffer), find(self._targets, dst, move.to.buffer)
            _copy_move(move, source, target)
        for peer, handle in waits.items():
            handle.wait()
            incoming.pop(peer).unpack()
        for handle in sent:
            handle.wait()

    def finish(self) -> None:
        """Every rank has received its part (each waited for its own)."""
        self._axis.barrier()

    def _mine(self, bucket: Plan):
        me, index = self._axis.index, self._index
        local: list[tuple[Move, Place, Place]] = []
        sends: dict[int, list[tuple[Move, Place]]] = {}
        receives: dict[int, list[tuple[Move, Place]]] = {}
        for move in bucket.moves:
            for src, dst in move.pairs():
                sender, receiver = self._rank_of(src, index), self._rank_of(dst, index)
                if sender == receiver == me:
                    local.append((move, src, dst))
                elif sender == me:
                    sends.setdefault(receiver, []).append((move, src))
                elif receiver == me:
                    receives.setdefault(sender, []).append((move, dst))
        return local, sends, receives

    @staticmethod
    def _rank_of(place: Place, index: Mapping[Place, int]) -> int:
        rank = index.get(place)
        if rank is None:
            raise ValueError(f"place {place!r} has no rank on this axis; add it to `index`, or plan without() it")
        return rank


class _Message:
    """The boxes one rank sends another in a bucket, in the plan's order, as one flat uint8 tensor.

    Both ends compute the same offsets. A single contiguous box of the wire's dtype is sent from, or received into, its
    own storage.
    """

    def __init__(self, bucket: Plan, items: list[tuple[Move, Place]], buffers: Buffers, end: str):
        self._segments: list[tuple[torch.Tensor, torch.dtype, int, int]] = []
        length = 0
        for move, place in items:
            spot, wire = getattr(move, end), bucket.wire(move.name)
            values = view(find(buffers, place, spot.buffer), move.box, spot)
            n = volume(move.box) * ITEMSIZE[wire]
            self._segments.append((values, torch_dtype(wire), length, n))
            length += -(-n // _ALIGN) * _ALIGN
        first, dtype, _, n = self._segments[0]
        self._direct = len(items) == 1 and first.dtype == dtype and first.is_contiguous()
        if self._direct:
            self.data = as_bytes(first)
        else:
            self.data = torch.empty(length if len(items) > 1 else n, dtype=torch.uint8, device=first.device)

    def _parts(self):
        for values, dtype, at, n in self._segments:
            yield values, self.data[at : at + n].view(dtype).view(values.shape)

    def pack(self) -> _Message:
        if not self._direct:
            for values, part in self._parts():
                copy_(part, values)
        return self

    def unpack(self) -> None:
        if not self._direct:
            for values, part in self._parts():
                copy_(values, part)
