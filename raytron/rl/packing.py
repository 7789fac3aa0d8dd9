"""From a flat batch to the micro-batches of a rank: who trains which trajectory, and in which rows of tokens.

    Batch --distribute--> dp ranks --pack--> rows --micro_batches--> MicroBatch

All of it is a pure function of the trajectories' lengths, so every rank computes the same and nobody sends anything. A
token's weight is in the batch already (reductions.py), so no way of cutting changes the gradient.

Two forms. *Padded*: trajectories of similar length side by side, one a row; plain causal attention. *Packed*: several
behind each other in one row with document ids; nothing is padded. Packed, the answers to one prompt can *share* it: its
tokens are computed once and every answer attends to them, with the gradient that so many copies would have added up to
(all of the prompt but its last token, which predicts each answer's first). A group is kept in one row where it fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch

from raytron.data.loader import MicroBatch
from raytron.data.packing import Beginnings, first_fit, lay
from raytron.rl.types import Batch

__all__ = ["beginnings", "distribute", "micro_batches", "pack"]

Rows = list[list[int]]  # trajectories by row of a micro-batch


def distribute(lengths: np.ndarray, ranks: int, shared: Beginnings | None = None) -> list[list[int]]:
    """Trajectories of each of `ranks`: longest first, each to whoever has the fewest tokens (Graham 1969, LPT).

    Those that have a beginning in common stay together.
    """
    parts = [[row] for row in range(len(lengths))] if shared is None else _families(range(len(lengths)), shared)
    sizes = np.array([_size(lengths, part, shared) for part in parts], dtype=np.int64)
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for at in np.argsort(-sizes, kind="stable").tolist():
        least = min(range(ranks), key=loads.__getitem__)
        shares[least] += parts[at]
        loads[least] += int(sizes[at])
    return shares


def beginnings(batch: Batch) -> Beginnings:
    """The prompts that trajectories have in common, less their last token, which predicts the first that was chosen."""
    found: dict[tuple[int, bytes], list[int]] = {}
    lengths = np.zeros(len(batch), np.int64)
    for row, start in enumerate(batch.starts[:-1].tolist()):
        lengths[row] = max(0, int(np.argmax(batch.chosen[start : start + batch.lengths[row]])) - 1)
        key = int(batch.groups[row]), batch.tokens[start : start + lengths[row]].tobytes()
        found.setdefault(key, []).append(row)
    family = np.zeros(len(batch), np.int64)
    for number, rows in enumerate(found.values()):
        family[rows] = number
        if len(rows) == 1:
            lengths[rows] = 0
    return Beginnings(lengths, family)


def pack(
    lengths: np.ndarray, rows: Sequence[int], budget: int, packed: bool, shared: Beginnings | None = None
) -> list[Rows]:
    """Trajectories `rows` in micro-batches of at most `budget` tokens (more only for a single longer trajectory)."""
    if packed:
        parts = [[row] for row in rows] if shared is None else _split(lengths, _families(rows, shared), budget, shared)
        sizes = np.array([_size(lengths, part, shared) for part in parts], dtype=np.int64)
        order = sorted(range(len(parts)), key=lambda at: (-sizes[at], parts[at][0]))
        return [[[row for at in inside for row in parts[at]]] for inside in first_fit(sizes, order, budget)]
    out: list[Rows] = []
    for row in sorted(rows, key=lambda row: (-lengths[row], row)):
        if not out or (len(out[-1]) + 1) * lengths[out[-1][0][0]] > budget:
            out.append([])
        out[-1].append([row])
    return out


def _families(rows: Iterable[int], shared: Beginnings) -> list[list[int]]:
    """Those that share their beginning together, in order of appearance; others alone."""
    found: dict[tuple[bool, int], list[int]] = {}
    for row in rows:
        alone = not shared.tokens[row]
        found.setdefault((alone, row if alone else int(shared.family[row])), []).append(row)
    return list(found.values())


def _split(lengths: np.ndarray, families: Rows, budget: int, shared: Beginnings) -> Rows:
    """Families, cut where one exceeds the budget; each part has the beginning anew."""
    parts: Rows = []
    for family in families:
        parts.append([])
        for row in family:
            if parts[-1] and _size(lengths, [*parts[-1], row], shared) > budget:
                parts.append([])
            parts[-1].append(row)
    return parts


def _size(lengths: np.ndarray, part: Sequence[int], shared: Beginnings | None) -> int:
    """Tokens of trajectories of one family."""
    common = 0 if shared is None else int(shared.tokens[part[0]])
    return int(lengths[part].sum()) - common * (len(part) - 1)


def micro_batches(
    batch: Batch,
    rows: Sequence[int],
    budget: int,
    *,
    packed: bool = False,
    shared: Beginnings | None = None,
    multiple_of: int = 1,
    count_of: int = 1,
) -> list[MicroBatch]:
    """A rank's micro-batches of the trajectories `rows`; at least one, without weight if there is nothing to train.

    Besides `Batch.fields` and "behaviour" (the engines' log-probabilities) a micro-batch has "sequence" (the trajectory
    of each position, counted within it), "sequences" (as many elements as trajectories) and "index" (the token of the
    batch that a position is about, -1 in padding and in what is shared).

    shared: beginnings that are computed once; needs `packed`. multiple_of: tokens of a micro-batch are made a multiple
    of this (sequence parallelism). count_of: and their number a multiple of that (interleaved pipelines), with
    micro-batches that weigh nothing.
    """
    lines = pack(batch.lengths, rows, budget, packed, shared)
    found = [_collate(batch, inside, packed, shared, multiple_of) for inside in lines]
    missing = -len(found) % count_of if found else count_of
    return found + [_collate(batch.select([]), [[]], packed, None, multiple_of)] * missing


def _collate(batch: Batch, lines: Rows, packed: bool, shared: Beginnings | None, multiple_of: int) -> MicroBatch:
    """Row by row: position p of a trajectory predicts its token p + 1, so it has one position less than tokens."""
    width = max(1, max(_places(batch.lengths, line, shared) for line in lines))
    width += -width % multiple_of
    columns = {"mask": batch.chosen, "behaviour": batch.logprobs, **batch.fields}
    rows = lay(batch.tokens, batch.starts, batch.lengths, lines, width, columns, shared)
    fields = {name: values for name, values in rows.columns.items() if name != "mask"}
    # What is shared belongs to the trajectory before it, as padding does: neither is counted.
    sequence = np.maximum.accumulate(rows.documents_RW, axis=1).clip(0).astype(np.int64)
    sequences = np.zeros(max(sum(map(len, lines)), 1), np.float32)
    whole = {"sequence": sequence, "index": rows.index_RW, "sequences": sequences}
    extra = {name: torch.from_numpy(values) for name, values in (fields | whole).items()}
    return MicroBatch(
        tokens_BS=torch.from_numpy(rows.tokens_RW),
        labels_BS=torch.from_numpy(rows.labels_RW),
        loss_mask_BS=torch.from_numpy(rows.columns["mask"]),
        position_ids_BS=torch.from_numpy(rows.positions_RW) if packed else None,
        document_ids_BS=torch.from_numpy(rows.documents_RW) if packed else None,
        parent_ids_BS=None if shared is None else torch.from_numpy(rows.parents_RW),
        fields_BS=extra,
    )


def _places(lengths: np.ndarray, line: Sequence[int], shared: Beginnings | None) -> int:
    """That a row takes up."""
    if shared is None:
        return sum(int(lengths[row]) - 1 for row in line)
    return sum(_size(lengths, part, shared) - len(part) for part in _families(line, shared))
