"""Requests for rollouts until they are answered: which engine has which, and what has yet to be issued, or again.

No processes here: `rollout` sends what `batches` says, and tells of what engines answered and which of them are gone.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from raytron.actors.fleet import Balancer
from raytron.actors.rollout_engine import Done
from raytron.inference import Request, SamplingParams

__all__ = ["Generated", "Pending", "Requests", "RolloutError"]


class RolloutError(RuntimeError):
    """A request could not be answered: its engines died, too often, or none is left."""


@dataclass(frozen=True)
class Generated:
    """One answer. token_ids int32 [T], logprobs float32 [T], versions int32 [T] of the weights that chose them.

    finish_reason: "stop", "length", or "abort" where a weight update or `RolloutGroup.abort` cut it short. engine: the
    number of the one that answered. cached_tokens: of the prompt, not computed again.
    """

    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    engine: int = 0
    cached_tokens: int = 0


class Pending:
    """A request until it is answered, which `future` hears of. engine: who has it."""

    __slots__ = ("avoid", "cost", "engine", "future", "group", "lives", "request")

    def __init__(self, request: Request, group: Hashable, lives: int) -> None:
        self.request, self.group, self.lives = request, group, lives
        self.future: asyncio.Future[Generated] = asyncio.get_running_loop().create_future()
        self.cost = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        self.engine: int | None = None
        self.avoid: set[int] = set()


class Requests:
    """Of one event loop.

    Args:
        engines: how many there are; they go by their numbers.
        attempts: how often a request is issued before its engines' failures are its own.
    """

    def __init__(self, engines: int, attempts: int) -> None:
        self._attempts = attempts
        self._balancer = Balancer(engines)
        self._names = map(str, itertools.count())
        self._pending: dict[str, Pending] = {}
        self._waiting: deque[Pending] = deque()
        self._emptied: dict[int, asyncio.Event] = {}

    def joining(self) -> None:
        """There is another engine."""
        self._balancer.joining()

    def add(self, token_ids: Sequence[int], params: SamplingParams, group: Hashable) -> Pending:
        """A new one."""
        request = Request(next(self._names), tuple(token_ids), params)
        pending = self._pending[request.id] = Pending(request, group, self._attempts)
        self._waiting.append(pending)
        return pending

    def batches(self, ready: Sequence[int]) -> dict[int, list[Request]]:
        """What each engine of those ready is to be given of what waits; they have it from now on."""
        batches: dict[int, list[Request]] = {}
        while self._waiting:
            pending = self._waiting.popleft()
            if not pending.future.done():
                pending.engine = self._balancer.choose(pending.cost, ready, pending.group, pending.avoid)
                batches.setdefault(pending.engine, []).append(pending.request)
        return batches

    def deliver(self, engine: int, done: Sequence[Done]) -> None:
        """An engine has answered."""
        for id, tokens, logprobs, versions, reason, cached, invalid in done:
            pending = self._pending.get(id)
            if pending is None or pending.engine != engine:  # nobody waits for it, or another engine answers it now
                continue
            del self._pending[id]
            self._settled(engine, pending)
            if pending.future.done():
                continue
            if invalid is not None:
                pending.future.set_exception(ValueError(invalid))
            else:
                pending.future.set_result(Generated(tokens, logprobs, versions, reason, engine, cached))

    def requeue(self, engine: int, reason: str, blame: bool = True) -> int:
        """Have issued again what an engine had, which has failed (blame) or left; how much that was."""
        mine = [pending for pending in self._pending.values() if pending.engine == engine]
        for pending in mine:
            self._settled(engine, pending)
            pending.engine = None
            if blame:
                pending.avoid.add(engine)
                pending.lives -= 1
            if pending.lives <= 0:
                self._fail(pending, RolloutError(f"its engines failed {self._attempts} times, the last one: {reason}"))
            else:
                self._waiting.append(pending)
        return len(mine)

    def forget(self, pending: Pending) -> int | None:
        """Nobody waits for it any more; the engine that has it, if one has."""
        if self._pending.pop(pending.request.id, None) is None or pending.engine is None:
            return None
        self._settled(pending.engine, pending)
        return pending.engine

    def fail_all(self, error: Exception) -> None:
        """None will be answered."""
        for pending in list(self._pending.values()):
            self._fail(pending, error)

    def fail_waiting(self, error: Exception) -> None:
        """None of those that no engine has will be answered."""
        while self._waiting:
            self._fail(self._waiting.popleft(), error)

    async def emptied(self, engine: int, within_s: float) -> None:
        """Wait until the engine has answered all it has, or for so long."""
        if self._balancer.outstanding[engine]:
            emptied = self._emptied[engine] = asyncio.Event()
            with suppress(TimeoutError):
                await asyncio.wait_for(emptied.wait(), within_s)

    def outstanding(self, engine: int) -> int:
        """Tokens that an engine has to compute at most."""
        return self._balancer.outstanding[engine]

    def counts(self) -> Counter[int | None]:
        """How many each engine has; those that none has under None."""
        return Counter(pending.engine for pending in self._pending.values())

    def _settled(self, engine: int, pending: Pending) -> None:
        """It has left the engine."""
        self._balancer.done(engine, pending.cost)
        if not self._balancer.outstanding[engine] and (emptied := self._emptied.get(engine)):
            emptied.set()

    def _fail(self, pending: Pending, error: Exception) -> None:
        self._pending.pop(pending.request.id, None)
        if not pending.future.done():
            pending.future.set_exception(error)
