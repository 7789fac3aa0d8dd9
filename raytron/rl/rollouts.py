"""Groups rolled out ahead of the training that waits for them: the asynchronous half of the driver. No Ray.

    launch() --as many as the buffer admits--> run_group(...) -> journal -> buffer -> next_batch()

One coroutine a group on the driver's event loop; engines are elsewhere, behind `generate`. While the trainer computes
in its actors the loop is free, so groups go on; how far ahead is the buffer's affair (`max_staleness`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

from raytron.rl.buffer import Buffer, Journal
from raytron.rl.types import Group

__all__ = ["Rollouts", "why_unjudged"]

LOOK_S = 0.5  # how often a wait looks whether it is to stop
PATIENCE = 4  # batches' worth of groups in a row without one verdict, before the run ends


class Rollouts:
    """Keeps the buffer filled.

    Args:
        buffer: which groups may start, and which make a batch.
        journal: where finished groups are recorded before they may be trained on.
        roll: rolls out the group of an index.

    Attributes:
        excluded: trajectories that could not be judged, so far.
    """

    def __init__(self, buffer: Buffer, journal: Journal, roll: Callable[[int], Awaitable[Group]]) -> None:
        self.buffer, self.journal, self._roll = buffer, journal, roll
        self.excluded, self._in_vain = 0, 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None

    def launch(self) -> None:
        """Start every group that may start now."""
        for index in self.buffer.admit():
            task = asyncio.get_running_loop().create_task(self._group(index))
            self._tasks.add(task)
            task.add_done_callback(self._done)

    async def next_batch(self, stopped: Callable[[], bool] = lambda: False) -> list[Group] | None:
        """The groups of the next training step; None once `stopped()`, which a signal may make true at any time.

        Raises what a rollout raised that is no trajectory's own failure.
        """
        self.launch()
        while not stopped():
            if self._failure is not None:
                raise self._failure
            if (groups := self.buffer.batch()) is not None:
                return groups
            self._changed.clear()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), LOOK_S)
        return None

    async def cancel(self) -> None:
        """End what is under way; it is rolled out again by whoever goes on from the journal."""
        for task in self._tasks:
            task.cancel()
        for task in list(self._tasks):
            with suppress(asyncio.CancelledError, Exception):
                await task

    async def _group(self, index: int) -> None:
        group = await self._roll(index)
        self.journal.group(group)
        self.excluded += len(group.trajectories) - len(group.valid)
        self._in_vain = 0 if group.valid else self._in_vain + 1
        if self._in_vain >= PATIENCE * self.buffer.size:
            raise RuntimeError(f"no answer of the last {self._in_vain} prompts could be judged: {why_unjudged(group)}")
        self.buffer.put(group)
        self.launch()  # one that is not kept makes room for another

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._failure = self._failure or task.exception()
        self._changed.set()


def why_unjudged(*groups: Group) -> str:
    """The first reason that groups without a verdict give."""
    errors = (str(t.info["error"]) for group in groups for t in group.trajectories if "error" in t.info)
    return next(errors, "no token was chosen")
