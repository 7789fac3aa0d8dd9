"""Do replicas still hold the same numbers? Compared by checksum; what most of them hold is right.

    weights                 one copy on every data-parallel rank
    optimizer's state       a copy on every rank without ZeRO, two with twins, else one, which nobody can check

It is done between a step's gradients and its vote: whatever was wrong when the step used it is found before anything
is made of it, so the batch is simply done again with what is right. Looking after the update would be too late: with
ZeRO a wrong number in a rank's own shard has then been gathered by all others, and everyone agrees on it.

A rank whose numbers are the odd ones has them overwritten by a peer's where it sits; its own part of the optimizer's
state may have no other copy, and it is the controller's affair whether to go on trusting it. With two copies, or no
majority, nobody can say who is right: `ReplicasDisagree`, and whoever directs the ranks goes back to a checkpoint.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from raytron.models.base import ALIGN, rank_name
from raytron.parallel.checksum import checksum
from raytron.parallel.data import twin_position
from raytron.parallel.layout import only
from raytron.parallel.mesh import Mesh
from raytron.parallel.messages import gather
from raytron.parallel.storage import view
from raytron.training.guard import ReplicasDisagree, Verdict

if TYPE_CHECKING:
    from raytron.training.engine import TrainEngine

__all__ = ["Copies", "copies", "reconcile"]

NAMED = 3  # tensors and ranks that a message names


@dataclass(frozen=True)
class Copies:
    """Checksums of what several ranks hold alike: `sums` by rank, of the buffer `name`."""

    name: str
    sums: Mapping[int, int]

    @property
    def agree(self) -> bool:
        """Whether all are one."""
        return len(set(self.sums.values())) == 1

    @property
    def right(self) -> int | None:
        """The checksum of more than half of them, None where there is none."""
        (found, count), *_ = Counter(self.sums.values()).most_common(1)
        return found if 2 * count > len(self.sums) else None

    @property
    def odd(self) -> tuple[int, ...]:
        """Ranks that hold something else than most do; all of them where no majority is."""
        return tuple(sorted(rank for rank, value in self.sums.items() if value != self.right))


def copies(
    mesh: Mesh, common: Sequence[str], mirrored: Sequence[str], rows: Sequence[Sequence[int]]
) -> Iterator[Copies]:
    """Who holds what alike. Pure.

    common: buffers that every data-parallel rank holds. mirrored: buffers whose shards have a twin. rows: by rank, the
    checksums of its common buffers, then of its own shards, then of those it mirrors.
    """
    first, second = len(common), len(common) + len(mirrored)
    for line in mesh.groups("dp"):
        for k, name in enumerate(common):
            yield Copies(name, {rank: rows[rank][k] for rank in line})
        for i, rank in enumerate(line):
            twin = line[twin_position(i, len(line))]
            for k, name in enumerate(mirrored):
                yield Copies(name, {rank: rows[rank][first + k], twin: rows[twin][second + k]})


def reconcile(engine: TrainEngine) -> Verdict | None:
    """Compare what replicas hold in common, and overwrite what few hold by what most do. Collective; between a step's
    gradients and its vote. None where all agree: then it costs a pass over the data and one small all-gather.

    Raises, on every rank alike, ReplicasDisagree where no majority says who is right.
    """
    mesh = engine.world.mesh
    if mesh.dp == 1:
        return None
    common, mirrored = _buffers(engine)
    rows = _gathered(engine, [*common.values(), *(part for k in (0, 1) for part in _halves(engine, mirrored, k))])
    differ = [found for found in copies(mesh, [*common], mirrored, rows) if not found.agree]
    if not differ:
        return None
    known = all(found.right is not None for found in differ)
    if known and any(engine.world.rank in found.odd for found in differ):
        engine.tear()
    said = gather(engine.world.axis("world"), _details(engine, differ))
    verdict = _verdict(differ, said, known)
    if not known:
        step = engine.counters.step + 1
        raise ReplicasDisagree(f"at step {step} {verdict.tensor}, and no majority says who is right")
    for found in differ:
        _bring(engine, found, common[found.name])
    return verdict


def _buffers(engine: TrainEngine) -> tuple[dict[str, Tensor], list[str]]:
    """(what every data-parallel rank holds alike, names of the optimizer's tensors that have twins)."""
    common, state = {"weights": engine.model.weights}, engine.optimizer
    if engine.twins:
        return common, list(state)
    return common | ({} if engine.scatter else state), []


def _halves(engine: TrainEngine, names: Sequence[str], half: int) -> list[Tensor]:
    """Of the optimizer's tensors: what this rank owns, or (1) what it mirrors."""
    return [engine.optimizer[name][slice(engine.owned, None) if half else slice(engine.owned)] for name in names]


def _gathered(engine: TrainEngine, parts: Sequence[Tensor]) -> list[list[int]]:
    """Checksums of `parts`, by rank."""
    sums = [checksum(part.view(-1, ALIGN)) for part in parts]
    words = torch.tensor([[value - (value >> 63 << 64) for value in sums]])  # as int64
    return engine.world.axis("world").all_gather(words).tolist()


def _details(engine: TrainEngine, differ: Sequence[Copies]) -> dict:
    """JSON-ready: who this rank is, and where it differs from others the checksum of every piece, by name and box."""
    rank, pieces = engine.world.rank, {}
    for name in dict.fromkeys(found.name for found in differ if rank in found.sums):
        weights = name == "weights"
        layout = engine.model.layout() if weights else engine.optimizer_layout()
        flat = engine.model.weights if weights else engine.optimizer[name]
        sums = {}
        for tensor, piece in only(layout, places=[rank_name(rank)]):
            sums[f"{tensor} {piece.box}"] = checksum(
                view(flat, piece.box, piece.spot()), piece.box, layout.tensors[tensor].shape
            )
        pieces[name] = sums
    return {"host": [socket.gethostname(), os.getpid()], "pieces": pieces}


def _verdict(differ: Sequence[Copies], said: Sequence[Mapping], known: bool) -> Verdict:
    digests = {}
    for found in differ:
        for rank in found.odd:
            other = next(
                value for value in (found.right, *found.sums.values()) if value not in (None, found.sums[rank])
            )
            digests[rank] = (_hex(found.sums[rank]), _hex(other))
    ranks = tuple(sorted(digests))
    return Verdict(
        "hardware",
        "replicas differ",
        ranks,
        tuple((said[rank]["host"][0], said[rank]["host"][1]) for rank in ranks),
        sure=known,
        mended=known,
        tensor="; ".join(_named(found, said) for found in differ[:NAMED]),
        digests=digests,
    )


def _named(found: Copies, said: Sequence[Mapping]) -> str:
    """Which tensors of a buffer differ, and between whom."""
    held = {rank: said[rank]["pieces"][found.name] for rank in found.sums}
    shared = set.intersection(*(set(sums) for sums in held.values()))
    tensors = dict.fromkeys(
        piece.partition(" ")[0]
        for piece in next(iter(held.values()))
        if piece in shared and len({sums[piece] for sums in held.values()}) > 1
    )
    more = f" and {len(tensors) - NAMED} more" if len(tensors) > NAMED else ""
    which = (", ".join([*tensors][:NAMED]) or "padding") + more
    who = ", ".join(f"rank {rank} ({said[rank]['host'][0]}, pid {said[rank]['host'][1]})" for rank in found.odd)
    if found.right is None:
        return f"{found.name} of {which} differ between {who}"
    return f"{found.name} of {which} on {who} are not those of {len(found.sums) - len(found.odd)} replicas"


def _bring(engine: TrainEngine, found: Copies, flat: Tensor) -> None:
    """Overwrite this rank's copy by a right one, if it is odd, or send it to those who are."""
    rank, mesh = engine.world.rank, engine.world.mesh
    if rank not in found.sums:
        return
    axis = engine.world.axis("dp")
    giver = min(holder for holder, value in found.sums.items() if value == found.right)
    if rank == giver:
        for handle in [axis.isend(flat, mesh.coords(odd).dp) for odd in found.odd]:
            handle.wait()
    elif rank in found.odd:
        axis.irecv(flat, mesh.coords(giver).dp).wait()


def _hex(value: int) -> str:
    return f"{value % 2**64:016x}"
