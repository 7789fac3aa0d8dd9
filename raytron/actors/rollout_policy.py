"""How many rollout engines there should be, and which of them go: a pure function from what is known to a decision.

    decide(EnginesState) -> EnginesDecision(start, leave, within_s, reason)

A node is draining     its engines leave once enough others answer, or shortly before the deadline; others are started
                       elsewhere meanwhile, where there is room
The user asked         engines start as far as there is room, or those that cost least to lose leave
Seats appeared         as many engines as find room, up to the most; not right after some found none

An engine that comes or goes costs the others nothing: nobody moves, no step waits, and an answer is the same whoever
gives it. So there is no weighing of costs as in policy.py, and no decision has to wait for a boundary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["EnginesDecision", "EnginesState", "Seated", "decide", "refusal", "wanted"]

NEAR_S = 30.0  # before a node's end its engines leave, though too few others answer
FINISH_S = 600.0  # where no deadline is known, a leaving engine may take so long to finish
MARGIN_S = 5.0  # before the deadline others have to begin with what is unfinished


@dataclass(frozen=True)
class Seated:
    """An engine that is there to stay or on its way. nodes: ids of those it is on, none before it has seats. ready: it
    answers. outstanding: tokens it has to compute at most."""

    engine: int
    nodes: frozenset[str] = frozenset()
    ready: bool = True
    outstanding: int = 0


@dataclass(frozen=True)
class EnginesState:
    """Everything a decision depends on.

    Attributes:
        engines: those that are there to stay or on their way, not those that are leaving.
        bounds: (fewest, most) of them.
        free: how many more could start now, on nodes that stay, besides those on their way to seats.
        draining: nodes that are to leave, and in how many seconds (infinite where nobody has said).
        requested: how many the user asked for last.
        lost: engines that failed too often; their places are not filled.
        held_s: nothing is started for so long.
    """

    engines: tuple[Seated, ...]
    bounds: tuple[int, int]
    free: int = 0
    draining: Mapping[str, float] = field(default_factory=dict)
    requested: int | None = None
    lost: int = 0
    held_s: float = 0.0


@dataclass(frozen=True)
class EnginesDecision:
    """What to do, and why: start so many, none on a draining node; have those of `leave` finish within `within_s`."""

    start: int
    leave: tuple[int, ...]
    within_s: float
    reason: str

    @property
    def kind(self) -> str:
        """In a word."""
        return {(1, 1): "move", (1, 0): "grow", (0, 1): "shrink"}.get((self.start > 0, bool(self.leave)), "continue")


def decide(state: EnginesState) -> EnginesDecision:
    """What to do now. It never leaves fewer ready engines than one where there are some, nor more than the most."""
    goes = [one for one in state.engines if one.nodes & state.draining.keys()]
    stay = [one for one in state.engines if not one.nodes & state.draining.keys()]
    goal, why = _wanted(state)
    if (excess := len(stay) - wanted(state)) > 0:
        return EnginesDecision(0, _least(stay, excess), FINISH_S, f"{why}; {len(stay)} are there")
    start = max(0, min(goal - len(stay), state.free)) if state.held_s <= 0 else 0
    if goes:
        return _drained(state, goes, stay, start)
    if start:
        return EnginesDecision(start, (), FINISH_S, f"{why}; {len(stay)} are there and {start} more find room")
    if len(stay) >= goal:
        return _keep(f"{why}, and all of them are there")
    held = f"; no more are started for {state.held_s:.0f} s" if state.held_s > 0 else ""
    return _keep(f"{why}; there is room for {len(stay)}{held}")


def wanted(state: EnginesState) -> int:
    """How many engines the run would have if there were room."""
    return max(1, _wanted(state)[0])


def refusal(bounds: tuple[int, int], engines: int) -> str | None:
    """Why so many engines cannot be asked for, if they cannot."""
    low, high = bounds
    if low == high:
        return f"rollout.engines is {low}, one number; only a run that was given a range of them changes their number"
    if not low <= engines <= high:
        return f"{engines} engines are outside rollout.engines {low} to {high}"
    return None


def _wanted(state: EnginesState) -> tuple[int, str]:
    high = max(0, state.bounds[1] - state.lost)
    asked = high if state.requested is None else min(state.requested, high)
    who = "the user asked for" if state.requested is not None else "there may be"
    lost = f", {state.lost} of which failed too often" if state.lost else ""
    return asked, f"{who} {state.bounds[1] if state.requested is None else state.requested} engines{lost}"


def _drained(state: EnginesState, goes: list[Seated], stay: list[Seated], start: int) -> EnginesDecision:
    """The engines of `goes` are on nodes that leave: who of them goes now."""
    ready = sum(one.ready for one in stay)
    rests = {one.engine: min(state.draining[node] for node in one.nodes & state.draining.keys()) for one in goes}
    enough = ready >= max(1, state.bounds[0])
    leave = tuple(e for e, rest in rests.items() if enough or (ready and rest <= NEAR_S))
    rest = min(rests.values())
    named = f"engine{'' if len(goes) == 1 else 's'} {', '.join(str(one.engine) for one in goes)}"
    cause = f"the node of {named} leaves" + (f" in {max(0.0, rest):.0f} s" if rest < float("inf") else "")
    does = [f"{start} more start elsewhere"] if start else []
    does += [] if leave else [f"{ready} others answer, so they go on meanwhile"]
    within = min(FINISH_S, max(0.0, min((rests[e] for e in leave), default=FINISH_S) - MARGIN_S))
    return EnginesDecision(start, leave, within, "; ".join([cause, *does]))


def _least(engines: list[Seated], count: int) -> tuple[int, ...]:
    """The `count` that cost least to lose: those that do not answer yet, then those with the least to do."""
    order = sorted(engines, key=lambda one: (one.ready, one.outstanding, -one.engine))
    return tuple(one.engine for one in order[:count])


def _keep(reason: str) -> EnginesDecision:
    return EnginesDecision(0, (), 0.0, reason)
