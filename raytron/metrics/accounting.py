"""Where a run's time went: its journal, event by event, as stretches of time that add up to all of it. Pure.

    began -> started -> [ steps ... fault | known -> parts of the recovery -> recovered ... steps ]* -> ended

Every second between a start's first event and its last belongs to exactly one kind. What a step was worth is measured
by the ranks and what a recovery took by the driver; what is left between them is evaluations, saves and the driver's
own work. When a fault happened nobody knows, only when it was known: of the time since the last thing that was done, a
usual step's worth counts as the step under way, which is done again, and the rest as noticing. The rejected
alternative, steps times their median, hides just the slow steps that this is about.

An event is a mapping with `time` (seconds since 1970) and `event`; `useful_s` is what the steps done so far count for,
`<part>_s` what a part of a recovery took. Whatever is missing counts as nothing; no journal is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

__all__ = ["KINDS", "PARTS", "Goodput", "Incident", "Stretch", "goodput"]

Event = Mapping[str, Any]

KINDS = {
    "useful": "steps that count",
    "start": "starting actors",
    "step": "the step under way, done again",
    "detect": "noticing",
    "release": "releasing the others and agreeing",
    "wait": "waiting for nodes",
    "newcomers": "cold starts",
    "rendezvous": "rendezvous",
    "move": "moving what ranks hold",
    "load": "loading a checkpoint",
    "redone": "steps done again after a checkpoint",
    "decide": "deciding, and tries that were cut off",
    "other": "evaluations, saves, between steps",
}
"""What time is spent on, and how it is called."""

PARTS = {
    "survey": "detect",
    "release": "release",
    "newcomers": "newcomers",
    "rendezvous": "rendezvous",
    "move": "move",
    "adopt": "move",
    "load": "load",
}
"""Part of a recovery, in order -> kind."""


@dataclass(frozen=True)
class Stretch:
    """From `start` to `end`, in seconds since 1970: on what; of "useful" the share `worth` was, the rest is "other".

    start_of: which start of the run it belongs to, from 1.
    """

    start: float
    end: float
    kind: str
    worth: float = 1.0
    start_of: int = 1

    @property
    def seconds(self) -> float:
        """Its length."""
        return self.end - self.start


@dataclass(frozen=True)
class Incident:
    """A fault with its recovery, a change of size or shape, or actors that were started again.

    Attributes:
        at: when it was over. kind: "recovered", "rewound", "resized", "restarted" or "unfinished".
        causes: what went wrong, in words. reason: of the last decision, "" where there was none.
        lost: kind of time -> seconds.
        event: the journal's own entry.
    """

    at: float
    kind: str
    causes: tuple[str, ...]
    reason: str
    lost: Mapping[str, float]
    event: Event


@dataclass(frozen=True)
class Goodput:
    """Of all starts of a run.

    Attributes:
        stretches: in order, without gaps within a start.
        seconds: kind -> seconds; they add up to `wall_s`.
        incidents: in order.
    """

    stretches: tuple[Stretch, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    incidents: tuple[Incident, ...] = ()

    @property
    def wall_s(self) -> float:
        """All the time in which the run was alive."""
        return sum(self.seconds.values())

    @property
    def share(self) -> float:
        """Useful time over wall time; 0 before there is any."""
        return self.seconds.get("useful", 0.0) / self.wall_s if self.wall_s > 0 else 0.0


def goodput(events: Sequence[Event]) -> Goodput:
    """What the journal says. A start without "ended" is known up to its last event."""
    books = [_Books(number, own) for number, own in enumerate(_starts(events), 1)]
    for before, after in pairwise(books):
        before.take_back(after.first_step)
    seconds = {kind: sum(book.seconds.get(kind, 0.0) for book in books) for kind in KINDS}
    stretches = tuple(stretch for book in books for stretch in book.stretches)
    return Goodput(stretches, seconds, tuple(incident for book in books for incident in book.incidents))


def _starts(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events of each start of the run; time does not go back within one."""
    own: list[Event] = []
    for event in events:
        if event["event"] == "began" and own:
            yield own
            own = []
        own.append(event)
    if own:
        yield own


class _Books:
    """Goes through the events of one start."""

    def __init__(self, number: int, events: Sequence[Event]) -> None:
        self.stretches: list[Stretch] = []
        self.incidents: list[Incident] = []
        self._number, self._at = number, events[0]["time"]
        self._doing = "start" if events[0]["event"] == "began" else "useful"  # or "mend"
        self._useful, self._redone = _number(events[0], "useful_s"), 0.0
        self._causes: list[str] = []
        self._reason, self._waited = "", False
        self._began: int | None = None  # where in `stretches` the incident at hand begins
        regained = _regained(events)
        for at, event in enumerate(events):
            self._take(event, regained.get(at, 0.0))
        self._until(max(self._at, *(event["time"] for event in events)), events[-1])
        if self._began is not None:
            self._over("unfinished", events[-1])
        starts = [event for event in events if event["event"] == "started"]
        self.first_step = int(_number(starts[0], "step")) if starts else None
        self._last_step = max((int(_number(event, "step")) for event in events), default=0)

    @property
    def seconds(self) -> dict[str, float]:
        """By kind."""
        found: dict[str, float] = {}
        for stretch in self.stretches:
            rest = stretch.seconds * (1 - stretch.worth) if stretch.kind == "useful" else 0.0
            found[stretch.kind] = found.get(stretch.kind, 0.0) + stretch.seconds - rest
            found["other"] = found.get("other", 0.0) + rest
        redone = min(self._redone, found.get("useful", 0.0))
        if redone > 0:
            found["useful"] -= redone
            found["redone"] = found.get("redone", 0.0) + redone
        return found

    def take_back(self, step: int | None) -> None:
        """The next start of the run went on from `step`: what was done after it here was done again."""
        done = self._last_step - (self.first_step or 0)
        if step is not None and 0 <= step < self._last_step and done > 0:
            useful = self.seconds.get("useful", 0.0)
            self._redone += useful * min(1.0, (self._last_step - step) / done)

    def _take(self, event: Event, regained: float) -> None:
        what, time = event["event"], event["time"]
        if what == "started":
            self._until(time, event)
            self._restarted(event)
        elif what in ("fault", "failed"):
            self._fault(event, regained)
        elif what in ("recovered", "rewound") and self._doing != "start":
            self._mended(event)
        elif what == "resized" and self._doing == "useful":
            self._resized(event)
        elif what == "regained":
            self._useful = _number(event, "useful_s")
        elif what == "decided":
            self._reason = str(event.get("reason", ""))
            self._waited |= event.get("action") == "wait"

    def _restarted(self, event: Event) -> None:
        if self._began is not None:
            self._over("restarted", event)
        self._doing, self._useful = "useful", _number(event, "useful_s")
        self._redone += _number(event, "redone_s")

    def _fault(self, event: Event, regained: float) -> None:
        self._causes.append(str(event.get("what", "")))
        if self._doing == "useful":
            since = min(_number(event, "since_s"), max(0.0, event["time"] - self._at))
            self._until(event["time"] - since, event)
            self._began, self._reason, self._waited = len(self.stretches), "", False
            regained = min(regained, since)
            self._add("useful", regained)
            self._add("step", min(_number(event, "step_s"), since - regained))
            self._to("detect", event["time"])
            self._doing = "mend"
        else:
            self._began = len(self.stretches) if self._began is None else self._began
            self._until(event["time"], event)
        if event["event"] == "failed":
            self._doing = "start"

    def _mended(self, event: Event) -> None:
        time = max(self._at, event["time"])
        if self._doing == "useful":  # the fault itself was not heard of
            self._until(time - min(_number(event, "recovery_s"), time - self._at), event)
            self._began = len(self.stretches)
        took = sum(_number(event, f"{part}_s") for part in PARTS)
        rest = max(0.0, time - self._at - took)  # before the parts of the try that succeeded, which are timed
        early = [part for part in ("survey", "release") if _number(event, f"{part}_s")] if self._waited else []
        for part in early:
            self._add(PARTS[part], min(_number(event, f"{part}_s"), time - self._at))
        self._add("wait" if self._waited else "decide", min(rest, time - self._at))
        self._parts(event, time, [part for part in PARTS if part not in early])
        self._redone += _number(event, "redone_s")
        self._over(event["event"], event)

    def _resized(self, event: Event) -> None:
        time = max(self._at, event["time"])
        took = sum(_number(event, f"{part}_s") for part in PARTS)
        self._until(time - min(took, time - self._at), event)
        self._began = len(self.stretches)
        self._parts(event, time, list(PARTS))
        self._over("resized", event)

    def _parts(self, event: Event, time: float, parts: Sequence[str]) -> None:
        for part in parts:
            self._add(PARTS[part], min(_number(event, f"{part}_s"), time - self._at))
        self._to("decide", time)

    def _over(self, kind: str, event: Event) -> None:
        lost: dict[str, float] = {}
        for stretch in self.stretches[self._began :]:
            if stretch.kind != "useful":
                lost[stretch.kind] = lost.get(stretch.kind, 0.0) + stretch.seconds
        if redone := _number(event, "redone_s"):
            lost["redone"] = redone
        self.incidents.append(Incident(event["time"], kind, tuple(self._causes), self._reason, lost, event))
        self._causes, self._reason, self._waited, self._began = [], "", False, None
        self._doing, self._useful = "useful", _number(event, "useful_s")

    def _until(self, time: float, event: Event) -> None:
        """What was going on went on until then."""
        if self._doing == "useful":
            length, worth = max(0.0, time - self._at), _number(event, "useful_s") - self._useful
            self._redone += max(0.0, -worth)  # steps were done again without a word
            if length > 0:
                share = min(1.0, max(0.0, worth) / length)
                self.stretches.append(Stretch(self._at, time, "useful", share, self._number))
                self._at = time
            self._useful = _number(event, "useful_s")
        elif self._doing == "mend":
            self._to("wait" if self._waited else "decide", time)
        else:
            self._to("start", time)

    def _add(self, kind: str, seconds: float) -> None:
        if (end := self._at + seconds) > self._at:
            self.stretches.append(Stretch(self._at, end, kind, 1.0, self._number))
            self._at = end

    def _to(self, kind: str, time: float) -> None:
        self._add(kind, time - self._at)


def _regained(events: Sequence[Event]) -> dict[int, float]:
    """Position of a fault -> seconds of steps that were done before it and heard of only after its recovery."""
    found: dict[int, float] = {}
    fault, mended = None, True
    for at, event in enumerate(events):
        if event["event"] == "fault":
            fault, mended = (at if mended else fault), False
        elif event["event"] in ("recovered", "rewound", "started"):
            mended = True
        elif event["event"] == "regained" and fault is not None:
            found[fault], fault = _number(event, "seconds"), None
    return found


def _number(event: Event, name: str) -> float:
    value = event.get(name, 0.0)
    return max(0.0, float(value)) if isinstance(value, int | float) else 0.0
