"""The application behind a socket: uvicorn, with the patience it lacks.

uvicorn waits for the head of a request as long as the client likes, and takes as many bytes of it: here both end, with
408 and 431. (Bodies are `guard`'s.) A peer that has vanished is noticed by TCP within a minute or two.
"""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from types import TracebackType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from raytron.config import ServeConfig
from raytron.serving.protocol import Refused

__all__ = ["Server", "run"]

LONGEST_HEAD = 64 * 1024
LINGER_S = 1.0
REASONS = {400: "Bad Request", 408: "Request Timeout", 431: "Head Too Large", 503: "Service Unavailable"}


def _protocol(config: ServeConfig) -> type[HttpToolsProtocol]:
    class Patient(HttpToolsProtocol):
        """One connection, which has `header_timeout_s` for each head."""

        _late: asyncio.TimerHandle | None = None
        _head = 0  # bytes of the head so far
        _refused = False

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            _notice_vanished(transport.get_extra_info("socket"))
            if len(self.connections) > config.max_connections:
                self._refuse(503, "too many connections are open")
            else:
                self._expect_head()

        def data_received(self, data: bytes) -> None:
            if self._refused:
                return
            if self._late is None and (self.cycle is None or self.cycle.response_complete):
                self._expect_head()
            super().data_received(data)
            if self._late is not None:
                self._head += len(data)
                if self._head > LONGEST_HEAD:
                    self._refuse(431, f"the head of the request is longer than {LONGEST_HEAD} bytes")

        def on_headers_complete(self) -> None:
            self._no_longer()
            super().on_headers_complete()

        def connection_lost(self, exc: Exception | None) -> None:
            self._no_longer()
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            self._refuse(400, "this isn't HTTP")

        def _expect_head(self) -> None:
            self._head = 0
            late = f"the head of the request didn't arrive within {config.header_timeout_s:g} s"
            self._late = self.loop.call_later(config.header_timeout_s, self._refuse, 408, late)

        def _no_longer(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _refuse(self, status: int, message: str) -> None:
            self._no_longer()
            body = json.dumps(Refused(message, status=status).body())
            head = f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            self._refused = True
            self.transport.write_eof()
            # Closed at once, with something unread, the connection would be reset and the answer lost.
            self.loop.call_later(LINGER_S, self.transport.close)

    return Patient


def _notice_vanished(sock: socket.socket | None) -> None:
    """Let TCP give up on a silent peer: keep-alive probes, and a limit for what isn't acknowledged (Linux only)."""
    if sock is None or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    options = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 60_000}
    for name, value in options.items():
        if hasattr(socket, name):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


class Server:
    """Serves an ASGI application; `with Server(app, config) as server:` in a thread, or `run` in this one.

    Attributes:
        url: where it listens, "http://127.0.0.1:8000".
    """

    def __init__(self, app: Any, config: ServeConfig | None = None) -> None:
        self.config = config or ServeConfig()
        family = socket.AF_INET6 if ":" in self.config.host else socket.AF_INET
        try:
            address = (self.config.host, self.config.port)
            self._socket = socket.create_server(address, family=family, backlog=2048)
        except OSError as error:
            raise OSError(f"can't listen on {self.config.host}:{self.config.port}: {error.strerror}") from error
        self._uvicorn = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_protocol(self.config),
                ws="none",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=max(1, round(self.config.keep_alive_s)),
            )
        )
        host = f"[{self.config.host}]" if family == socket.AF_INET6 else self.config.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._thread: threading.Thread | None = None
        self._serving: asyncio.Task[None] | None = None

    def run(self) -> None:
        """Serve until SIGINT or SIGTERM, and then until what is running is answered."""
        self._uvicorn.run(sockets=[self._socket])

    async def open(self) -> None:
        """Serve on the event loop that this is called on, until `close`."""
        self._serving = asyncio.create_task(self._uvicorn.serve(sockets=[self._socket]))

    @property
    def broken(self) -> bool:
        """Whether it ended without having been closed."""
        return self._serving is not None and self._serving.done() and not self._uvicorn.should_exit

    async def close(self) -> None:
        """Take no more connections, and return when what is running is answered."""
        self._uvicorn.should_exit = True
        if self._serving is not None:
            await self._serving

    def __enter__(self) -> Server:
        up = threading.Event()
        startup = self._uvicorn.startup

        async def and_tell(sockets: list[socket.socket] | None = None) -> None:
            await startup(sockets=sockets)
            up.set()

        self._uvicorn.startup = and_tell  # type: ignore[method-assign]
        self._thread = threading.Thread(target=self.run, name="http", daemon=True)
        self._thread.start()
        up.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._uvicorn.should_exit = True
        assert self._thread is not None
        self._thread.join()


def run(app: Any, config: ServeConfig | None = None) -> None:
    """Serve `app` until told to stop; see `Server`."""
    server = Server(app, config)
    print(f"{server.url} (Ctrl-C ends it)", flush=True)
    server.run()
