"""The health of a group of engines, whether one gets on, and which gets a request. Pure: no Ray, no clock, no engine.

    STARTING -> STALE -> READY          started; given the current weights (STALE again: a push ended half-way)
        ^         |        |
        |         v        v
        +------ FAILED <---+            died, or lost its weights; started again while `max_failures` allows
                  |
                  v
                 LOST                   not started again

    STALE, READY -> LEAVING -> LEFT     is given nothing more; it has gone, its seats are given back
    STARTING -----------------> LEFT    had no seat, or is not wanted any more

Engines are numbered in the order in which they came; no number is given twice. A restarted engine holds the weights of
its directory, not those of the moment: it stays STALE, and is given no request, until it has confirmed the current
version. Without that state the first answers after a crash are those of old weights, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raytron.inference import Stats

__all__ = ["Balancer", "EngineState", "Fleet", "Health", "Progress"]


class Health(StrEnum):
    """Where an engine is between its start and its end."""

    STARTING = "starting"
    STALE = "stale"
    READY = "ready"
    FAILED = "failed"
    LOST = "lost"
    LEAVING = "leaving"
    LEFT = "left"


_NEXT = {
    Health.STARTING: {Health.STALE, Health.FAILED, Health.LEFT},
    Health.STALE: {Health.READY, Health.FAILED, Health.LEAVING},
    Health.READY: {Health.READY, Health.STALE, Health.FAILED, Health.LEAVING},
    Health.FAILED: {Health.STARTING, Health.LOST},
    Health.LOST: set(),
    Health.LEAVING: {Health.LEFT},
    Health.LEFT: set(),
}


@dataclass(frozen=True)
class EngineState:
    """One engine: version of the weights it has confirmed (None while it has none), and why it last failed."""

    health: Health = Health.STARTING
    version: int | None = None
    reason: str = ""


class Fleet:
    """The states of engines 0 .. size - 1, changed by what happens to them.

    Args:
        size: engines to begin with.
        max_failures: how often engines are started again, all together; -1 is any number.
        current: version of the weights that engines must have; None until the first push.
        most: how many there may be at a time, `size` where it does not change.

    Attributes:
        states: of each engine.
        failures: so far.

    An event that cannot happen in an engine's state is an `AssertionError`: the caller has lost track.
    """

    def __init__(self, size: int, max_failures: int = 0, current: int | None = None, most: int | None = None) -> None:
        self.max_failures, self.current, self.failures = max_failures, current, 0
        self.most = size if most is None else most
        self.states = [EngineState()] * size

    def joining(self) -> int:
        """Another engine, STARTING; its number."""
        self.states.append(EngineState())
        return len(self.states) - 1

    def started(self, engine: int, version: int | None) -> None:
        """It runs, with weights of `version` (None: with none). READY at once if those are the current ones."""
        self._move(engine, Health.STALE, version=version)
        if version is not None and version == self.current:
            self._move(engine, Health.READY)

    def updated(self, engine: int, version: int) -> None:
        """It has confirmed weights of `version`; STALE ends where that is the current one."""
        assert self.states[engine].health in (Health.STALE, Health.READY), f"{self.states[engine].health} was updated"
        self.states[engine] = replace(self.states[engine], version=version)
        if version == self.current:
            self._move(engine, Health.READY)

    def published(self, version: int) -> None:
        """`version` is now what engines must have. READY ones go on with what they have until they are updated."""
        self.current = version

    def mixed(self, engine: int) -> None:
        """It has got a part of a push that will not be finished: STALE until the next one."""
        if self.states[engine].health is Health.READY:
            self._move(engine, Health.STALE, version=None)

    def failed(self, engine: int, reason: str) -> bool:
        """It died; whether to start it again, else it is LOST."""
        self._move(engine, Health.FAILED, version=None, reason=reason)
        self.failures += 1
        again = self.max_failures < 0 or self.failures <= self.max_failures
        self._move(engine, Health.STARTING if again else Health.LOST)
        return again

    def leaving(self, engine: int) -> None:
        """It is given no more requests, and no more weights."""
        self._move(engine, Health.LEAVING)

    def left(self, engine: int, reason: str, excused: bool = False) -> None:
        """It has gone, and nobody waits for it. excused: its last failure does not count."""
        self._move(engine, Health.LEFT, version=None, reason=reason)
        self.failures -= excused

    def of(self, *healths: Health) -> tuple[int, ...]:
        """The engines in one of these states."""
        return tuple(engine for engine, state in enumerate(self.states) if state.health in healths)

    @property
    def ready(self) -> tuple[int, ...]:
        """Those that may be given requests."""
        return self.of(Health.READY)

    @property
    def present(self) -> tuple[int, ...]:
        """Those that are there to stay, or are started (again) to be."""
        return self.of(Health.STARTING, Health.STALE, Health.READY)

    @property
    def hopeless(self) -> bool:
        """Whether no engine will ever answer again: places of LOST ones are not filled, others may be."""
        return len(self.of(Health.LOST)) >= self.most and not self.present

    def _move(self, engine: int, to: Health, **changes: object) -> None:
        state = self.states[engine]
        assert to in _NEXT[state.health], f"engine {engine} cannot go from {state.health} to {to}"
        self.states[engine] = replace(state, health=to, **changes)


class Progress:
    """How long an engine has had work and not moved: it answers, and its steps lead nowhere.

    Any change in its numbers is movement: a long prompt takes cache blocks with every chunk that is computed.
    """

    def __init__(self) -> None:
        self._seen: Stats | None = None
        self._since = 0.0

    def stuck_s(self, stats: Stats, now: float) -> float:
        """Seconds by now, given what an engine says of itself; 0 while it is paused or has nothing to do."""
        waits = stats.paused or stats.running + stats.waiting == 0
        if waits or stats != self._seen:
            self._seen, self._since = stats, now
        return now - self._since


class Balancer:
    """Chooses the engine with the fewest outstanding tokens, and a group's own engine while that is nearly as free.

    A request counts with its prompt and the most it may answer. Requests of a group share their prompt, which only the
    first of them computes where they meet on one engine; but a group may not queue up behind itself while others idle,
    so its engine is left once it is `slack` requests of this size ahead of the freest.

    Attributes:
        outstanding: tokens of each engine.
    """

    REMEMBERED = 4096  # groups; older ones have ended, or find the freest engine anew

    def __init__(self, size: int, slack: int = 8) -> None:
        self.outstanding = [0] * size
        self._slack = slack
        self._homes: dict[Hashable, int] = {}

    def joining(self) -> None:
        """There is another engine."""
        self.outstanding.append(0)

    def choose(self, cost: int, engines: Sequence[int], group: Hashable = None, avoid: Collection[int] = ()) -> int:
        """The engine, of some that there are, for a request of `cost` tokens, which is now outstanding there.

        avoid: engines that have failed this request before; taken only where there is no other.
        """
        usable = [engine for engine in engines if engine not in avoid] or list(engines)
        freest = min(usable, key=lambda engine: (self.outstanding[engine], engine))
        home = self._homes.get(group) if group is not None else None
        if home not in usable or self.outstanding[home] - self.outstanding[freest] > self._slack * cost:
            home = freest
        if group is not None:
            self._remember(group, home)
        self.outstanding[home] += cost
        return home

    def done(self, engine: int, cost: int) -> None:
        """A request has left the engine."""
        self.outstanding[engine] -= cost

    def _remember(self, group: Hashable, engine: int) -> None:
        if group not in self._homes and len(self._homes) >= self.REMEMBERED:
            del self._homes[next(iter(self._homes))]
        self._homes[group] = engine
