"""Who sits where in a run, and so who holds what: pure, for any mesh, without building anything or touching a process.

What a controller decides on: which actor takes which rank (`seat`), whether those that are left still hold everything
(`covered`), and what the loss of a node would cost (`at_risk`). All of it follows from layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch

from raytron.config import ParallelConfig, StepConfig, TrainConfig
from raytron.models.base import ShardedModel, rank_name
from raytron.models.registry import family_of
from raytron.parallel.boxes import intersect, volume
from raytron.parallel.collectives import World
from raytron.parallel.layout import (
    CoverageError,
    Layout,
    Move,
    Place,
    fragile,
    only,
    plan,
    relabel,
    rename,
    seats,
    union,
    without,
)
from raytron.parallel.mesh import Mesh
from raytron.training.commit import Resolution
from raytron.training.engine import DTYPES
from raytron.training.shards import optimizer_layout

__all__ = ["Holdings", "Seating", "at_risk", "config_at", "covered", "optimizer_buffers", "seat"]


@dataclass(frozen=True)
class Seating:
    """Who sits where: `places[rank]`, the stable name of the actor on each rank of the mesh."""

    mesh: Mesh
    places: tuple[Place, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))
        if len(self.places) != self.mesh.size or len(set(self.places)) != self.mesh.size:
            raise ValueError(f"{self.mesh} needs {self.mesh.size} different places, one for each rank: {self.places}")


def config_at(config: StepConfig, mesh: Mesh) -> StepConfig:
    """What a run's engines are told on a mesh that may not be the one it began with."""
    parallel = config.parallel
    if (parallel.tp, parallel.pp) == (mesh.tp, mesh.pp):
        return config
    stages = parallel.layers_per_stage if parallel.pp == mesh.pp else None
    kind = TrainConfig if isinstance(config, TrainConfig) else StepConfig
    told = {f.name: getattr(config, f.name) for f in fields(kind)}
    return kind(**told | {"parallel": replace(parallel, tp=mesh.tp, pp=mesh.pp, layers_per_stage=stages)})


class Holdings:
    """Where everything of a run lives under a seating: layouts, of places.

    Args:
        config: the run's. arch: its model's. version: of the layouts.
    """

    def __init__(self, config: StepConfig, arch: Any, seating: Seating, version: int = 0) -> None:
        self._parallel: ParallelConfig = config_at(config, seating.mesh).parallel
        seat, dtype = World.sketch(seating.mesh, 0), DTYPES[config.precision]
        self._model: ShardedModel = family_of(arch).model(
            arch, seat, parallel=self._parallel, dtype=dtype, device="meta"
        )
        self._names, self._version = {rank_name(r): place for r, place in enumerate(seating.places)}, version
        self._twins = self._parallel.twins and self._parallel.zero and seating.mesh.dp > 1

    def _placed(self, layout: Layout, buffers: Mapping[str, str] | None = None) -> Layout:
        return replace(relabel(layout, self._names, buffers), version=self._version)

    @cached_property
    def weights(self) -> Layout:
        """All weights, in buffer "weights"."""
        return self._placed(self._model.layout())

    @cached_property
    def optimizer(self) -> Layout:
        """Each of the optimizer's tensors, in buffer "shard"."""
        return self._placed(optimizer_layout(self._model, self._parallel))

    @cached_property
    def owned_weights(self) -> Layout:
        """What of the weights is of the newest version before they are gathered: what optimizers own, as a copy in
        buffer "owned" laid out as their tensors are, and what is frozen."""
        owned = self._placed(optimizer_layout(self._model, self._parallel), {"shard": "owned"})
        frozen = self.weights.tensors.keys() - self._model.trained_layout().tensors.keys()
        return union(only(self.weights, frozen), owned) if frozen else owned

    def kind(self, move: Move) -> str:
        """What the source of a move out of here is: "twin", "replica" or "owner" (see `reshape.SOURCES`)."""
        if move.at.buffer != "weights" and self._twins:
            return "twin"
        layout = self.weights if move.at.buffer == "weights" else self.optimizer
        same = (piece for piece in layout.pieces[move.name] if intersect(piece.box, move.box) == move.box)
        return "replica" if sum(len(piece.places) for piece in same) > 1 else "owner"

    def shard_at(self, place: Place) -> list[tuple]:
        """What lies where in the optimizer's buffers of one place."""
        layout = self.optimizer
        pieces = ((name, piece.box, piece.spot()) for name, piece in layout.at(place))
        return [layout.sizes[place, "shard"], *sorted(pieces)]

    @cached_property
    def together(self) -> Layout:
        """Weights and one tensor of the optimizer, which is called otherwise."""
        return union(self.weights, rename(self.optimizer, "optimizer.{}".format))


def seat(
    config: StepConfig, arch: Any, old: Seating, lost: frozenset[Place], mesh: Mesh, spare: Sequence[Place] = ()
) -> Seating:
    """Who takes which rank of `mesh` so that little moves: those of `old` that are left, then `spare` ones. Pure.

    It looks at bytes, not at nodes: leave out whole units first (as `lost`) to keep the others together.

    Raises ValueError where there are more ranks than places.
    """
    same = mesh == old.mesh
    names = [old.places[r] if same and old.places[r] not in lost else f"seat {r}" for r in range(mesh.size)]
    held = without(Holdings(config, arch, old).together, lost)
    chosen = seats(held, Holdings(config, arch, Seating(mesh, tuple(names))).together, spare)
    return Seating(mesh, tuple(chosen[name] for name in names))


def covered(
    config: StepConfig, arch: Any, seating: Seating, lost: frozenset[Place], resolution: Resolution | None = None
) -> bool:
    """Whether those of `seating` who are not `lost` hold every weight and every number of the optimizer, once they have
    concluded `resolution`: what `reshape` can go on from. Pure."""
    held = Holdings(config, arch, seating)
    weights = held.weights if resolution is None or resolution.whole else held.owned_weights
    try:
        for source, target in ((weights, held.weights), (held.optimizer, held.optimizer)):
            plan(without(source, lost), target)
    except CoverageError:
        return False
    return True


def at_risk(config: StepConfig, arch: Any, seating: Seating, node: Callable[[Place], str]) -> dict[str, int]:
    """Node -> bytes of weights and optimizer state that no other node holds: where there are any, losing the node takes
    the run back to its newest checkpoint. Pure; for saying so at the start."""
    held, (names, wide) = Holdings(config, arch, seating), optimizer_buffers(config)
    widths = {"weights": DTYPES[config.precision].itemsize, "optimizer": wide.itemsize * len(names)}
    alone: dict[str, int] = {}
    for kind, itemsize in widths.items():
        layout = getattr(held, kind)
        for name, tensors in fragile(layout, node).items():
            elements = sum(volume(box) for boxes in tensors.values() for box in boxes)
            alone[name] = alone.get(name, 0) + elements * itemsize
    return alone


def optimizer_buffers(config: StepConfig) -> tuple[list[str], torch.dtype]:
    """Names and dtype of what `FlatAdamW` keeps."""
    masters = ["master"] if config.precision == "bf16" else []
    return ["exp_avg", "exp_avg_sq", *masters], torch.float64 if config.precision == "fp64" else torch.float32
