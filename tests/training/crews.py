"""Ranks as threads of one process, with real process groups: one can be dropped at any point of a step.

Tests that do so are `apart`: groups with an operation in flight would keep the process that made them from ending.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import Any

import torch.distributed as dist

from raytron.config import TrainConfig
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import GaveUp, World
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, StepResult, TrainEngine
from raytron.training.commit import Resolution, resolve
from raytron.training.reshape import Change, Moved, Reshaping
from raytron.training.seating import Seating


@dataclass(frozen=True)
class _Body:
    """The function that `apart` was put on, by name: what the name stands for is the wrapper."""

    module: str
    name: str

    def __call__(self, world: World, arguments: dict[str, Any]) -> None:
        getattr(import_module(self.module), self.name).body(**arguments)


def apart(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a rank process, which leaves without freeing anything."""

    def wrapper(ranks: Any, **arguments: Any) -> None:
        ranks.run(_Body(test.__module__, test.__name__), Mesh(), arguments)

    parameters = inspect.signature(test).parameters
    ranks = inspect.Parameter("ranks", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    wrapper.__signature__ = inspect.Signature([ranks, *parameters.values()])
    wrapper.__name__, wrapper.__doc__, wrapper.__module__ = test.__name__, test.__doc__, test.__module__
    wrapper.body = test
    return wrapper


class Dropped(Exception):  # noqa: N818 - what happens to a rank
    """A rank is gone."""


def together(parts: Sequence[Callable[[], Any]], worlds: Sequence[World] = ()) -> list[Any]:
    """Run all parts at once, each in a thread; results, or what was raised. The first error makes `worlds` give up."""
    outcomes: list[Any] = [None] * len(parts)

    def go(i: int) -> None:
        try:
            outcomes[i] = parts[i]()
        except BaseException as error:
            outcomes[i] = error
            for world in worlds:
                world.give_up(f"part {i} ended with {type(error).__name__}")

    threads = [threading.Thread(target=go, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


def all_of(outcomes: list[Any]) -> list[Any]:
    """The outcomes, if none is an error; else what was first, not its echoes."""
    errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    if errors:
        raise min(errors, key=lambda error: isinstance(error, GaveUp))
    return outcomes


def bury(worlds: Sequence[World]) -> None:
    """Free the groups of worlds that nobody uses any more. Each by a thread: one with an operation in flight is freed
    when the group at the other end is."""
    for world in worlds:
        world.give_up("this generation is over")
        for axis in world._axes.values():
            boxes, axis._groups = [[group] for group in axis._groups.values()], {}
            axis.close()
            for box in boxes:
                threading.Thread(target=box.clear, daemon=True).start()


class Task(Reshaping):
    """The least that can be reshaped: an engine."""

    def __init__(self, world: World | None, config: TrainConfig, arch: DecoderConfig, seed: int = 7) -> None:
        self.world, self.config, self.arch, self.engine = world, config, arch, None
        self.finished: list[StepResult] = []
        if world is not None:
            model = build(arch, world, parallel=config.parallel, dtype=DTYPES[config.precision], seed=seed)
            self.engine = self._engine_of(model, config)

    def _concluded(self, result: StepResult | None) -> None:
        self.finished += [result] if result is not None else []


class Crew:
    """Tasks by place, as the actors of a run would hold them, and what directs those."""

    def __init__(self, mesh: Mesh, config: TrainConfig, arch: DecoderConfig) -> None:
        self.config, self.arch = config, arch
        self._store, self._generation, self._names = dist.HashStore(), count(), count()
        self.seating = Seating(mesh, tuple(self.name() for _ in range(mesh.size)))
        self.worlds = self.meet(mesh)
        makers = [lambda world=world: self.make(world) for world in self.worlds]
        self.tasks = dict(zip(self.seating.places, all_of(together(makers)), strict=True))

    def make(self, world: World | None) -> Task:
        """The task of a rank, or of a newcomer."""
        return Task(world, self.config, self.arch)

    def name(self) -> str:
        """A place nobody had before."""
        return f"actor-{next(self._names)}"

    def meet(self, mesh: Mesh) -> list[World]:
        """The worlds of a new generation, by rank."""
        prefix = f"gen{next(self._generation)}"
        seats = [
            lambda rank=rank: World(mesh, rank, self._store, timeout=30.0, prefix=prefix) for rank in range(mesh.size)
        ]
        return all_of(together(seats))

    @property
    def ranks(self) -> list[Task]:
        return [self.tasks[place] for place in self.seating.places]

    def run(self, part: Callable[[Task], Any]) -> list[Any]:
        """`part` of every rank's task, at once: results by rank, or what was raised."""
        return together([lambda task=task: part(task) for task in self.ranks], self.worlds)

    def strike(self, part: Callable[[Task], Any], victim: int, point: str, deaf: Sequence[int] = ()) -> list[Any]:
        """`run` a step in which rank `victim` vanishes at `point`; ranks `deaf` never hear of the vote."""
        everyone = threading.Barrier(self.seating.mesh.size)
        for rank, task in enumerate(self.ranks):
            _hear(task.engine, everyone, rank in deaf)
        _drop(self.ranks[victim].engine, point)
        outcomes = self.run(part)
        assert isinstance(outcomes[victim], Dropped)
        return outcomes

    def leave(self) -> None:
        """The end of a generation."""
        bury(self.worlds)

    def conclude(self, lost: Sequence[str] = ()) -> Resolution:
        """Resolve what was under way."""
        left = [self.tasks[place] for place in self.seating.places if place not in lost]
        resolution = resolve([task.standing() for task in left])
        for task in left:
            task.conclude(resolution)
        return resolution

    def move(
        self,
        new: Seating,
        lost: Sequence[str] = (),
        spoil: str | None = None,
        adopt: Sequence[str] | None = None,
    ) -> list[Moved]:
        """To another seating; newcomers are made on the way. spoil: the place of one that dies during the move. adopt:
        the places that hear of its end, by default all."""
        resolution = self.conclude(lost)
        self.leave()
        stay = [place for place in self.seating.places if place not in lost]
        everyone = list(dict.fromkeys((*new.places, *stay)))
        self.tasks |= {place: self.make(None) for place in everyone if place not in self.tasks}
        worlds = self.meet(new.mesh)
        transits = worlds if len(everyone) == new.mesh.size else self.meet(Mesh(dp=len(everyone)))
        index = {place: i for i, place in enumerate(everyone)}
        change = Change(self.seating, new, frozenset(lost), resolution, index)

        def reshape(i: int, place: str) -> Moved:
            if place == spoil:
                raise Dropped
            world = worlds[i] if i < new.mesh.size else None
            return self.tasks[place].reshape(world, transits[i], place, change)

        parts = [lambda i=i, place=place: reshape(i, place) for i, place in enumerate(everyone)]
        outcomes = together(parts, [*worlds, *transits])
        if transits is not worlds:
            bury(transits)
        if spoil is not None:
            assert any(isinstance(outcome, Dropped) for outcome in outcomes)
            assert all(isinstance(outcome, Dropped | GaveUp | RuntimeError) for outcome in outcomes)
            bury(worlds)
            return []
        try:
            all_of(outcomes)
        except BaseException:
            bury(worlds)
            raise
        for place in everyone if adopt is None else adopt:
            self.tasks[place].adopt()
        self.worlds, self.seating = worlds, new
        self.tasks = {place: self.tasks[place] for place in new.places}
        return outcomes


def _drop(engine: TrainEngine, point: str) -> None:
    """Make a rank vanish at `point` of its next step."""

    def vanish(*_: Any, **__: Any) -> None:
        raise Dropped(point)

    def after(method: str) -> Callable[..., None]:
        real = getattr(engine, method)

        def called(*args: Any, **how: Any) -> None:
            real(*args, **how)
            vanish()

        return called

    if point == "backward":
        engine.model.trained[0].param.register_hook(vanish)
    elif point == "reduce":
        engine._reducer.finish = vanish
    elif point in ("voted", "published"):
        method = {"voted": "vote", "published": "publish"}[point]
        setattr(engine, method, after(method))
    else:
        setattr(engine, {"forward": "_forward"}.get(point, point), vanish)


POINTS = ("forward", "backward", "reduce", "vote", "voted", "update", "gather", "published")


def _hear(engine: TrainEngine, everyone: threading.Barrier, deaf: bool) -> None:
    """Go on from a vote when everyone has passed it; or, deaf, never hear the outcome."""
    real = engine.vote

    def vote(counts: Any, **how: Any) -> Any:
        vote = real(counts, **how)
        everyone.wait()
        if deaf:
            engine._vote = None  # as if the wait for it had given up
            raise GaveUp("the outcome was never heard")
        return vote

    engine.vote = vote
