"""A running task changes mesh in place: all that its ranks hold moves from memory to memory, nothing is restarted.

    standing -> resolve -> conclude     after a fault only: all survivors are of one version (commit.py)
    reshape                             collective over everyone who gives or gets: plan, then move, into new buffers
    adopt                               local: the new engine takes over, the old one is freed

Growing, shrinking, draining a node, another tp x pp and replacing a lost rank are the same: two seatings, old and new,
and `plan` between their layouts, those of the lost taken away. What a rank had stays as it was until `adopt`, so a
fault during the move is met by another `reshape` from the same sources; and whoever directs the ranks tells them to
adopt only once all have the whole of it. New buffers rather than the old ones in place also means that nothing of an
abandoned collective, which may still write where it was told to, can reach what is trained on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from raytron.config import StepConfig
from raytron.models.base import ShardedModel
from raytron.models.loading import build
from raytron.parallel.collectives import World
from raytron.parallel.layout import Place, Plan, plan, without
from raytron.parallel.messages import gather
from raytron.parallel.transport import Distributed, run
from raytron.training.commit import Resolution, Standing
from raytron.training.engine import DTYPES, TrainEngine
from raytron.training.seating import Holdings, Seating, config_at, optimizer_buffers

__all__ = ["SOURCES", "Change", "Moved", "Reshaping"]

SOURCES = {
    "own": "its own memory",
    "twin": "one of the two that held an optimizer shard",
    "replica": "one of several that held the same",
    "owner": "the only one that held it",
}
"""Where a rank's part of a new seating can come from."""


@dataclass(frozen=True)
class Change:
    """From one seating to another.

    lost: places of `old` that are gone, with all they held. resolution: what the others concluded; None where no step
    was under way. index: every place that gives or gets -> its position on the world the move is made over; None where
    that is the new one.
    """

    old: Seating
    new: Seating
    lost: frozenset[Place] = frozenset()
    resolution: Resolution | None = None
    index: Mapping[Place, int] | None = None

    @property
    def whole(self) -> bool:
        """Whether all weights of those that give are of one version, or only what their optimizers own."""
        return self.resolution is None or self.resolution.whole

    @property
    def positions(self) -> Mapping[Place, int]:
        """`index`, given or not."""
        return {place: rank for rank, place in enumerate(self.new.places)} if self.index is None else self.index


@dataclass(frozen=True)
class Moved:
    """What a move came to.

    bytes_moved, bytes_local: over all places, sent and copied where they were. seconds: this rank's. sources: where
    this rank's own bytes came from, (kind, place, bytes), the kind being one of `SOURCES`.
    """

    bytes_moved: int
    bytes_local: int
    seconds: float
    sources: tuple[tuple[str, Place, int], ...] = ()


@dataclass
class _Next:
    """What `adopt` takes over, and the seating that it is of."""

    seating: Seating
    world: World | None
    engine: TrainEngine | None
    told: Mapping[str, Any]


class Reshaping:
    """What lets a task outlive its mesh; for classes with the attributes `world`, `config`, `arch` and `engine` (None
    in a newcomer, which gets one by its first `reshape`).

    None of these methods is collective but `reshape`.
    """

    world: World | None
    config: StepConfig
    arch: Any
    engine: TrainEngine | None
    _next: _Next | None = None

    def progress(self) -> tuple[int, str, float]:
        """(step published last, phase of the one after it, seconds since it entered it). Callable from any thread."""
        engine = self.engine
        if engine is None:
            return 0, "new", 0.0
        return engine.counters.step, engine.phase, time.monotonic() - engine.since

    def standing(self) -> Standing | None:
        """Where this rank stands; None if it holds nothing yet. In the engine's thread, once that has given up."""
        engine = self.engine or (self._next and self._next.engine)  # a newcomer that was not told to adopt yet
        return engine.standing() if engine else None

    def conclude(self, resolution: Resolution) -> None:
        """See `TrainEngine.conclude`."""
        if self.engine is not None:
            self._concluded(self.engine.conclude(resolution))

    def _concluded(self, result: Any) -> None:
        """Told of the result of a step that was finished here, or None: what was begun after it is dropped."""

    def reshape(self, world: World | None, transit: World, me: Place, change: Change) -> Moved:
        """Bring what this rank is to hold under `change.new` into a new engine. Collective over `transit`.

        world: this rank's seat under `change.new`, None if it leaves. transit: a world of all who give or get; may be
        the same. me: this rank's place.

        Raises, alike on every rank and before anything is moved:
            CoverageError: what is left holds not everything; go back to a checkpoint.
            ValueError: ranks are of different versions.
        """
        start = time.perf_counter()
        if self._next is not None and self._next.seating == change.old:
            self.adopt()  # the others have
        self._next = None
        gives = me in change.old.places and me not in change.lost
        if gives:
            self.engine.settle()  # a save may still be copying what the new engine goes on with
        told = _agree(transit, self._tell() if gives else None)
        step = told["record"]["step"]
        if change.resolution is not None and change.resolution.step != step:
            raise ValueError(f"ranks are at step {step}, not at {change.resolution.step}: conclude before reshaping")
        before, after = (Holdings(self.config, self.arch, s, step) for s in (change.old, change.new))
        weights, optimizer = _plans(before, after, change)
        engine = None if world is None else self._new_engine(world)
        old = self.engine if gives else None
        if old is not None and engine is not None and before.shard_at(me) == after.shard_at(me):
            engine.optimizer.update(old.optimizer)  # most of the memory stays where it is
        transfer = _Transfer(transit, me, change.positions)
        new_weights = {} if engine is None else {(me, "weights"): engine.model.weights}
        transfer(weights, _sources(old, me, change.whole), new_weights, before)
        names, dtype = optimizer_buffers(self.config)
        optimizer = optimizer.retyped(*[str(dtype).removeprefix("torch.")] * 2)
        for name in names:
            given, got = ({} if e is None else {(me, "shard"): e.optimizer[name]} for e in (old, engine))
            transfer(optimizer, given, got, before)
        if engine is not None:
            engine.record = told["record"]
        self._next = _Next(change.new, world, engine, told)
        sources = tuple((*source, count) for source, count in transfer.mine.items())
        return Moved(transfer.bytes_moved, transfer.bytes_local, time.perf_counter() - start, sources)

    def adopt(self) -> None:
        """Go on with what `reshape` brought, and free what was before. Doing it again does nothing."""
        if self._next is not None:
            new, self._next = self._next, None
            self.world, self.engine = new.world, new.engine
            self._adopted(new.told)

    def _tell(self) -> dict[str, Any]:
        """JSON-ready: the replicated numbers, and whatever else a newcomer needs to know."""
        return {"record": self.engine.record}

    def _adopted(self, told: Mapping[str, Any]) -> None:
        """Told what a rank that was there before said, when the new engine takes over."""

    def _new_engine(self, world: World) -> TrainEngine:
        """An engine on a new seat, empty: the numbers in it are about to come."""
        config = config_at(self.config, world.mesh)
        model = build(self.arch, world, parallel=config.parallel, dtype=DTYPES[config.precision])
        return self._engine_of(model, config)

    def _engine_of(self, model: ShardedModel, config: StepConfig) -> TrainEngine:
        return TrainEngine(model, config)


def _plans(old: Holdings, new: Holdings, change: Change) -> tuple[Plan, Plan]:
    """Of the weights, and of one of the optimizer's tensors."""
    pairs = ((old.weights if change.whole else old.owned_weights, new.weights), (old.optimizer, new.optimizer))
    weights, optimizer = (plan(without(source, change.lost), target) for source, target in pairs)
    return weights, optimizer


class _Transfer:
    """Carries out plans over a transit world and adds up their bytes; `mine` are those into this rank, by source."""

    def __init__(self, transit: World, me: Place, positions: Mapping[Place, int]) -> None:
        self._axis, self._me, self._positions = transit.axis("world"), me, positions
        assert positions[me] == self._axis.index, f"{me} sits at {self._axis.index} of the transit, not {positions[me]}"
        self.bytes_moved = self.bytes_local = 0
        self.mine: dict[tuple[str, Place], int] = {}

    def __call__(self, moves: Plan, sources: Mapping, targets: Mapping, held: Holdings) -> None:
        run(moves, Distributed(self._axis, self._positions, sources, targets))
        self.bytes_moved += moves.bytes_moved
        self.bytes_local += moves.bytes_local
        for move in moves.moves:
            if self._me in move.dst:
                place = move.src[move.dst.index(self._me)]
                source = ("own" if place == self._me else held.kind(move), place)
                self.mine[source] = self.mine.get(source, 0) + moves.nbytes(move)


def _sources(engine: TrainEngine | None, me: Place, whole: bool) -> dict[tuple[Place, str], Tensor]:
    """The weights that a rank gives: its own, or where not all of them are new a copy of what its optimizer owns."""
    if engine is None:
        return {}
    assert engine.whole or not whole, "not all weights are of the newest version: pass the resolution of the fault"
    found = {(me, "weights"): engine.model.weights}
    if not whole:
        found[me, "owned"] = torch.cat([engine.weights[a:b] for a, b in engine.intervals])
    return found


def _agree(transit: World, mine: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """What those who hold something say; their records must be one."""
    said = [told for told in gather(transit.axis("world"), mine) if told is not None]
    if not said:
        raise ValueError("nobody holds anything to move; restart from the newest checkpoint")
    records = {json.dumps(told["record"], sort_keys=True) for told in said}
    if len(records) > 1:
        raise ValueError(f"ranks are of different versions, conclude before reshaping: {' / '.join(sorted(records))}")
    return said[0]
