"""The trainer's side of a weight push: one rank writes what it holds to where engines look for it. No Ray.

    connect(directories, nodes)      plan once: which rank writes which box of which node's shared directory
    publish(turn)                    collective: straight into the mapping of this rank's own node
    outgoing(node, message, delta)   what other nodes are to get from this rank, as messages for whoever carries them

The plan is the algebra's own: from where the ranks hold the tensors to one file a node, each element once, from a rank
of that node where one has it. The sums that `publish` returns are of the trainer's values in the engines' dtype,
each element once; so with those of all ranks combined every reader can prove that it holds what was trained.

Of a model with adapters, engines that have them too are sent everything once and the adapters from then on. Engines
that have none (vLLM) are sent merged weights, each time, from a buffer of their own.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from raytron.checkpoint.huggingface import merged_layout
from raytron.models.base import ShardedModel
from raytron.parallel.boxes import Box, volume
from raytron.parallel.bulk import WRITE, WRITE_CHANGED, Bulk, Transfer
from raytron.parallel.changes import Sender, grouped
from raytron.parallel.checksum import checksum, combine
from raytron.parallel.file_layout import shards
from raytron.parallel.layout import Move, Place, Spec, plan, relabel, union
from raytron.parallel.shared import SharedWeights
from raytron.parallel.storage import torch_dtype, view

__all__ = ["Outgoing", "Published", "Publisher"]

Outgoing = Mapping[str, Sequence[Sequence[tuple[str, Box]]]]
"""node -> for each message to it the boxes it holds."""


@dataclass(frozen=True)
class Published:
    """What one rank did. nbytes: its share of what was pushed, each element counted on one rank. checksums: of that
    share. messages: node -> numbers of the messages that carry what was pushed."""

    nbytes: int
    seconds: float
    checksums: Mapping[str, int]
    messages: Mapping[str, Sequence[int]]


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

    def connect(
        self, directories: Mapping[str, str], nodes: Sequence[str], dtype: str, adapters: bool = False
    ) -> Outgoing:
        """Plan pushes from now on; the first one is whole.

        Args:
            directories: node -> path of its `SharedDirectory`.
            nodes: of each rank.
            dtype: of the tensors there, torch's name.
            adapters: whether a model's adapters are there beside its weights, not merged into them.

        Returns the messages that other nodes will need from this rank.

        Raises:
            ValueError: the directory's tensors are not the model's; names one.
        """
        model, (first, *_) = self._model, directories
        here = nodes[model.world.rank]
        self._shared = SharedWeights(directories[here]) if here in directories else None
        self._dtype, self._merges = torch_dtype(dtype), model.adapted and not adapters
        self._weights = model.weights.detach().clone() if self._merges else model.weights
        self._local_counts, self._at = here == first, model.weights.data_ptr()
        self._layout = merged_layout(model) if self._merges else model.layout()
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

        delta: leave what is there already as it is, so that engines copy less; the result has the same bits.
        """
        assert self._model.weights.data_ptr() == self._at, "the model's weights have moved; connect again"
        start = time.perf_counter()
        if self._merges:
            self._model.merge_(self._weights.copy_(self._model.weights.detach()))
        shares = self._shares if self._first else self._shares[:1]
        sums = [pair for share in shares for pair in self._publish(share, turn, delta)]
        nbytes = sum(share.nbytes for share in shares)
        messages = {node: [n for share in shares for n in share.messages[node]] for node in self._senders}
        self._first = False
        checksums = combine({name: part} for name, part in sums)
        return Published(nbytes, time.perf_counter() - start, checksums, messages)

    def _publish(self, share: _Share, turn: int, delta: bool) -> list[tuple[str, int]]:
        """Write a share; (tensor, checksum) of what this rank counts."""
        sums: list[tuple[str, int]] = []
        if share.bulk is not None:
            sums, _ = share.bulk.run(WRITE_CHANGED if delta else WRITE, turn)
            for rest in share.bulk.rest:
                sums.append((rest.name, self._shared.write(rest.name, rest.box, rest.source, turn, delta)))
        return sums if self._local_counts else [(move.name, self._sum(move)) for move in share.counted]

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
