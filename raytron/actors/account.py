"""How much of a run's time its steps were worth: what goodput is counted from. Pure; clocks are the caller's.

A step's seconds, as the ranks measured them, count once, when the driver hears of it, and no longer once it has to be
done again. They never count for more than has gone by since the work at hand began: the first step of a group may have
waited for a load, and one that was finished after a fault for the fault to be noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from math import inf
from statistics import median

__all__ = ["Account"]

KNOWN = 65_536  # steps that can be taken back: the newest
RECENT = 50  # steps whose median says how long one takes


class Account:
    """Of one start of a run.

    Attributes:
        useful_s: seconds of the steps that count.
    """

    def __init__(self, now: float) -> None:
        self.useful_s = 0.0
        self._steps: deque[tuple[int, float]] = deque(maxlen=KNOWN)
        self._began, self._before, self._heard = now, 0.0, now

    @property
    def step_s(self) -> float:
        """The median of the last steps, 0 before there are any."""
        recent = [seconds for _, seconds in list(self._steps)[-RECENT:]]
        return median(recent) if recent else 0.0

    def begins(self, now: float) -> None:
        """Something new is begun."""
        self._began, self._before, self._heard = now, self.useful_s, now

    def unheard_s(self, now: float) -> float:
        """Seconds since anything was begun or done."""
        return max(0.0, now - self._heard)

    def step(self, number: int, seconds: float, now: float, most: float = inf) -> float:
        """Step `number` is done; what it counts for, at most `most`. One that was done before counts no more."""
        self.back_to(number - 1)
        room = self._before + (now - self._began) - self.useful_s
        counted = max(0.0, min(seconds, most, room))
        self.useful_s += counted
        self._steps.append((number, counted))
        self._heard = now
        return counted

    def regained(self, steps: Iterable[tuple[int, float]], now: float) -> float:
        """(number, seconds) of steps that were done before a fault, or finished after it, and not heard of before it;
        what they count for."""
        usual = self.step_s or inf
        return sum(self.step(number, seconds, now, usual) for number, seconds in steps)

    def back_to(self, step: int) -> float:
        """The steps after `step` are to be done again: what they counted for."""
        lost = 0.0
        while self._steps and self._steps[-1][0] > step:
            lost += self._steps.pop()[1]
        self.useful_s = max(0.0, self.useful_s - lost)
        return lost
