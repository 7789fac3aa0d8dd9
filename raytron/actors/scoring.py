"""Scorers in actors: replicas behind one `await score(tokens)`, batched by what waits while they compute.

    score --+
    score --+--> waiting --one message when a replica is free--> replica: an ActorGroup of tp ranks with a `Scorer` each
    score --+                                                    <-- a score for each

A replica that fails, or does not answer a message in time, is ended and started again, and its sequences go to whoever
is free next. Nothing is ever scored by default: what cannot be scored raises.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raytron.actors.failures import WorkerError
from raytron.actors.group import ActorGroup
from raytron.actors.placement import CapacityError
from raytron.parallel.mesh import Mesh

__all__ = ["ScorerGroup", "ScoringError"]

log = logging.getLogger(__name__)

REPLACE_S = 30.0  # for the seats of a replica that has ended to be free again
CLOSE_S = 1.0  # a scorer has nothing to finish


class ScoringError(RuntimeError):
    """A sequence could not be scored: its replicas failed, too often, or none is left."""


@dataclass(eq=False)
class _Pending:
    """A sequence until it is scored."""

    tokens: tuple[int, ...]
    lives: int
    future: asyncio.Future[np.ndarray] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class ScorerGroup:
    """Replicas that score sequences together; use it with `async with`, or `start` and `close` it on one event loop.

    Args:
        make: `make(world, *args)` is a rank's scorer: an object with `score(sequences)`, which returns an array
            [N, ...] from the first rank.
        args: sent to every rank.
        replicas: how many, each in a placement group of its own. tp: ranks of one.
        each: resources of a rank, by Ray's names; by default one CPU slot.
        most_tokens: of one message; a longer sequence travels alone.
        max_failures: how often replicas are started again, all together; -1 is any number.
        attempts: how often a sequence is tried before its replicas' failures are its own.
        timeout_s: a replica that takes longer for a message counts as failed.
        wait_s: how long to wait for the cluster to grant seats.

    Attributes:
        failures: of replicas, so far.
        on_state: told what a replica does from now on: "scoring", "idle", "restarting" or "lost".
    """

    def __init__(
        self,
        make: Callable[..., Any],
        args: Sequence[Any] = (),
        *,
        replicas: int = 1,
        tp: int = 1,
        each: Mapping[str, float] | None = None,
        most_tokens: int = 65536,
        max_failures: int = 3,
        attempts: int = 3,
        timeout_s: float = 120.0,
        wait_s: float = 30.0,
    ) -> None:
        self._make, self._args, self._mesh, self._each = make, tuple(args), Mesh(tp=tp), each
        self._most, self._attempts, self._timeout_s, self._wait_s = most_tokens, attempts, timeout_s, wait_s
        self._max_failures, self.failures = max_failures, 0
        self._replicas: list[ActorGroup | None] = [None] * replicas
        self._tasks: list[asyncio.Task[None]] = []
        self._left, self._idle = replicas, 0
        self._waiting: deque[_Pending] = deque()
        self._unscored: set[_Pending] = set()  # those that wait, and what replicas have
        self._changed = asyncio.Condition()
        self._ended = ""  # why nothing can be scored any more
        self.on_state: Callable[[int, str], None] | None = None

    # ---------------------------------------------------------------------------------------------------------- a life

    async def start(self) -> ScorerGroup:
        """Take the seats and start all replicas; returns when they run.

        Raises:
            CapacityError: the cluster did not grant the seats in time; nothing stays reserved.
            WorkerError: a replica's own reason not to start.
        """
        starts = (asyncio.to_thread(self._started, self._wait_s) for _ in self._replicas)
        found = await asyncio.gather(*starts, return_exceptions=True)
        self._replicas = [None if isinstance(group, BaseException) else group for group in found]
        if (error := next((one for one in found if isinstance(one, BaseException)), None)) is not None:
            await self.close()
            raise error
        self._tasks = [asyncio.ensure_future(self._attend(replica)) for replica in range(len(found))]
        return self

    def _started(self, wait_s: float) -> ActorGroup:
        group = ActorGroup(self._mesh, self._each, wait_s=wait_s)
        try:
            group.create(self._make, *self._args)
            if self._ended:
                raise ScoringError(self._ended)
        except BaseException:
            group.shutdown(CLOSE_S)
            raise
        return group

    async def close(self) -> None:
        """End the replicas and give their seats back; what waits raises ScoringError. Twice does nothing."""
        self._end("the scorers were closed")
        for task in self._tasks:
            task.cancel()
        groups = [group for group in self._replicas if group is not None]
        self._replicas = [None] * len(self._replicas)
        await asyncio.gather(*(asyncio.to_thread(group.shutdown, CLOSE_S) for group in groups))

    async def __aenter__(self) -> ScorerGroup:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # --------------------------------------------------------------------------------------------------------- scoring

    async def score(self, tokens: Sequence[int]) -> np.ndarray:
        """The scores of one sequence. Raises ScoringError when no replica could give them."""
        if self._ended:
            raise ScoringError(self._ended)
        pending = _Pending(tuple(tokens), self._attempts)
        self._unscored.add(pending)
        try:
            await self._wait([pending])
            return await pending.future
        finally:
            self._unscored.discard(pending)

    async def _wait(self, some: Sequence[_Pending]) -> None:
        """Put them where replicas look."""
        self._waiting.extend(some)
        async with self._changed:
            self._changed.notify_all()

    async def _attend(self, replica: int) -> None:
        """Give a replica one message after another; replace it when it fails, as often as that is allowed."""
        try:
            while (group := self._replicas[replica]) is not None:
                batch = await self._next()
                self._tell(replica, "scoring")
                try:
                    calls = group.submit("score", [pending.tokens for pending in batch])
                    scores = (await asyncio.to_thread(calls.results, self._timeout_s))[0]
                except (WorkerError, TimeoutError) as error:
                    await self._replace(replica, batch, _reason(error))
                    continue
                self._tell(replica, "idle")
                for pending, score in zip(batch, scores, strict=True):
                    if not pending.future.done():
                        pending.future.set_result(score)
        except Exception as error:  # nobody awaits this task: those who wait for scores must hear of it
            log.exception("the scorers failed")
            self._end(f"the scorers failed: {error}")

    async def _next(self) -> list[_Pending]:
        """A fair share of what waits, as soon as something does; what nobody awaits any more is passed over."""
        self._idle += 1
        try:
            async with self._changed:
                await self._changed.wait_for(lambda: any(not pending.future.done() for pending in self._waiting))
                return self._share()
        finally:
            self._idle -= 1

    def _share(self) -> list[_Pending]:
        self._waiting = deque(pending for pending in self._waiting if not pending.future.done())
        most = -(-len(self._waiting) // self._idle)
        batch = [self._waiting.popleft()]
        tokens = len(batch[0].tokens)
        while self._waiting and len(batch) < most and tokens + len(self._waiting[0].tokens) <= self._most:
            batch.append(self._waiting.popleft())
            tokens += len(batch[-1].tokens)
        return batch

    async def _replace(self, replica: int, batch: Sequence[_Pending], reason: str) -> None:
        """Issue again what a failed replica had, and start it anew; it is left out once that was too often."""
        log.warning("scorer %d failed: %s", replica, reason)
        self._tell(replica, "restarting")
        for pending in batch:
            pending.lives -= 1
            if not pending.lives and not pending.future.done():
                pending.future.set_exception(ScoringError(f"its scorers failed {self._attempts} times, last: {reason}"))
        await self._wait([pending for pending in batch if not pending.future.done()])
        group, self._replicas[replica] = self._replicas[replica], None
        await asyncio.to_thread(group.shutdown, CLOSE_S)
        while self._replicas[replica] is None and self._may_start(reason):
            try:
                self._replicas[replica] = await asyncio.to_thread(self._started, max(self._wait_s, REPLACE_S))
            except (WorkerError, CapacityError) as error:
                reason = f"it did not start again: {_reason(error)}"
        self._tell(replica, "idle" if self._replicas[replica] is not None else "lost")

    def _tell(self, replica: int, what: str) -> None:
        if self.on_state is not None:
            self.on_state(replica, what)

    def _may_start(self, reason: str) -> bool:
        """Whether a failed replica is started again; what waits is told when none is left."""
        self.failures += 1
        again = self._max_failures < 0 or self.failures <= self._max_failures
        self._left -= not again
        if not self._left:
            self._end(f"no scorer is left: {reason}")
        return again

    def _end(self, why: str) -> None:
        self._ended = self._ended or why
        for pending in self._unscored:
            if not pending.future.done():
                pending.future.set_exception(ScoringError(why))


def _reason(error: BaseException) -> str:
    """One line."""
    if isinstance(error, WorkerError):
        return f"{error.failure.kind}: {error.failure.message}".splitlines()[0]
    return str(error).strip().splitlines()[0]
