"""Who worked when: spans on lanes, written as they end, in Chrome's trace event format.

A timeline file is a JSON array that is never closed, as the format allows: one event a line, so it is appended to,
survives a crash up to its last line, and opens in chrome://tracing and https://ui.perfetto.dev as it is. Every time a
run is started it is a process of its own there (`pid`), every lane a thread (`tid`).

Source: Trace Event Format (Google, 2016), events "X" (complete) and "M" (metadata). Times are microseconds since 1970.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Span", "Timeline", "read_lanes", "read_timeline", "shares"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Span:
    """One stretch of work. start: seconds since 1970. start_of: which start of the run it belongs to, from 1."""

    lane: str
    name: str
    start: float
    seconds: float
    start_of: int = 1
    args: Mapping[str, Any] = field(default_factory=dict)


class Timeline:
    """Records one start of a run; use it with `with`, or `close` it. From one thread.

    Args:
        path: the file. keep: go on behind what earlier starts have left there; else it is made anew.
        lanes: those to show first, in this order, whether or not anything happens there.
    """

    def __init__(self, path: str | Path, *, keep: bool = False, lanes: Sequence[str] = ()) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _whole_lines(path) if keep and path.exists() else "[\n"
        path.write_text(kept)
        self._pid = 1 + kept.count('"process_name"')
        self._file, self._full = path.open("a", buffering=1), False
        self._zero = time.time() - time.perf_counter()  # the clock that never jumps, as a date
        self._lanes: dict[str, int] = {}
        self._states: dict[str, tuple[str, float]] = {}
        self._name("process_name", 0, f"start {self._pid}, {time.strftime('%Y-%m-%d %H:%M:%S')}")
        for lane in lanes:
            self._number(lane)

    @contextmanager
    def span(self, lane: str, name: str, **args: Any) -> Iterator[None]:
        """What runs inside is a span on the lane; `args` are kept with it."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._write(lane, name, start, time.perf_counter(), args)

    def state(self, lane: str, name: str | None) -> None:
        """From now on the lane does `name`, None being nothing. Saying so again changes nothing."""
        before, now = self._states.get(lane), time.perf_counter()
        if (before[0] if before else None) == name:
            return
        if before:
            self._write(lane, *before, now)
        if name is None:
            del self._states[lane]
        else:
            self._states[lane] = name, now

    def close(self) -> None:
        """End the states that last, and the file; nothing is recorded afterwards. Doing it again does nothing."""
        for lane in list(self._states):
            self.state(lane, None)
        self._file.close()

    def __enter__(self) -> "Timeline":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self, lane: str, name: str, start: float, end: float, args: Mapping[str, Any] | None = None) -> None:
        times = {"ts": round((start + self._zero) * 1e6), "dur": round((end - start) * 1e6)}
        self._event({"name": name, "ph": "X", **times, "tid": self._number(lane), "args": args or {}})

    def _number(self, lane: str) -> int:
        if lane not in self._lanes:
            self._lanes[lane] = len(self._lanes) + 1
            self._name("thread_name", self._lanes[lane], lane)
            order = {"name": "thread_sort_index", "ph": "M", "tid": self._lanes[lane]}
            self._event({**order, "args": {"sort_index": self._lanes[lane]}})
        return self._lanes[lane]

    def _name(self, what: str, tid: int, name: str) -> None:
        self._event({"name": what, "ph": "M", "tid": tid, "args": {"name": name}})

    def _event(self, event: Mapping[str, Any]) -> None:
        if self._full or self._file.closed:
            return
        try:
            self._file.write(json.dumps({"pid": self._pid, **event}) + ",\n")
        except OSError as error:  # like every record of a run: it must not end it
            self._full = True
            log.error("the timeline ends here: %s", error)


def _whole_lines(path: Path) -> str:
    """Without a line that a kill has cut off."""
    text = path.read_text()
    return text[: text.rfind("\n") + 1] or "[\n"


def read_timeline(path: str | Path) -> list[Span]:
    """The spans of a file, in the order in which they ended."""
    lanes: dict[tuple[int, int], str] = {}
    spans = []
    for event in _events(path):
        if event["name"] == "thread_name":
            lanes[event["pid"], event["tid"]] = event["args"]["name"]
        elif event["ph"] == "X":
            lane, start, seconds = lanes[event["pid"], event["tid"]], event["ts"] / 1e6, event["dur"] / 1e6
            spans.append(Span(lane, event["name"], start, seconds, event["pid"], event["args"]))
    return spans


def read_lanes(path: str | Path) -> list[str]:
    """All lanes of a file, also those where nothing has happened, in the order in which they were named."""
    return list(dict.fromkeys(event["args"]["name"] for event in _events(path) if event["name"] == "thread_name"))


def _events(path: str | Path) -> Iterator[dict[str, Any]]:
    for line in _whole_lines(Path(path)).splitlines()[1:]:
        yield json.loads(line.rstrip(","))


def shares(spans: Sequence[Span]) -> dict[str, dict[str, float]]:
    """Of every lane the share of the time that it spent on each name, of all the time from first to last span.

    The time between two starts of a run is nobody's.
    """
    whole = sum(end - start for start, end in _extents(spans).values())
    found: dict[str, dict[str, float]] = {}
    for span in spans:
        mine = found.setdefault(span.lane, {})
        mine[span.name] = mine.get(span.name, 0.0) + (span.seconds / whole if whole else 0.0)
    return found


def _extents(spans: Sequence[Span]) -> dict[int, tuple[float, float]]:
    """(first second, last second) of every start of the run."""
    found: dict[int, tuple[float, float]] = {}
    for span in spans:
        start, end = found.get(span.start_of, (span.start, span.start))
        found[span.start_of] = min(start, span.start), max(end, span.start + span.seconds)
    return found
