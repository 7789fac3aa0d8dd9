"""What judges an answer: rewards, their sum, and the wrapper that turns a failed one into "no verdict".

A reward is any `async (prompt, answer) -> float`. It raises when it has no opinion (a judge that can't be reached, a
checker that hangs): a number is always a verdict. `judged` is what environments use.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from raytron.rl.environments.base import Generated, Judge, Prompt, Verdict

__all__ = ["Overall", "PerLoop", "Reward", "Weighted", "judged", "overall"]

T = TypeVar("T")


class Reward(Protocol):
    """Judges one answer. `answer.text` is set. May have `concurrency`: how many answers it can judge at once."""

    async def __call__(self, prompt: Prompt, answer: Generated) -> float: ...


class PerLoop(Generic[T]):
    """One of something for each event loop: what asyncio makes belongs to the loop that first used it."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: WeakKeyDictionary[asyncio.AbstractEventLoop, T] = WeakKeyDictionary()

    def __call__(self) -> T:
        """That of the running loop."""
        loop = asyncio.get_running_loop()
        if loop not in self._made:
            self._made[loop] = self._make()
        return self._made[loop]


def judged(reward: Reward, timeout_s: float = 60.0, concurrency: int | None = None) -> Judge:
    """`reward` as a judge: an exception, a timeout and a number that isn't finite are no verdict, with the reason.

    Args:
        timeout_s: for one answer, from when its turn has come.
        concurrency: answers judged at once; by default what the reward says of itself, else 64.
    """
    turns = PerLoop(lambda: asyncio.Semaphore(concurrency or getattr(reward, "concurrency", 64)))
    name = getattr(reward, "__name__", type(reward).__name__)

    async def judge(prompt: Prompt, answer: Generated) -> Verdict:
        async with turns():
            limit = asyncio.timeout(timeout_s)
            try:
                async with limit:
                    value = float(await reward(prompt, answer))
            except Exception as error:
                late = limit.expired()
                reason = f"no verdict within {timeout_s:g} s" if late else f"{type(error).__name__}: {error}"
                return Verdict(None, f"{name}: {reason}")
        return Verdict(value) if math.isfinite(value) else Verdict(None, f"{name}: the reward is {value}")

    return judge


class Overall(Protocol):
    """Judges an episode when it is over. Cannot raise.

    answer: all that followed the prompt, what the environment said in between included. own: the reward that the
    environment gave, None where it could not judge.
    """

    async def __call__(self, prompt: Prompt, answer: Generated, own: float | None) -> Verdict: ...


def overall(reward: Reward, weight: float = 0.0, timeout_s: float = 600.0) -> Overall:
    """`reward` plus `weight` x the environment's own, which is not asked for where its weight is 0.

    As in `judged`, what fails or takes longer than `timeout_s` is no verdict.
    """
    judge = judged(reward, timeout_s)

    async def total(prompt: Prompt, answer: Generated, own: float | None) -> Verdict:
        if weight and own is None:
            return Verdict(None)  # the environment has said why
        verdict = await judge(prompt, answer)
        return Verdict(verdict.reward + weight * own) if weight and verdict.reward is not None else verdict

    return total


class Weighted:
    """Sum of weight x reward, all judged at once; where one fails the sum does.

    >>> Weighted((1.0, Maths()), (0.1, Matches(r".*####.*")))
    """

    def __init__(self, *parts: tuple[float, Reward]) -> None:
        if not parts:
            raise ValueError("a weighted sum needs at least one (weight, reward)")
        self._parts = parts
        self.concurrency = min(getattr(reward, "concurrency", 64) for _, reward in parts)

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        parts = [asyncio.ensure_future(reward(prompt, answer)) for _, reward in self._parts]
        try:
            values = await asyncio.gather(*parts)
        finally:
            for part in parts:  # of a sum that will not be whole
                part.cancel()
        return math.fsum(weight * value for (weight, _), value in zip(self._parts, values, strict=True))
