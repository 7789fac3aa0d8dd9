"""What became of a run: every fault, decision and recovery, one line of JSON each, in the run's folder.

The file is appended to and never rewritten, so what was decided before the driver itself died is still there; a torn
last line is passed over.
"""

from __future__ import annotations

import json
import time
from collections import deque
from pathlib import Path
from typing import Any

__all__ = ["Journal", "read_journal"]

SHOWN = 20  # events a status tells of


class Journal:
    """Events of one run, appended to `path` as they happen."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._recent = deque(read_journal(path), SHOWN)
        path.parent.mkdir(parents=True, exist_ok=True)

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
        self._recent.append(entry)
        return entry


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
