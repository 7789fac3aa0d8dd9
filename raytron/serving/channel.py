"""Tokens on their way from engines to the HTTP side: one message a step, whatever the number of requests.

    replica: engine step -> Courier.add, add, add -> one frame ----TCP----> Mailbox -> Letters of each request -> HTTP

A Ray Serve handle could stream them, and was measured: one message for each request and step, 0.1 to 0.3 ms of Python
on both sides for each, which at 32 running requests is more than a small model's step, and in the engine's own process.
So a handle carries a request's beginning and end, which is what Serve routes, counts, scales and drains by, and the
tokens between take this way. The replica calls the HTTP side, at an address that came with the request, and proves with
the token beside it that it was asked to; frames are msgpack, so nothing that arrives is ever executed. No Ray here.
"""

from __future__ import annotations

import asyncio
import hmac
import secrets
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass

import msgpack

from raytron.inference import Output

__all__ = ["Address", "Courier", "Letters", "LostError", "Mailbox"]

LARGEST = 256 << 20  # bytes of one frame
FULL = 1 << 20  # bytes under way to a slow reader, above which outputs are gathered instead of sent
GREETING_S = 10.0  # for a caller to say who it is
LATE_S = 10.0  # for outputs that a replica says it has sent


class LostError(ConnectionError):
    """The replica, or the way from it, is gone."""


@dataclass(frozen=True)
class Address:
    """Where a mailbox is. node: Ray's id of its node; host: how other nodes reach it, None if they can't."""

    node: str
    host: str | None
    port: int
    token: bytes

    def host_for(self, node: str) -> str:
        """The host to call from `node`. Raises LostError where there is no way."""
        if node == self.node:
            return "127.0.0.1"
        if self.host is None:
            raise LostError("the HTTP side listens to its own machine only, and this replica is on another")
        return self.host


_PLAIN = ("index", "token_ids", "logprobs", "versions", "text", "finish_reason")
_RARE = ("top_logprobs", "prompt_logprobs", "prompt_top_logprobs", "cached_tokens", "stop_reason", "error")


def pack(items: Iterable[tuple[str, Output]]) -> bytes:
    """A frame of outputs, each with the name its request has on the way."""
    rows = []
    for name, output in items:
        rare = {i: value for i, field in enumerate(_RARE) if (value := getattr(output, field)) is not None}
        rows.append((name, *(getattr(output, field) for field in _PLAIN), rare))
    body = msgpack.packb(rows)
    return len(body).to_bytes(4, "big") + body


def unpack(body: bytes, id_of: Callable[[str], str | None]) -> list[tuple[str, Output]]:
    """What `pack` packed; `id_of` gives the request's own id for the name it had on the way, None drops the output."""
    result = []
    for name, index, token_ids, logprobs, versions, text, finish, rare in msgpack.unpackb(
        body, use_list=False, strict_map_key=False
    ):
        if (id := id_of(name)) is not None:
            more = {_RARE[i]: value for i, value in rare.items()}
            result.append((name, Output(id, index, token_ids, logprobs, versions, text, finish_reason=finish, **more)))
    return result


class Letters:
    """One request's outputs, as they come. Used on the mailbox's event loop only."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.received = 0
        self.sender: object | None = None
        self._outputs: list[Output] = []
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, outputs: list[Output], sender: object) -> None:
        """Outputs have come. A second sender means that the first is gone, whether or not that has been noticed yet."""
        if self.sender is not None and self.sender is not sender:
            self.fail(LostError("another replica took over in the middle of the answer"))
            return
        self.sender = sender
        self.received += len(outputs)
        self._outputs += outputs
        self._wake()

    def fail(self, error: BaseException) -> None:
        """Nothing more will come; what has come is read first."""
        self._error = self._error or error
        self._wake()

    def expect(self, sent: int) -> None:
        """So many outputs are on their way, all told: fail if they do not come."""
        if self.received < sent:
            error = LostError("the replica has answered, and its answer got lost")
            asyncio.get_running_loop().call_later(LATE_S, self.fail, error)

    async def read(self) -> list[Output]:
        """What has come since the last time, at least one output. Raises what `fail` was given."""
        while not self._outputs:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        outputs, self._outputs = self._outputs, []
        return outputs

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Mailbox:
    """Receives for any number of requests from any number of couriers.

    Args:
        node: Ray's id of this node.
        host: address of this machine that other nodes may call; None listens to this machine alone.
    """

    def __init__(self, node: str, host: str | None = None) -> None:
        self._node, self._host = node, host
        self._token = secrets.token_bytes(32)
        self._letters: dict[str, Letters] = {}
        self._servers: list[asyncio.Server] = []
        self._callers: set[asyncio.StreamWriter] = set()

    async def start(self) -> Address:
        """Listen; where."""
        server = await asyncio.start_server(self._receive, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        self._servers = [server]
        if self._host is not None:
            self._servers.append(await asyncio.start_server(self._receive, self._host, port))
        return Address(self._node, self._host, port, self._token)

    def open(self, name: str, request_id: str) -> Letters:
        """From now on outputs that come under `name` are kept, for the request `request_id`."""
        self._letters[name] = Letters(request_id)
        return self._letters[name]

    def shut(self, name: str) -> None:
        """Drop what still comes under `name`."""
        self._letters.pop(name, None)

    async def close(self) -> None:
        """Listen no more, and hang up."""
        for server in self._servers:
            server.close()
        for writer in list(self._callers):
            writer.close()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._callers.add(writer)
        try:
            async with asyncio.timeout(GREETING_S):
                greeting = await reader.readexactly(32)
            if hmac.compare_digest(greeting, self._token):
                while True:
                    size = int.from_bytes(await reader.readexactly(4), "big")
                    if size > LARGEST:
                        break
                    self._deliver(await reader.readexactly(size), writer)
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # the caller is gone, or never was one of ours
        finally:
            self._callers.discard(writer)
            writer.close()
            for letters in self._letters.values():
                if letters.sender is writer:
                    letters.fail(LostError("the replica is gone"))

    def _deliver(self, body: bytes, sender: object) -> None:
        gained: dict[str, list[Output]] = {}
        for name, output in unpack(body, self._id_of):
            gained.setdefault(name, []).append(output)
        for name, outputs in gained.items():
            self._letters[name].put(outputs, sender)

    def _id_of(self, name: str) -> str | None:
        letters = self._letters.get(name)
        return None if letters is None else letters.request_id


class Courier:
    """Carries outputs to one mailbox. Used on one event loop; `connect` makes it.

    Attributes:
        lost: done when the way is gone; its result says why.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        self._pending: list[tuple[str, Output]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._kicked = False
        self._loop = asyncio.get_running_loop()
        self.lost: asyncio.Future[str] = self._loop.create_future()
        self._watching = self._loop.create_task(self._watch(reader))

    @classmethod
    async def connect(cls, address: Address, node: str) -> Courier:
        """Call the mailbox at `address` from the node `node`. Raises LostError when nobody answers there."""
        try:
            reader, writer = await asyncio.open_connection(address.host_for(node), address.port)
        except OSError as error:
            raise LostError(f"the HTTP side can't be reached: {error}") from error
        writer.write(address.token)
        return cls(reader, writer)

    def add(self, name: str, outputs: Iterable[Output]) -> None:
        """Send these, with whatever else is added before the event loop comes round."""
        self._pending += [(name, output) for output in outputs]
        if not self._kicked:
            self._kicked = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._kicked = False
        if self._flushing is not None or self.lost.done():
            return
        batch, self._pending = self._pending, []
        self._writer.write(pack(batch))
        if self._writer.transport.get_write_buffer_size() > FULL:
            self._flushing = self._loop.create_task(self._flush())

    async def _flush(self) -> None:
        """Wait for a slow reader, outputs gathering meanwhile."""
        with suppress(OSError):  # `_watch` says so
            await self._writer.drain()
        self._flushing = None
        if self._pending:
            self._send()

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            await reader.read(1)  # a mailbox never writes: this ends when the connection does
        self.hang_up("the HTTP side hung up")

    def hang_up(self, reason: str = "closed") -> None:
        """End it."""
        if not self.lost.done():
            self.lost.set_result(reason)
        self._pending.clear()
        self._writer.close()
        self._watching.cancel() if asyncio.current_task() is not self._watching else None
