"""The trainer's side of a weight push: one rank writes what it holds to where engines look for it. No Ray.

    connect(directories, nodes)      plan once: which rank writes which box of which node's shared directory
    publish(turn)                    collective: straight into the mapping of this rank's own node
    outgoing(node, message, delta)   what other nodes are to get from this rank, as messages for whoever carries them

Ranks on one GPU with the engines write nothing: `publish` then offers them its own memory.

The plan is the algebra's own: from where the ranks hold the tensors to one file a node, each element once, from a rank
of that node where one has it. The sums that `publish` returns are of the trainer's values in the engines' dtype,
each element once; so with those of all ranks combined every reader can prove that it holds what was trained.

Of a model with adapters, engines that have them too are sent everything once and the adapters from then on. Engines
that have none (vLLM) are sent merged weights, each time, from a buffer of their own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from raytron.checkpoint.huggingface import merged_layout
from raytron.models.base import ShardedModel
from raytron.parallel.boxes import Box, volume
from raytron.parallel.bulk import WRITE, WRITE_CHANGED, Bulk, Transfer
from raytron.parallel.changes import Sender, grouped
from raytron.parallel.checksum import checksum, combine
from raytron.parallel.device_memory import Exports, Offer
from raytron.parallel.file_layout import shards
from raytron.parallel.layout import Layout, Move, Place, Spec, only, owners, plan, relabel, union
from raytron.parallel.shared import SharedWeights
from raytron.parallel.storage import torch_dtype, view

__all__ = ["Outgoing", "Published", "Publisher"]

Outgoing = Mapping[str, Sequence[Sequence[tuple[str, Box]]]]
"""node -> for each message to it the boxes it holds."""


@dataclass(frozen=True)
class Published:
    """What one rank did. nbytes: its share of what was pushed, each element counted on one rank. checksums: of that
    share. messages: node -> numbers of the messages that carry what was pushed. offers: engine -> where it finds this
    rank's weights on its own GPU."""

    nbytes: int
    seconds: float
    checksums: Mapping[str, int]
    messages: Mapping[str, Sequence[int]]
    offers: Mapping[int, Offer] = field(default_factory=dict)


@dataclass
class _Share:
    """Some of a rank's moves: those it counts, into its node's mapping, and as messages to other nodes."""

    counted: Sequence[Move]
    nbytes: int
    bulk: Bulk | None
    messages: Mapping[str, Sequence[int]]


class Publisher:
    """One rank's part in pushes of a model.

    Args:
        model: this rank's part, whose `weights` are read at each push.
    """

    def __init__(self, model: ShardedModel) -> None:
        self._model = model
        self._shared: SharedWeights | None = None
        self._shares: list[_Share] = []
        self._senders: dict[str, list[Sender]] = {}
        self._exports: Exports | None = None

    def connect(
        self,
        directories: Mapping[str, str],
        nodes: Sequence[str],
        dtype: str,
        adapters: bool = False,
        consumers: Mapping[int, str] | None = None,
    ) -> Outgoing:
        """Plan pushes from now on; the first one is whole.

        Args:
            directories: node -> path of its `SharedDirectory`.
            nodes: of each rank.
            dtype: of the tensors there, torch's name.
            adapters: whether a model's adapters are there beside its weights, not merged into them.
            consumers: instead of directories, each engine's GPU: pushes are offers of this rank's own memory then
                (`parallel.device_memory`).

        Returns the messages that other nodes will need from this rank.

        Raises:
            ValueError: the directory's tensors are not the model's; names one.
        """
        model, here = self._model, nodes[self._model.world.rank]
        self._dtype, self._merges = torch_dtype(dtype), model.adapted and not adapters
        self._weights = model.weights.detach().clone() if self._merges else model.weights
        self._at, self._layout = model.weights.data_ptr(), merged_layout(model) if self._merges else model.layout()
        self._exports = Exports(self._weights, self._held(self._layout), consumers) if consumers else None
        if consumers:
            self._owned = self._held(owners(self._layout))
            return {}
        first = next(iter(directories))
        self._shared, self._local_counts = None, here == first
        if here in directories:
            self._shared = SharedWeights(directories[here])
        self._slot = nodes[: model.world.rank].count(here)
        self._tells = self._shared is not None and self._shared.progress.writers > 0
        if self._tells:
            self._shared.progress.begin(self._slot)
        changing = self._layout if self._merges else model.trained_layout()
        moves = self._moves(list(directories), nodes, dtype)
        outgoing: dict[str, list[Sequence[tuple[str, Box]]]] = {node: [] for node in moves if node != here}
        self._senders = {node: [] for node in outgoing}
        # What every push changes, then what only the first brings.
        names = changing.tensors.keys(), self._layout.tensors.keys() - changing.tensors.keys()
        self._shares = [self._share(moves, outgoing, of, first, here) for of in names if of]
        self._first = True
        return outgoing

    def _share(
        self,
        moves: Mapping[str, Sequence[Move]],
        outgoing: dict[str, list[Sequence[tuple[str, Box]]]],
        names: Collection[str],
        first: str,
        here: str,
    ) -> _Share:
        """The part of some tensors in `moves`; its messages are added to `outgoing`."""
        mine = {node: [move for move in theirs if move.name in names] for node, theirs in moves.items()}
        numbers: dict[str, Sequence[int]] = {}
        for node in outgoing:
            spots = {(move.name, move.box): move.at for move in mine[node]}
            messages, begun = grouped(list(spots), self._dtype.itemsize), len(outgoing[node])
            outgoing[node] += messages
            numbers[node] = range(begun, len(outgoing[node]))
            self._senders[node] += [
                Sender([view(self._weights, box, spots[name, box]) for name, box in boxes], self._dtype)
                for boxes in messages
            ]
        counted = mine.get(first, ())
        nbytes = sum(volume(move.box) for move in counted) * self._dtype.itemsize
        bulk = self._shared.bulk(list(map(self._transfer, mine.get(here, ())))) if self._shared else None
        return _Share(counted, nbytes, bulk, numbers)

    def _moves(self, targets: Sequence[str], nodes: Sequence[str], dtype: str) -> dict[str, list[Move]]:
        """This rank's moves to each node."""
        source, me = self._layout, f"rank-{self._model.world.rank}"
        specs = {name: replace(spec, dtype=dtype) for name, spec in source.tensors.items()}
        self._check(specs)
        file = shards(specs, max_bytes=1 << 62, version=source.version)
        ((place, _), *_) = file.sizes
        target = union(*(relabel(file, {place: f"file-of-{node}"}) for node in targets))
        node_of: dict[Place, str] = {f"file-of-{node}": node for node in targets}
        node_of |= {f"rank-{rank}": node for rank, node in enumerate(nodes)}
        moves: dict[str, list[Move]] = {}
        for move in plan(source, target, node_of.__getitem__).moves:
            for src, dst in move.pairs():
                if src == me:
                    moves.setdefault(node_of[dst], []).append(move)
        return moves

    def _check(self, specs: Mapping[str, Spec]) -> None:
        theirs = specs if self._shared is None else self._shared.specs
        for name in sorted({*specs, *theirs}):
            if specs.get(name) != theirs.get(name):
                raise ValueError(
                    f"{name}: the trainer has {specs.get(name)} and the engines' directory {theirs.get(name)}; start "
                    "the engines from the config.json of the model that is trained"
                )

    def publish(self, turn: int, delta: bool = False) -> Published:
        """Write this rank's share into its node's mapping, as push number `turn`, above the last one's.

        Readers are told how far it is, and in the end what it has written sums to (`progress`).

        delta: leave what is there already as it is, so that engines copy less; the result has the same bits.
        """
        assert self._model.weights.data_ptr() == self._at, "the model's weights have moved; connect again"
        start = time.perf_counter()
        if self._merges:
            self._model.merge_(self._weights.copy_(self._model.weights.detach()))
        if self._exports is not None:
            return self._offer(start)
        shares = self._shares if self._first else self._shares[:1]
        here = [pair for share in shares for pair in self._write(share, turn, delta, alone=len(shares) == 1)]
        if self._tells:
            self._shared.progress.seal(self._slot, turn, _by_name(here))
        # Of what is not on this node, or counted on another one, only the trainer's values can be summed up.
        sums = here if self._local_counts else [(m.name, self._sum(m)) for share in shares for m in share.counted]
        nbytes = sum(share.nbytes for share in shares)
        messages = {node: [n for share in shares for n in share.messages[node]] for node in self._senders}
        self._first = False
        return Published(nbytes, time.perf_counter() - start, _by_name(sums), messages)

    def _offer(self, start: float) -> Published:
        """Publish to engines of this rank's own device."""
        sums, nbytes, offers = [], 0, self._exports.offer()
        for name, piece in self._owned:
            values = view(self._weights, piece.box, piece.spot()).to(self._dtype)
            sums.append((name, checksum(values, piece.box, self._layout.tensors[name].shape)))
            nbytes += values.nbytes
        return Published(nbytes, time.perf_counter() - start, _by_name(sums), {}, offers)

    def _held(self, layout: Layout) -> Layout:
        """This rank's part."""
        return only(layout, places=[f"rank-{self._model.world.rank}"])

    def _write(self, share: _Share, turn: int, delta: bool, alone: bool) -> list[tuple[str, int]]:
        """Write a share; (tensor, checksum) of each part. alone: no other one follows, whose blocks lie between."""
        if share.bulk is None:
            return []
        progress, rest = self._shared.progress, share.bulk.rest
        reached = [*share.bulk.starts, progress.blocks] if alone else [0] * (len(rest) + 1)
        pace = progress.writing(self._slot, turn, reached[0]) if self._tells else None
        sums = share.bulk.run(WRITE_CHANGED if delta else WRITE, turn, pace).sums
        for transfer, blocks in zip(rest, reached[1:], strict=True):
            written = self._shared.write(transfer.name, transfer.box, transfer.source, turn, delta)
            sums.append((transfer.name, written))
            if self._tells:
                progress.reach(self._slot, turn, blocks)
        return sums

    def _transfer(self, move: Move) -> Transfer:
        shared = self._shared
        to = shared.part(move.name, move.box)
        return Transfer(move.name, move.box, shared.specs[move.name].shape, to, self._view(move))

    def _view(self, move: Move) -> Tensor:
        return view(self._weights, move.box, move.at)

    def _sum(self, move: Move) -> int:
        """The checksum of a box as it is sent."""
        return checksum(self._view(move).to("cpu", self._dtype), move.box, self._layout.tensors[move.name].shape)

    def outgoing(self, node: str, message: int, delta: bool = False) -> np.ndarray:
        """uint8 [bytes]: one of the messages that `connect` announced, of the weights as they are now."""
        return self._senders[node][message].message(delta)


def _by_name(sums: Iterable[tuple[str, int]]) -> dict[str, int]:
    return combine({name: part} for name, part in sums)
