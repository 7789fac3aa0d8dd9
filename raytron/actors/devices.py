"""Which GPU a rank uses, and which it sees.

Ray gives each actor its own GPU ids and hides the others by CUDA_VISIBLE_DEVICES. NCCL's peer-to-peer mappings (cuMem,
NVLS) need the peers' devices visible: with one device each they were reported to hang or to crawl (ray-project/ray
#61073). So, as Ray Train does, every rank of a node sees the ids of all ranks of the group there, and picks its own by
index. Ids are handed out in rank order, not to whom Ray gave them: neighbours in rank are neighbours on the board, and
the next process in a lost rank's place gets the same device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Devices", "share"]


@dataclass(frozen=True)
class Devices:
    """GPU ids a rank sees, in the order of its device indices, and the index of the one it uses (None without GPUs)."""

    visible: tuple[str, ...]
    index: int | None

    @property
    def name(self) -> str:
        """torch's name of the device."""
        return "cpu" if self.index is None else f"cuda:{self.index}"

    @property
    def used(self) -> str | None:
        """The id of the GPU it uses."""
        return None if self.index is None else self.visible[self.index]


def share(
    where: Sequence[tuple[str, tuple[str, ...]]], kept: Mapping[int, Devices] | None = None
) -> tuple[Devices, ...]:
    """For each rank in order, given (node, GPU ids Ray granted): what it sees and which it uses.

    Args:
        kept: ranks whose process already runs on a device, which stays theirs; the others divide the rest.

    Ranks granted several GPUs use the first; ranks granted a share of one GPU use it together.
    """
    kept = kept or {}
    result: list[Devices] = [kept.get(rank, Devices((), None)) for rank in range(len(where))]
    for node in dict.fromkeys(node for node, _ in where):
        here = [rank for rank, (other, own) in enumerate(where) if other == node and own]
        visible = tuple(sorted({gpu for rank in here for gpu in where[rank][1]}, key=_order))
        spare = sorted((where[rank][1][0] for rank in here), key=_order)
        for rank in here:
            if rank in kept and kept[rank].used in spare:
                spare.remove(kept[rank].used)
        for rank, gpu in zip((r for r in here if r not in kept), spare, strict=False):
            result[rank] = Devices(visible, visible.index(gpu))
    return tuple(result)


def _order(gpu: str) -> tuple[int, str]:
    return (int(gpu), "") if gpu.isdigit() else (1 << 30, gpu)  # MIG and UUID names after plain numbers
