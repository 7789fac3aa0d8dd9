"""Whose numbers were wrong, over a run: what the engines' verdicts (training/guard.py) say about places and nodes.

A moment's error is held against its node, as a death is. A place that is wrong again, or whose errors last, is faulty:
it goes as soon as somebody else can have its seat. Ranks that may have been right are never held to account.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from raytron.actors.members import Member
from raytron.actors.policy import Fault

__all__ = ["Suspects"]


class Suspects:
    """Attributes:
    faulty: places that are not to be trusted any more.
    """

    def __init__(self) -> None:
        self._wrong: set[str] = set()
        self.faulty: set[str] = set()

    def judged(self, verdict: Mapping[str, Any], members: Iterable[Member], now_s: float) -> list[Fault]:
        """Take note of a verdict, as a step's record tells it; what is to be held against nodes for it.

        Ranks may have moved since: a process is known by host and process id.
        """
        if verdict["kind"] != "hardware" or not verdict["sure"]:
            return []
        guilty = {tuple(host) for host in verdict["hosts"]}
        faults = []
        for member in members:
            if (member.where.host, member.where.pid) in guilty:
                if verdict["lasting"] or member.name in self._wrong:
                    self.faulty.add(member.name)
                self._wrong.add(member.name)
                faults.append(Fault(now_s, member.where.node, "numbers", (member.name,)))
        return faults
