"""Data or hardware? A step whose numbers are doubted is run again before anybody votes on it.

    first run        doubted: not finite, or a gradient norm far beyond its recent history
    in place         the same micro-batches on the same ranks. Good now: a moment's error of whoever differs
    elsewhere        every replica takes those of the next one. The same bits: it is the data, or the model, and the
                     step is skipped or applied as it would have been. Other bits: whose are not finite, or larger, is
                     hardware that is wrong again and again
    once more        in place, but the wrong replica gets its gradients from one that made them elsewhere

All is compared by rank, with that of the rank at the same place in the other replica. Nothing is kept for it while all
is well: after a reduction most of a rank's own gradients still lie in its buffer (ZeRO overwrites its own shard only),
which is what the first run is known by. A number in that shard is the owner's own if nobody else's differ, since
everyone else still has what it added there. With twins another rank's part is overwritten too, and without ZeRO
everything: then several ranks may be named, unless the loss tells.

Repeated work gives the same bits on a CPU: sums have a fixed order, at one number of threads and on one kind of
processor. On a GPU atomic additions have none, so norms and losses are compared instead (`guard.tolerance`), and two
runs that are both not finite count as alike.

Rejected: to keep every rank's gradients, or their checksum, of every step: a pass over all gradients each time.
"""

from __future__ import annotations

import hashlib
import math
import os
import socket
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raytron.data.loader import MicroBatch
from raytron.models.base import ALIGN
from raytron.parallel.checksum import checksum
from raytron.parallel.collectives import Axis
from raytron.parallel.data import twin_position
from raytron.parallel.mesh import Mesh
from raytron.parallel.messages import gather
from raytron.training.agreement import reconcile
from raytron.training.commit import Vote
from raytron.training.guard import Verdict, square_sum

if TYPE_CHECKING:
    from raytron.training.engine import TrainEngine

__all__ = ["Elsewhere", "Reading", "Recheck", "Trace", "compare_elsewhere", "differed_in_place"]

GPU_TOLERANCE = 1e-3
MESSAGE = 1 << 24  # elements of a gradient buffer sent at once


@dataclass(frozen=True)
class Reading:
    """What some numbers are known by: a digest of their bits, their norm, and the loss they came with."""

    digest: str
    norm: float
    loss: float

    @property
    def finite(self) -> bool:
        """Whether all of them are."""
        return math.isfinite(self.norm) and math.isfinite(self.loss)

    def like(self, other: Reading, tolerance: float) -> bool:
        """Whether the two may be of the same work: equal bits, or with a tolerance close norms and losses."""
        if self.digest == other.digest:
            return True
        if not tolerance or self.finite != other.finite:
            return False
        return not self.finite or all(
            math.isclose(a, b, rel_tol=tolerance) for a, b in ((self.norm, other.norm), (self.loss, other.loss))
        )


@dataclass(frozen=True)
class Trace:
    """What a reduction leaves on a rank: of its own numbers, and the sums in its own shard."""

    own: Reading
    summed: Reading


@dataclass(frozen=True)
class Elsewhere:
    """What came of running micro-batches on another replica.

    ranks: whose numbers were wrong. replica: the only one whose own gradients are to be replaced by what the replica
    before it made of its micro-batches; None where none are, or there is nothing to replace them by. sure: it could be
    told whose of two different numbers were wrong.
    """

    ranks: tuple[int, ...]
    replica: int | None
    sure: bool = True


def differed_in_place(
    mesh: Mesh, before: Sequence[Trace], after: Sequence[Trace], hidden: Sequence[Sequence[int]], tolerance: float
) -> tuple[int, ...]:
    """Ranks whose numbers were others the second time. Pure.

    before, after: by rank. hidden: by rank, whose additions to its shard are not to be seen in their own numbers.
    """
    known, possible = set(), set()
    for line in mesh.groups("dp"):
        own = {rank for rank in line if not before[rank].own.like(after[rank].own, tolerance)}
        known |= own
        if not own:
            summed = [rank for rank in line if not before[rank].summed.like(after[rank].summed, tolerance)]
            possible |= {other for rank in summed for other in hidden[rank]}
    replicas = {rank // mesh.unit for rank in known}  # one that is known to be wrong explains what is not
    return tuple(sorted(known | {rank for rank in possible if not replicas or rank // mesh.unit in replicas}))


def compare_elsewhere(mesh: Mesh, own: Sequence[Reading], moved: Sequence[Reading], tolerance: float) -> Elsewhere:
    """Who computes wrong numbers, given what every rank made of its replica's micro-batches, and of the next one's.
    Pure."""
    wrong: set[int] = set()
    bad, unsure = set(), False
    for replica in range(mesh.dp):
        here, there = (range(at * mesh.unit, (at + 1) * mesh.unit) for at in (replica, (replica - 1) % mesh.dp))
        differ = [(a, b) for a, b in zip(here, there, strict=True) if not own[a].like(moved[b], tolerance)]
        if not differ:
            continue
        sizes = [_size(own[rank] for rank in here), _size(moved[rank] for rank in there)]
        if sizes[0] == sizes[1]:  # both are not finite, or it is nothing that a norm shows
            wrong |= {rank for pair in differ for rank in pair}
            unsure = True
            continue
        is_own = sizes[0] > sizes[1]
        bad |= {replica} if is_own else set()
        wrong |= {pair[not is_own] for pair in differ}
    return Elsewhere(tuple(sorted(wrong)), bad.pop() if len(bad) == 1 and not unsure else None, not unsure)


def _size(readings: Iterable[Reading]) -> float:
    """The norm of a replica's numbers, infinite where they are not finite."""
    return math.hypot(*(reading.norm if reading.finite else math.inf for reading in readings))


class Recheck:
    """Of one doubted step. Collective over the world; every rank comes to the same verdict.

    Args:
        engine: which has run the step, and not passed its vote.
        batches: this rank's micro-batches.
        vote: that was not passed.
    """

    def __init__(self, engine: TrainEngine, batches: Sequence[MicroBatch], vote: Vote) -> None:
        self._engine, self._own, self._first = engine, engine.placed(batches), vote
        self._what, self._mesh, self._dp = engine.doubt(vote), engine.world.mesh, engine.world.axis("dp")
        given, device = engine.config.guard.tolerance, engine.world.device
        self._tolerance = given if given is not None else 0.0 if device.type == "cpu" else GPU_TOLERANCE

    def run(self, counts: Tensor) -> tuple[Vote, Verdict]:
        """The vote that is passed in the end, and what was found out.

        Raises ReplicasDisagree where the cause are weights that were spoilt, and nobody can say which are right.
        """
        engine, before = self._engine, self._trace(counts)
        counts = self._compute(self._own)
        own = self._read(counts, [(0, engine.grads.numel())])
        engine.reduce()
        after = self._trace(counts)
        vote = engine.vote(counts, last=False)
        said = self._said({"before": _rows(before), "after": _rows(after)})
        traces = [[_trace(row[when]) for row in said] for when in ("before", "after")]
        differed = differed_in_place(self._mesh, *traces, self._hidden(), self._tolerance)
        digests = {rank: (_digest(traces[0][rank]), _digest(traces[1][rank])) for rank in differed}
        sure = len({rank // self._mesh.unit for rank in differed}) == 1
        if engine.passed:
            return vote, self._hardware(differed, said, digests, sure=sure, mended=True)
        if self._mesh.dp > 1:
            return self._elsewhere(own)
        vote = engine.vote(counts)
        if differed:
            return vote, self._hardware(differed, said, digests, sure=sure)
        return vote, Verdict("data", self._what, compared=False)

    def _elsewhere(self, own: Reading) -> tuple[Vote, Verdict]:
        theirs = self._engine.placed(take_next(self._dp, self._own))
        moved = self._read(self._compute(theirs), [(0, self._engine.grads.numel())])
        said = self._said({"own": _row(own), "moved": _row(moved)})
        owns, moveds = ([Reading(*row[name]) for row in said] for name in ("own", "moved"))
        found = compare_elsewhere(self._mesh, owns, moveds, self._tolerance)
        if not found.ranks:
            return self._settle(theirs, None), Verdict("data", self._what)
        spoilt = reconcile(self._engine)  # wrong weights are wrong again and again, too
        vote = self._settle(theirs, None if spoilt else found.replica)
        if spoilt is not None:
            return vote, spoilt
        digests = {rank: self._pair(rank, owns, moveds) for rank in found.ranks}
        mended = vote.skip is None and found.replica is not None
        return vote, self._hardware(found.ranks, said, digests, sure=found.sure, lasting=True, mended=mended)

    def _pair(self, rank: int, owns: Sequence[Reading], moveds: Sequence[Reading]) -> tuple[str, str]:
        """Digests of the numbers of `rank` that differed, and of another's for the same work."""
        size, unit = self._mesh.size, self._mesh.unit
        own = owns[rank].digest, moveds[(rank - unit) % size].digest
        return own if own[0] != own[1] else (moveds[rank].digest, owns[(rank + unit) % size].digest)

    def _settle(self, theirs: Sequence[MicroBatch], replica: int | None) -> Vote:
        """The step once more, to a vote that is passed whatever comes out. The gradients of `replica` are made by the
        one before it and sent, not added to that one's own: so the sums have their usual order."""
        engine, at = self._engine, self._dp.index
        if at == replica:
            counts = self._receive((replica - 1) % self._dp.size)
        else:
            if replica is not None and at == (replica - 1) % self._dp.size:
                self._send(self._compute(theirs), replica)
            counts = self._compute(self._own)
        engine.reduce()
        return engine.vote(counts)

    def _compute(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Gradients of this replica, not reduced, and its counts."""
        return self._engine.count(self._engine.accumulate(batches), batches)

    def _send(self, counts: Tensor, replica: int) -> None:
        parts = [counts, *self._engine.grads.split(MESSAGE)]
        for handle in [self._dp.isend(part, replica) for part in parts]:
            handle.wait()

    def _receive(self, replica: int) -> Tensor:
        counts = torch.empty(2 + len(self._engine.objective.sums), dtype=torch.float64)
        for part in (counts, *self._engine.grads.split(MESSAGE)):
            self._dp.irecv(part, replica).wait()
        return counts

    def _trace(self, counts: Tensor) -> Trace:
        engine = self._engine
        edges = [0, *(edge for interval in sorted(engine.intervals) for edge in interval), engine.grads.numel()]
        rest = [(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
        return Trace(self._read(counts, rest), self._read(counts[:0], engine.shard))

    def _read(self, counts: Tensor, intervals: Sequence[tuple[int, int]]) -> Reading:
        """Of these parts of the gradients, and of the counts that belong to them."""
        parts = [self._engine.grads[a:b] for a, b in intervals]
        sums = [checksum(part.view(-1, ALIGN)) for part in parts]
        text = ",".join(map(str, sums)).encode() + counts.numpy().tobytes()
        squares = sum(float(square_sum(part)) for part in parts)
        loss = float(counts[0]) if counts.numel() else 0.0
        return Reading(hashlib.blake2b(text, digest_size=8).hexdigest(), math.sqrt(squares), loss)

    def _hidden(self) -> list[tuple[int, ...]]:
        """By rank, whose additions to its shard were overwritten with it."""
        engine, mesh = self._engine, self._mesh
        lines = {rank: line for line in mesh.groups("dp") for rank in line}
        if not engine.scatter:
            return [lines[rank] for rank in range(mesh.size)]
        twin = {rank: line[twin_position(i, mesh.dp)] for line in mesh.groups("dp") for i, rank in enumerate(line)}
        return [(rank, twin[rank]) if engine.twins else (rank,) for rank in range(mesh.size)]

    def _said(self, what: dict[str, Any]) -> list[dict[str, Any]]:
        """What every rank says, and who it is."""
        return gather(self._engine.world.axis("world"), {"host": [socket.gethostname(), os.getpid()], **what})

    def _hardware(
        self, ranks: tuple[int, ...], said: Sequence[dict], digests: dict[int, tuple[str, str]], **how: bool
    ) -> Verdict:
        hosts = tuple((said[rank]["host"][0], said[rank]["host"][1]) for rank in ranks)
        return Verdict("hardware", self._what, ranks, hosts, digests=digests, **how)


def take_next(axis: Axis, batches: Sequence[MicroBatch]) -> list[MicroBatch]:
    """The micro-batches of the next position on the axis, on the CPU. Collective."""
    flat = [_tensors(batch) for batch in batches]
    shapes = [{name: (list(t.shape), _name(t.dtype)) for name, t in tensors.items()} for tensors in flat]
    before, after = (axis.index - 1) % axis.size, (axis.index + 1) % axis.size
    wanted = gather(axis, shapes)[after]
    parts = [tensor.reshape(-1).view(torch.uint8) for tensors in flat for tensor in tensors.values()]
    sent = axis.isend(torch.cat(parts), before) if parts else None
    taken = []
    sizes = [[math.prod(shape) * getattr(torch, dtype).itemsize for shape, dtype in s.values()] for s in wanted]
    data = torch.empty(sum(map(sum, sizes)), dtype=torch.uint8)
    if wanted:
        axis.irecv(data, after).wait()
    for shape_of, lengths in zip(wanted, sizes, strict=True):
        pieces, data = data[: sum(lengths)].split(lengths), data[sum(lengths) :]
        tensors = {
            name: piece.clone().view(getattr(torch, dtype)).view(shape)
            for (name, (shape, dtype)), piece in zip(shape_of.items(), pieces, strict=True)
        }
        taken.append(_batch(tensors))
    if sent is not None:
        sent.wait()
    return taken


FIELD = "fields_BS/"


def _tensors(batch: MicroBatch) -> dict[str, Tensor]:
    own = {name: tensor for name, tensor in vars(batch).items() if name != "fields_BS" and tensor is not None}
    fields = {FIELD + name: tensor for name, tensor in batch.fields_BS.items()}
    return {name: tensor.cpu().contiguous() for name, tensor in (own | fields).items()}


def _batch(tensors: dict[str, Tensor]) -> MicroBatch:
    fields = {name.removeprefix(FIELD): tensor for name, tensor in tensors.items() if name.startswith(FIELD)}
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(FIELD)}
    return MicroBatch(**own, fields_BS=fields)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _row(reading: Reading) -> list[Any]:
    return [reading.digest, reading.norm, reading.loss]


def _rows(trace: Trace) -> list[list[Any]]:
    return [_row(trace.own), _row(trace.summed)]


def _trace(rows: list[list[Any]]) -> Trace:
    return Trace(*(Reading(*row) for row in rows))


def _digest(trace: Trace) -> str:
    return f"{trace.own.digest}/{trace.summed.digest}"
