"""An engine behind asyncio: one thread steps it, any number of coroutines send requests and read their outputs.

    event loop                                     engine thread
    generate(request) --inbox, condition--------->  add, abort, weight updates  (between two steps)
    outputs of the request  <--one call a step----  step

The thread sleeps on a condition while there is nothing to do and takes what has arrived between two steps, so a request
waits for one step at most. What a step gave is handed over by one `call_soon_threadsafe` for an event loop, however
many requests it belongs to, and by none while the last is still to come; a late reader finds what has gathered in one
list. Rejected: `asyncio.to_thread` for every step (two switches a step, no place where aborts may happen) and polling.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from raytron.inference.types import Engine, Output, PauseMode, Pushed, Request, Stats
from raytron.parallel.progress import WriterGone

__all__ = ["EngineFailed", "EngineLoop", "Overloaded"]

T = TypeVar("T")
Receive = Callable[[list[Output], BaseException | None], None]
LONGEST_RETRY_S = 60.0


class Overloaded(RuntimeError):  # noqa: N818
    """Too many requests wait already; come back after `retry_after_s` seconds."""

    def __init__(self, retry_after_s: float, message: str = "too many requests are waiting") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s

    def __reduce__(self) -> tuple[type, tuple[float, str]]:
        return type(self), (self.retry_after_s, str(self))


class EngineFailed(RuntimeError):  # noqa: N818
    """The engine can't answer: it died, holds half-loaded weights, or is being shut down. Says which."""


class _Stream:
    """One request's outputs on their way to the coroutine that reads them. Used on its event loop only."""

    def __init__(self, request: Request, outbox: deque[_Item]) -> None:
        self.request, self.outbox = request, outbox
        self.loop = asyncio.get_running_loop()
        self.arrived = time.monotonic()
        self.unfinished = request.params.n
        self.started = False
        self.outputs: list[Output] = []
        self.error: BaseException | None = None
        self.waiter: asyncio.Future[None] | None = None

    def put(self, outputs: list[Output], error: BaseException | None) -> None:
        self.outputs += outputs
        self.error = self.error or error
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def read(self) -> list[Output]:
        """What has come since the last time, at least one output. Raises the error that ended the request."""
        while not self.outputs:
            if self.error is not None:
                raise self.error
            self.waiter = self.loop.create_future()
            await self.waiter
        outputs, self.outputs = self.outputs, []
        self.unfinished -= sum(output.finish_reason is not None for output in outputs)
        return outputs


class _Push(_Stream):
    """One whose reader is a function: no coroutine wakes up for it."""

    def __init__(self, request: Request, outbox: deque[_Item], receive: Receive) -> None:
        super().__init__(request, outbox)
        self.receive = receive

    def put(self, outputs: list[Output], error: BaseException | None) -> None:
        self.unfinished -= sum(output.finish_reason is not None for output in outputs)
        self.error = self.error or error
        self.receive(outputs, error)


_Item = tuple[_Stream, list[Output], BaseException | None]


class EngineLoop:
    """Runs `engine` in a thread of its own until `close`.

    Args:
        engine: not to be touched by anyone else from now on.
        max_queue: requests that may wait for their first token; one more raises `Overloaded`.
        name: of the thread, and in messages.

    Attributes:
        waiting, running: requests before and after their first output; approximate from other threads.
    """

    def __init__(self, engine: Engine, *, max_queue: int = 256, name: str = "engine") -> None:
        self.engine, self.max_queue, self.name = engine, max_queue, name
        self.max_model_len = engine.max_model_len
        self.waiting = self.running = 0
        self._ready = threading.Condition()
        self._inbox: deque[Callable[[], None]] = deque()
        self._streams: dict[str, _Stream] = {}
        self._outboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, deque[_Item]] = WeakKeyDictionary()
        self._last_wait_s = 1.0  # how long the last request to start had waited: what a refused one is told
        self._failure: str | None = None  # the engine is dead, or stale after a failed update
        self._draining = self._closing = self._paused = False
        self._held: list[Callable[[], None]] = []  # what waits for an update that waits for the running requests
        self._updates: deque[tuple[str | Pushed, PauseMode, int | None, Future[int]]] = deque()
        self._promises: set[Future[Any]] = set()  # answers that someone waits for besides requests
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    # ---------------------------------------------------------------------------------------------- on the event loop

    @property
    def version(self) -> int:
        """Of the weights that answer now."""
        return self.engine.version

    @property
    def health(self) -> str:
        """ "ready", or why no request is answered."""
        return self._failure or ("draining" if self._draining else "ready")

    async def generate(self, request: Request) -> AsyncGenerator[list[Output], None]:
        """The outputs of `request`, as they come, those of late readers together; closing it early aborts the request.

        Raises, before the first output: ValueError for a request that can't be answered, Overloaded, EngineFailed; and
        EngineFailed at any time when the engine dies.
        """
        stream = self._open(request, _Stream)
        try:
            while stream.unfinished > 0:
                yield await stream.read()
        finally:
            self._close_stream(stream)

    def subscribe(self, request: Request, receive: Receive) -> Callable[[], None]:
        """`generate` for who passes outputs on: `receive(outputs, error)` is called, once a step, on this event loop.

        Returns the function that must be called, once, when the last output or an error has come or no more is wanted.
        """
        stream = self._open(request, lambda request, outbox: _Push(request, outbox, receive))
        return lambda: self._close_stream(stream)

    def _open(self, request: Request, make: Callable[[Request, deque[_Item]], _Stream]) -> _Stream:
        if self.health != "ready":
            raise EngineFailed(f"{self.name}: {self.health}")
        if self.waiting >= self.max_queue:
            raise Overloaded(min(max(1.0, self._last_wait_s), LONGEST_RETRY_S))
        if request.id in self._streams:
            raise ValueError(f"request id {request.id!r} is in use; choose another")
        outbox = self._outboxes.setdefault(asyncio.get_running_loop(), deque())
        stream = make(request, outbox)
        self._streams[request.id] = stream  # before it is sent: whoever ends the engine tells all of these
        if not self._send(lambda: self._add(stream)):
            del self._streams[request.id]
            raise EngineFailed(f"{self.name}: {self._failure or 'closed'}")
        self.waiting += 1
        return stream

    def _close_stream(self, stream: _Stream) -> None:
        del self._streams[stream.request.id]
        if stream.started:
            self.running -= 1
        else:
            self.waiting -= 1
        if stream.unfinished > 0 and stream.error is None:
            self._send(lambda: self._deliver(self.engine.abort([stream.request.id])))
        if self._draining and not self._streams:
            with self._ready:
                self._ready.notify_all()

    async def update_weights(self, weights: str | Pushed, mode: PauseMode = "keep", version: int | None = None) -> int:
        """Load a Hugging Face directory, or a push, while requests are in flight; the version it now answers with.

        mode: "keep" recomputes what is cached of running requests and goes on with the new weights, "wait" lets those
        already in finish first (they keep streaming), "abort" ends them. version: by default one more than now.

        Raises ValueError for a path without weights, and whatever the engine raises for weights that do not fit. If the
        old ones are no longer whole by then, it answers nothing (`EngineFailed`) until an update succeeds.
        """
        folder = Path(weights if isinstance(weights, str) else weights.path)
        there = isinstance(weights, Pushed) and bool(weights.offers)
        if not there and not any(folder.joinpath(f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
            raise ValueError(f"{folder}: no model.safetensors or model.safetensors.index.json there")
        done = self._promise()
        return await self._kept(done, lambda: self._updates.append((weights, mode, version, done)))

    async def call(self, action: Callable[[Engine], T]) -> T:
        """Run `action(engine)` in the engine's thread, between two steps. Not for requests: nobody would read them."""
        done = self._promise()
        return await self._kept(done, lambda: self._act(action, done))

    async def pause(self, mode: PauseMode = "keep") -> None:
        """Stop stepping, see `Engine.pause`; requests may be added and wait for `resume`."""
        await self.call(lambda engine: self._deliver(engine.pause(mode)))

    async def resume(self) -> None:
        """Go on after `pause`."""
        await self.call(lambda engine: engine.resume())

    async def sleep(self, weights: bool = False) -> None:
        """Stop stepping and give memory back, see `Engine.sleep`; requests may be added and wait for `wake`."""
        await self.call(lambda engine: self._deliver(engine.sleep(weights)))

    async def wake(self) -> None:
        """Go on after `sleep`."""
        await self.call(lambda engine: engine.wake())

    async def stats(self) -> Stats:
        """The engine's numbers, with the loop's view of its health."""
        try:
            stats = await self.call(lambda engine: engine.stats())
        except EngineFailed:
            return Stats(version=self.version, health=self.health)
        return replace(stats, health=self.health) if stats.health == "ready" else stats

    async def drain(self) -> None:
        """Take nothing new (`EngineFailed`) and return when every request is answered."""
        self._draining = True
        await asyncio.to_thread(self._wait_until_empty)

    def _wait_until_empty(self) -> None:
        with self._ready:
            self._ready.wait_for(lambda: not self._streams or self._closing)

    def close(self) -> None:
        """End the thread and the engine; unfinished requests raise EngineFailed. Doing it again does nothing."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _promise(self) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_running_or_notify_cancel()  # one who stops waiting doesn't undo what the engine is about to do
        self._promises.add(done)
        return done

    async def _kept(self, done: Future[Any], command: Callable[[], None]) -> Any:
        try:
            if not self._send(command):
                raise EngineFailed(f"{self.name}: {self._failure or 'closed'}")
            return await asyncio.wrap_future(done)
        finally:
            self._promises.discard(done)

    def _send(self, command: Callable[[], None]) -> bool:
        """Leave a command for the engine thread; False when there is none any more."""
        with self._ready:
            if not self._closing:
                self._inbox.append(command)
                self._ready.notify_all()
            return not self._closing

    # --------------------------------------------------------------------------------------------- on the engine thread

    def _run(self) -> None:
        try:
            while self._wait():
                self._obey()
                if not self._paused and self.engine.has_unfinished():
                    self._deliver(self.engine.step())
        except BaseException as error:  # whatever it is, those who wait must hear of it
            before = f" after {self._failure}" if self._failure else ""
            self._failure = f"failed: {type(error).__name__}: {error}{before}"
        self._end()

    def _wait(self) -> bool:
        """Sleep until there is something to do; False at the end."""
        with self._ready:
            self._ready.wait_for(
                lambda: (
                    self._closing or self._inbox or self._updates or (not self._paused and self.engine.has_unfinished())
                )
            )
            return not self._closing

    def _obey(self) -> None:
        """Do what has been asked for since the last step."""
        while self._inbox:
            self._inbox.popleft()()
        while self._updates and (self._updates[0][1] != "wait" or self._paused or not self.engine.has_unfinished()):
            self._update(*self._updates.popleft())
        if not self._waits_for_quiet():
            held, self._held = self._held, []
            for add in held:
                add()

    def _waits_for_quiet(self) -> bool:
        return any(mode == "wait" for _, mode, _, _ in self._updates)

    def _add(self, stream: _Stream) -> None:
        if self._streams.get(stream.request.id) is not stream:
            return  # closed before it was ever added
        if self._waits_for_quiet():
            self._held.append(lambda: self._add(stream))
            return
        if self._failure is not None:
            self._hand_over([(stream, [], EngineFailed(f"{self.name}: {self._failure}"))])
            return
        try:
            self.engine.add(stream.request)
        except Exception as error:  # a request the engine chokes on is that request's misfortune, not everyone's
            self._hand_over([(stream, [], error)])

    def _act(self, action: Callable[[Engine], Any], done: Future[Any]) -> None:
        try:
            done.set_result(action(self.engine))
        except Exception as error:
            done.set_exception(error)
        self._paused = self.engine.stats().paused

    def _update(self, weights: str | Pushed, mode: PauseMode, version: int | None, done: Future[int]) -> None:
        version = self.engine.version + 1 if version is None else version
        try:
            self._deliver(self.engine.start_weight_update("keep" if mode == "wait" else mode))
            self.engine.update_weights(weights)
            self.engine.finish_weight_update(version)
        except WriterGone as error:  # requests wait for the next push
            done.set_exception(error)
        except Exception as error:
            done.set_exception(error)
            if (health := self.engine.stats().health) != "ready":  # else nothing was changed: it goes on as it was
                self._failure = f"loading {weights if isinstance(weights, str) else weights.path} failed, {health}"
                self._fail_all()
                self.engine.abort(list(self._streams))
        else:
            self._failure = None
            done.set_result(version)
        self._paused = self.engine.stats().paused

    def _deliver(self, outputs: Iterable[Output]) -> None:
        """Hand every output to its reader, those of a request together; outputs nobody waits for are dropped."""
        gained: dict[str, list[Output]] = {}
        for output in outputs:
            gained.setdefault(output.request_id, []).append(output)
        streams = ((self._streams.get(id), some) for id, some in gained.items())
        self._hand_over([(stream, some, None) for stream, some in streams if stream is not None])

    def _fail_all(self) -> None:
        error = EngineFailed(f"{self.name}: {self._failure or 'closed'}")
        self._hand_over([(stream, [], error) for stream in list(self._streams.values())])

    def _hand_over(self, items: list[_Item]) -> None:
        for item in items:
            stream = item[0]
            stream.outbox.append(item)
            if len(stream.outbox) == 1:  # otherwise `_put` has been called for, and has yet to come
                with suppress(RuntimeError):  # that event loop is closed: nobody reads any more
                    stream.loop.call_soon_threadsafe(self._put, stream.outbox)

    def _put(self, outbox: deque[_Item]) -> None:
        """On the event loop: wake the readers."""
        for _ in range(len(outbox)):
            stream, outputs, error = outbox.popleft()
            if outputs and not stream.started and self._streams.get(stream.request.id) is stream:
                stream.started = True
                self._last_wait_s = time.monotonic() - stream.arrived
                self.waiting, self.running = self.waiting - 1, self.running + 1
            stream.put(outputs, error)
        if outbox:  # came meanwhile; others of this event loop first
            asyncio.get_running_loop().call_soon(self._put, outbox)

    def _end(self) -> None:
        """Tell everyone, and give the engine back."""
        with self._ready:
            self._closing = True
            self._ready.notify_all()
        self._failure = self._failure or "closed"
        self._fail_all()
        for done in list(self._promises):
            if not done.done():
                done.set_exception(EngineFailed(f"{self.name}: {self._failure}"))
        self.engine.close()
