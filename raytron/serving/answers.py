"""One HTTP request being answered: its prompts given to the backend, outputs merged, the client's leaving noticed.

    answer = Answer(...)            counts and times it
    await answer.start(http)        until the first output: errors before that are proper HTTP errors
    async for outputs in answer     [(prompt number, Output), ...] as they come
    await answer.close()            whatever happened: aborts what is unfinished, writes the metrics

A client that leaves is noticed at once, streaming or not: one task waits for ASGI's `http.disconnect` beside the work,
and cancels it. Starlette's own responses notice only at the next send, which for a request in the queue is too late.

An answer in one piece outlives its engine: nobody has seen any of it, so it is asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from raytron.inference import EngineFailed, Output, Overloaded, Request
from raytron.serving.backend import Interrupted
from raytron.serving.metrics import Timer
from raytron.serving.protocol import Refused

__all__ = ["Answer", "ClientGone", "EventStream", "Source", "refusal", "unless_gone"]

ATTEMPTS = 10  # of an answer in one piece, whose engine may be lost in the middle each time
T = TypeVar("T")
Numbered = list[tuple[int, Output]]


class Source(Protocol):
    """Where outputs come from; a `Backend` is one."""

    def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        """See `Backend.generate`."""


class ClientGone(Exception):  # noqa: N818
    """The client closed the connection before it had its answer."""


def refusal(error: BaseException) -> Refused | None:
    """An engine's error as HTTP tells it; None for what should never have happened."""
    match error:
        case Refused():
            return error
        case Overloaded():
            wait = {"Retry-After": str(max(1, round(error.retry_after_s)))}
            return Refused(f"{error}; try again later", status=429, code="overloaded", headers=wait)
        case EngineFailed():
            return Refused(str(error), status=503, code="engine_unavailable", headers={"Retry-After": "5"})
        case ValueError():
            return Refused(str(error))
    return None


class Answer:
    """The outputs of one HTTP request's prompts. `requests` are numbered as they stand.

    unseen: nobody sees anything before the end, so what an engine takes with it may be asked for again.
    """

    def __init__(
        self, source: Source, model: str, requests: Sequence[Request], timer: Timer, unseen: bool = False
    ) -> None:
        self.timer, self.requests = timer, requests
        if unseen:
            streams = [_unseen(source, model, request, timer) for request in requests]
        else:
            streams = [source.generate(model, request) for request in requests]
        self._outputs = _numbered(streams[0]) if len(streams) == 1 else _merged(streams)
        self._first: Numbered | None = None
        self.first_version = timer.version

    async def start(self, http: HTTPRequest) -> None:
        """Wait for the first output. Raises what the backend raises, and ClientGone."""
        self._first = await unless_gone(http, self._next())
        versions = (version for _, output in self._first or () for version in output.versions)
        self.first_version = next(versions, self.first_version)

    async def _next(self) -> Numbered | None:
        return await anext(self._outputs, None)

    async def __aiter__(self) -> AsyncGenerator[Numbered, None]:
        outputs, self._first = self._first or await self._next(), None
        while outputs is not None:
            self.timer.saw([output for _, output in outputs])
            if failed := next((o for _, o in outputs if o.finish_reason == "error"), None):
                raise EngineFailed(failed.error or "the engine gave up on this request")
            yield outputs
            outputs = await self._next()
        self.timer.status = "finished"

    async def all(self, http: HTTPRequest) -> list[Numbered]:
        """Everything, for an answer in one piece. Raises as `start` does."""

        async def gather() -> list[Numbered]:
            return [outputs async for outputs in self]

        return await unless_gone(http, gather())

    def failed(self, error: BaseException) -> None:
        """Note what ended it early."""
        refused = isinstance(error, ValueError | Refused | Overloaded)
        gone = isinstance(error, ClientGone | asyncio.CancelledError | GeneratorExit)
        self.timer.status = "abandoned" if gone else "refused" if refused else "failed"

    async def close(self) -> None:
        """Abort what is unfinished and write the metrics."""
        try:
            await self._outputs.aclose()
        finally:
            self.timer.end()


async def _unseen(source: Source, model: str, request: Request, timer: Timer) -> AsyncGenerator[list[Output], None]:
    """The outputs of a request once they are all there, from engines that may be lost on the way."""
    kept: list[list[Output]] = []
    for attempt in range(ATTEMPTS):
        kept.clear()
        try:
            async with contextlib.aclosing(source.generate(model, request)) as stream:
                async for outputs in stream:
                    timer.began()
                    kept.append(outputs)
            break
        except Interrupted:
            if attempt == ATTEMPTS - 1:
                raise
        except Overloaded as error:  # it was taken on once, and is not refused now
            if attempt in (0, ATTEMPTS - 1):
                raise
            await asyncio.sleep(error.retry_after_s)
    for outputs in kept:
        yield outputs


async def _numbered(stream: AsyncGenerator[list[Output], None]) -> AsyncGenerator[Numbered, None]:
    async with contextlib.aclosing(stream):
        async for outputs in stream:
            yield [(0, output) for output in outputs]


async def _merged(streams: Sequence[AsyncGenerator[list[Output], None]]) -> AsyncGenerator[Numbered, None]:
    """Outputs of several requests as they come; the first error ends all of them."""
    arrived: asyncio.Queue[Numbered | BaseException | None] = asyncio.Queue()

    async def pump(number: int, stream: AsyncGenerator[list[Output], None]) -> None:
        try:
            async with contextlib.aclosing(stream):
                async for outputs in stream:
                    arrived.put_nowait([(number, output) for output in outputs])
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    pumps = [asyncio.ensure_future(pump(number, stream)) for number, stream in enumerate(streams)]
    try:
        running = len(pumps)
        while running:
            outputs = await arrived.get()
            if isinstance(outputs, BaseException):
                raise outputs
            if outputs is None:
                running -= 1
            else:
                yield outputs
    finally:
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def unless_gone(http: HTTPRequest, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`. If the client leaves it is cancelled, and ClientGone raised. Read the body before."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(http.receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for one in (task, gone):
            one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events of an answer, which is closed when they end or the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, answer: Answer, events: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]
        self.answer, self.events = answer, events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        sending = asyncio.ensure_future(self._send(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait((sending, gone), return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        finally:
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self.events.aclose()
            await self.answer.close()  # not left to `events`: closed before its first step, it would do nothing

    async def _send(self, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self.events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError:  # the connection broke; `gone` says so too, a moment later
            return
