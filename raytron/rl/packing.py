"""From a flat batch to the micro-batches of a rank: who trains which trajectory, and in which rows of tokens.

    Batch --distribute--> dp ranks --pack--> rows --micro_batches--> MicroBatch

All of it is a pure function of the trajectories' lengths, so every rank computes the same and nobody sends anything. A
token's weight is in the batch already (reductions.py), so no way of cutting changes the gradient.

Two forms. *Padded*: trajectories of similar length side by side, one a row; plain causal attention. *Packed*: several
behind each other in one row with document ids, first fit by decreasing length; nothing is padded, but attention needs a
mask, which on a CPU costs more than the padding of sorted rows (and nothing where lengths differ wildly).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from raytron.data.loader import MicroBatch
from raytron.data.packing import first_fit, lay
from raytron.rl.types import Batch

__all__ = ["distribute", "micro_batches", "pack"]

Rows = list[list[int]]  # trajectories by row of a micro-batch


def distribute(lengths: np.ndarray, ranks: int) -> list[list[int]]:
    """Trajectories of each of `ranks`: longest first, each to whoever has the fewest tokens (Graham 1969, LPT)."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for row in np.argsort(-lengths, kind="stable").tolist():
        least = min(range(ranks), key=loads.__getitem__)
        shares[least].append(row)
        loads[least] += int(lengths[row])
    return shares


def pack(lengths: np.ndarray, rows: Sequence[int], budget: int, packed: bool) -> list[Rows]:
    """Trajectories `rows` in micro-batches of at most `budget` tokens (more only for a single longer trajectory)."""
    ordered = sorted(rows, key=lambda row: (-lengths[row], row))
    if not packed:
        out: list[Rows] = []
        for row in ordered:
            if not out or (len(out[-1]) + 1) * lengths[out[-1][0][0]] > budget:
                out.append([])
            out[-1].append([row])
        return out
    return [[inside] for inside in first_fit(lengths, ordered, budget)]


def micro_batches(
    batch: Batch, rows: Sequence[int], budget: int, *, packed: bool = False, multiple_of: int = 1, count_of: int = 1
) -> list[MicroBatch]:
    """A rank's micro-batches of the trajectories `rows`; at least one, without weight if there is nothing to train.

    Besides `Batch.fields` and "behaviour" (the engines' log-probabilities) a micro-batch has "sequence" (the trajectory
    of each position, counted within it), "sequences" (as many elements as trajectories) and "index" (the token of the
    batch that a position is about, -1 in padding).

    multiple_of: tokens of a micro-batch are made a multiple of this (sequence parallelism). count_of: and their number
    a multiple of that (interleaved pipelines), with micro-batches that weigh nothing.
    """
    starts = batch.starts
    found = [_collate(batch, starts, lines, packed, multiple_of) for lines in pack(batch.lengths, rows, budget, packed)]
    missing = -len(found) % count_of if found else count_of
    return found + [_collate(batch.select([]), np.zeros(1, int), [[]], packed, multiple_of)] * missing


def _collate(batch: Batch, starts: np.ndarray, lines: Rows, packed: bool, multiple_of: int) -> MicroBatch:
    """Row by row: position p of a trajectory predicts its token p + 1, so it has one position less than tokens."""
    width = max(1, max(sum(int(batch.lengths[i]) - 1 for i in line) for line in lines))
    width += -width % multiple_of
    columns = {"mask": batch.chosen, "behaviour": batch.logprobs, **batch.fields}
    rows = lay(batch.tokens, starts, batch.lengths, lines, width, columns)
    fields = {name: values for name, values in rows.columns.items() if name != "mask"}
    sequence = np.maximum.accumulate(rows.documents_RW, axis=1).clip(0).astype(np.int64)  # padding: the row's last one
    sequences = np.zeros(max(sum(map(len, lines)), 1), np.float32)
    whole = {"sequence": sequence, "index": rows.index_RW, "sequences": sequences}
    extra = {name: torch.from_numpy(values) for name, values in (fields | whole).items()}
    return MicroBatch(
        tokens_BS=torch.from_numpy(rows.tokens_RW),
        labels_BS=torch.from_numpy(rows.labels_RW),
        loss_mask_BS=torch.from_numpy(rows.columns["mask"]),
        position_ids_BS=torch.from_numpy(rows.positions_RW) if packed else None,
        document_ids_BS=torch.from_numpy(rows.documents_RW) if packed else None,
        fields_BS=extra,
    )
