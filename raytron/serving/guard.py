"""The door of the HTTP application, as plain ASGI: keys, rate limits, and bodies that are too large or too slow.

It stands before everything else, so that a request without a key costs nothing, and it counts a body while it arrives:
one that grows past the limit, or takes too long, ends there. Nothing is ever buffered here.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from raytron.config import ServeConfig
from raytron.serving.limits import Limits, caller_of
from raytron.serving.protocol import Refused

__all__ = ["Guard", "answer"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class Guard:
    """ASGI middleware around `app`. The caller is left in `scope["state"]["caller"]`."""

    def __init__(self, app: App, *, config: ServeConfig, limits: Limits) -> None:
        self.app, self.config, self.limits = app, config, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            body = self._admit(scope, receive)
        except Refused as refused:
            await answer(send, refused)
            return
        await self.app(scope, body, send)

    def _admit(self, scope: Scope, receive: Receive) -> Receive:
        headers = dict(scope["headers"])
        address = (scope.get("client") or ("unknown",))[0]
        caller = caller_of(self.config, headers, address, scope["path"])
        scope.setdefault("state", {})["caller"] = caller
        writes = scope["method"] in ("POST", "PUT", "PATCH")
        if writes:
            self.limits.admit(caller)
        limit = int(self.config.max_body_mb * 2**20)
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(limit)
        if writes and headers.get(b"content-type", b"").split(b";")[0].strip().lower() != b"application/json":
            raise Refused("the body must be JSON: send Content-Type: application/json", status=415)
        return _measured(receive, limit, self.config.body_timeout_s)


def _too_large(limit: int) -> Refused:
    message = f"the body is larger than {limit / 2**20:g} MiB, which is the most this server takes"
    return Refused(message, status=413, code="body_too_large", headers={"Connection": "close"})


def _measured(receive: Receive, limit: int, timeout_s: float) -> Receive:
    """`receive` that raises Refused for a body beyond `limit` bytes, or not whole after `timeout_s`."""
    size, whole, deadline = 0, False, None

    async def measured() -> Message:
        nonlocal size, whole, deadline
        if whole:  # what may still come is that the client left, whenever it likes
            return await receive()
        deadline = deadline or asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                message = await receive()
        except TimeoutError:
            late = f"the body didn't arrive within {timeout_s:g} s"
            raise Refused(late, status=408, headers={"Connection": "close"}) from None
        size += len(message.get("body", b""))
        whole = not message.get("more_body", False)
        if size > limit:
            raise _too_large(limit)
        return message

    return measured


async def answer(send: Send, refused: Refused) -> None:
    """Send an error."""
    body = json.dumps(refused.body()).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refused.headers}
    raw = [(name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refused.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
