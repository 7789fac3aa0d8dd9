"""What became of a run: every fault, decision and recovery, one line of JSON each, in the run's folder.

The file is appended to and never rewritten, so what was decided before the driver itself died is still there; a torn
last line is passed over. It is also what a driver that is started again goes on with (`past`): a second file of state
could contradict it.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["JOURNAL", "PAGE", "Journal", "Past", "past", "read_journal", "wish_after"]

JOURNAL, PAGE = "journal.jsonl", "status.html"  # in the run's folder
SHOWN = 20  # events a status tells of
UNTOLD = ("seated", "regained", "saved")  # events that are for pictures


class Journal:
    """Events of one run, appended to `path` as they happen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._recent = deque((event for event in read_journal(path) if event["event"] not in UNTOLD), SHOWN)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a torn line must not swallow the next one
            with path.open("a") as file:
                file.write("\n")

    @property
    def recent(self) -> list[dict[str, Any]]:
        """The last events, the oldest first."""
        return list(self._recent)

    def note(self, event: str, **what: Any) -> dict[str, Any]:
        """Write down that `event` happened now; `what` is JSON."""
        entry = {"time": round(time.time(), 3), "event": event, **what}
        line = json.dumps(entry)
        with self._path.open("a") as file:
            file.write(line + "\n")
        if event not in UNTOLD:
            self._recent.append(entry)
        return entry


@dataclass(frozen=True)
class Past:
    """What a driver takes over from those before it.

    Attributes:
        wish: what users have asked for and still stands, as `wish_after` says; empty if nothing.
        failures: counted since the run last ended by itself.
        interrupted: the last driver died.
    """

    wish: Mapping[str, Any] = field(default_factory=dict)
    failures: int = 0
    interrupted: bool = False


def past(events: Iterable[Mapping[str, Any]], setup: Mapping[str, Any]) -> Past:
    """What the journal's events say to a driver that begins with this `setup` (sizes as configured). Pure.

    Wishes stand as long as the run is started with the same sizes: whoever changes these has a newer wish. Failures are
    forgotten once a run has ended, well or not: whoever starts it again then wants it to go on.
    """
    wish: Mapping[str, Any] = {}
    before, failures, interrupted = None, 0, False
    for event in events:
        if event["event"] == "began":
            wish = wish if event["setup"] == before else {}
            before, interrupted = event["setup"], True
        elif event["event"] == "request" and event["refused"] is None:
            wish = wish_after(wish, event["asked"], event["time"])
        elif event["event"] == "fault":
            failures = event.get("count", failures)
        elif event["event"] == "ended":
            failures, interrupted = 0, False
    return Past(wish if before == setup else {}, failures, interrupted)


def wish_after(wish: Mapping[str, Any], asked: Mapping[str, Any], at_s: float) -> dict[str, Any]:
    """What is wished for once `asked` was granted at `at_s`: fields of `policy.Request`, or the "engines" of an RL run.
    Who asks for a size alone leaves the shape as it is; who asks for a shape asks for all of it."""
    if asked.get("engines") is not None:
        return {"engines": asked["engines"], "at_s": at_s}
    shape = {name: asked.get(name) for name in ("tp", "pp")}
    if not any(shape.values()):
        shape = {name: wish.get(name) for name in shape}
    return {"num_workers": asked.get("num_workers"), **shape, "at_s": at_s}


def read_journal(path: Path) -> list[dict[str, Any]]:
    """All whole events of the file, none where there is no file."""
    if not path.exists():
        return []
    events = []
    for line in path.read_text().splitlines():
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:  # a driver died while it wrote
            continue
    return events
