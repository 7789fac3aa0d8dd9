"""The actor around one rollout engine: requests in, what has ended out, by a long poll that also says it is well.

    submit(requests) -> EngineLoop -> outputs of each step -> kept until the request's end -> collect()

Outputs of a request are kept here until its end: rollouts are not streamed, and a message a step would cost more than
the step.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import ray

from raytron.actors.fleet import Progress
from raytron.actors.placement import Berth
from raytron.config import EngineConfig
from raytron.inference import Engine, EngineFailed, EngineLoop, NativeEngine, Output, Pushed, Request, Stats
from raytron.inference.types import PauseMode

__all__ = ["Done", "RolloutEngine", "Start", "Started"]

Start = Callable[..., Engine]  # (config, each), and the berths where there are any
QUEUE = 1 << 30  # requests that may wait in an engine: admission is the driver's affair


class Started(NamedTuple):
    """Of an engine that runs: its node, its context, the version of its weights (None: it has none yet), the GPU that
    all of it is on (`device_memory.identity`), and its node's name."""

    node: str
    pid: int
    max_model_len: int
    version: int | None
    device: str = ""
    host: str = ""


class Done(NamedTuple):
    """One request's end: the parts of `Generated`, or the message of a ValueError."""

    id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: str
    cached_tokens: int
    invalid: str | None


@dataclass(slots=True)
class _Growing:
    """A request in an engine."""

    close: Callable[[], None] | None = None
    outputs: list[Output] = field(default_factory=list)


@ray.remote(max_restarts=0, max_task_retries=0)
class RolloutEngine:
    """Everything but the engine's own thread runs on the actor's event loop."""

    async def start(
        self, config: EngineConfig, each: Mapping[str, float], start: Start, berths: Sequence[Berth] = ()
    ) -> Started:
        """Make the engine, with `berths` on seats it shares. Raises as `start_engine`."""
        engine = await asyncio.to_thread(start, config, each, *([berths] if berths else []))
        self._loop = EngineLoop(engine, max_queue=QUEUE, name="rollouts")
        self._growing: dict[str, _Growing] = {}
        self._done: list[Done] = []
        self._failure: EngineFailed | None = None
        self._news = asyncio.Event()
        self._progress = Progress()
        node = ray.get_runtime_context().get_node_id()
        version = None if config.weights == "await" else engine.version
        device = engine.device if isinstance(engine, NativeEngine) else ""
        return Started(node, os.getpid(), engine.max_model_len, version, device, socket.gethostname())

    async def submit(self, requests: Sequence[Request]) -> None:
        """Take requests in; `collect` tells how they ended."""
        for request in requests:
            growing = self._growing[request.id] = _Growing()
            try:
                growing.close = self._loop.subscribe(request, lambda o, e, id=request.id: self._receive(id, o, e))
            except EngineFailed as error:
                self._fail(error)
            except ValueError as error:
                self._end(request.id, str(error))

    def _receive(self, id: str, outputs: list[Output], error: BaseException | None) -> None:
        growing = self._growing.get(id)
        if growing is None:
            return
        growing.outputs += outputs
        if isinstance(error, ValueError):
            self._end(id, str(error))
        elif error is not None:
            self._fail(EngineFailed(str(error)))
        elif outputs and outputs[-1].finish_reason is not None:
            self._end(id, None)

    def _end(self, id: str, invalid: str | None) -> None:
        growing = self._growing.pop(id)
        if growing.close is not None:
            growing.close()
        self._done.append(_done(id, growing.outputs, invalid))
        self._news.set()

    def _fail(self, error: EngineFailed) -> None:
        self._failure = self._failure or error
        self._news.set()

    async def collect(self, poll_s: float, timeout_s: float) -> list[Done]:
        """What has ended since the last call, as soon as something has.

        After `poll_s` without news it says nothing, as soon as the engine's thread has answered too: while that is at
        one step, there is no reply. Raises EngineFailed when the engine can answer no more, or has had work for
        `timeout_s` and not moved; what had ended before is told first.
        """
        if not self._news.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), poll_s)
            if not self._news.is_set():
                await self._check(timeout_s)
        done, self._done = self._done, []
        if self._failure is not None and not done:
            raise self._failure
        if self._failure is None:
            self._news.clear()
        return done

    async def _check(self, timeout_s: float) -> None:
        """A rank that died while nothing ran is noticed here, and an engine whose steps lead nowhere."""
        stats = await self._loop.stats()
        if stats.health != "ready" and not stats.health.startswith("stale"):
            self._fail(EngineFailed(stats.health))
        stuck_s = self._progress.stuck_s(stats, time.monotonic())
        if stuck_s >= timeout_s:
            self._fail(EngineFailed(f"it has had work for {stuck_s:.0f} s and made no progress"))

    async def abort(self, ids: Sequence[str]) -> None:
        """End requests that nobody waits for any more."""
        for id in ids:
            growing = self._growing.pop(id, None)
            if growing is not None and growing.close is not None:
                growing.close()

    async def update(self, weights: Pushed | str, mode: PauseMode, version: int) -> tuple[int, int | None]:
        """Take new weights in; the version and the folded checksum of those that it then holds (`Engine.confirmed`)."""
        await self._loop.update_weights(weights, mode, version)
        return self._loop.version, self._loop.engine.confirmed

    async def verify(self, pushed: Pushed) -> tuple[int, int | None]:
        """The same of what it holds now. Raises WeightUpdateError naming a tensor that was not pushed so."""
        return await self._loop.call(lambda engine: (engine.version, engine.verify(pushed)))

    async def pause(self, mode: PauseMode) -> None:
        """Compute nothing until `resume`; see `Engine.pause`."""
        await self._loop.pause(mode)

    async def resume(self) -> None:
        """Go on."""
        await self._loop.resume()

    async def sleep(self, weights: bool) -> None:
        """Compute nothing until `wake`, and give memory back; see `Engine.sleep`."""
        await self._loop.sleep(weights)

    async def wake(self) -> None:
        """Go on."""
        await self._loop.wake()

    async def stats(self) -> Stats:
        """The engine's numbers."""
        return await self._loop.stats()

    async def close(self) -> None:
        """Give the engine's processes and memory back."""
        await asyncio.to_thread(self._loop.close)


def _done(id: str, outputs: Sequence[Output], invalid: str | None) -> Done:
    def joined(name: str, dtype: type) -> np.ndarray:
        return np.array([value for output in outputs for value in getattr(output, name)], dtype=dtype)

    last = outputs[-1].finish_reason if outputs else ""
    cached = max((output.cached_tokens for output in outputs), default=0)
    arrays = joined("token_ids", np.int32), joined("logprobs", np.float32), joined("versions", np.int32)
    return Done(id, *arrays, last, cached, invalid)
