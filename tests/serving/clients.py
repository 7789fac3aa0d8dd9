"""Many clients of a live application at once, and a look at what is behind it."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Callable
from typing import Any

import httpx
from ray._private.state import actors

from raytron.serving.app import App

DEADLINE_S = 60.0


def until(holds: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Wait for `holds()`; what it gave."""
    end = time.monotonic() + deadline_s
    while not (found := holds()):
        assert time.monotonic() < end, f"{what}: not within {deadline_s:g} s"
        time.sleep(0.02)
    return found


def body(model: str, prompt: Any = "hello", tokens: int = 8, **more: Any) -> dict[str, Any]:
    """Of a completion that is always so long."""
    greedy = {"temperature": 0, "ignore_eos": True}
    return {"model": model, "prompt": prompt, "max_tokens": tokens, **greedy, **more}


def ask(app: App, *args: Any, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    """One completion, waited for."""
    return httpx.post(f"{app.url}/v1/completions", json=body(*args, **more), headers=headers, timeout=DEADLINE_S)


def stats(app: App, model: str, key: str = "none") -> list[dict[str, Any]]:
    """Of each of the model's engines."""
    answer = httpx.get(f"{app.url}/admin/stats", headers={"Authorization": f"Bearer {key}"}, timeout=DEADLINE_S)
    answer.raise_for_status()
    return answer.json()["models"][model]


def idle(app: App, model: str) -> bool:
    """Whether all of the model's engines are up and hold nothing for anybody."""
    found = stats(app, model)
    return bool(found) and all((s["running"], s["waiting"], s["kv_usage"]) == (0, 0, 0.0) for s in found)


def pids(kind: str, *, dead: bool = False) -> list[int]:
    """Processes of the living actors whose name or class contains `kind`."""
    return [
        a["Pid"]
        for a in actors().values()
        if kind in f"{a['Name']} {a['ActorClassName']}" and (a["State"] == "ALIVE") != dead and a["Pid"]
    ]


def memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


class Flood:
    """Requests sent together, over plain connections: `asyncio.run(Flood(app).send(...))`."""

    def __init__(self, app: App, key: str = "none") -> None:
        self._host, port = app.url.removeprefix("http://").split(":")
        self._port, self._key = int(port), key

    async def send(self, bodies: list[dict[str, Any]], at_once: int = 64) -> list[tuple[int, dict[str, str], Any]]:
        """Status, headers and JSON of each, in order; status 0 for a connection that was cut."""
        turn = asyncio.Semaphore(at_once)

        async def one(content: dict[str, Any]) -> tuple[int, dict[str, str], Any]:
            async with turn:
                try:
                    reader, writer = await self.open(content)
                    raw = await reader.read()
                    writer.close()
                except OSError:
                    return 0, {}, None
            return _parsed(raw)

        return await asyncio.gather(*(one(content) for content in bodies))

    async def open(self, content: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection on which the request has been sent."""
        reader, writer = await asyncio.open_connection(self._host, self._port)
        raw = json.dumps(content).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {self._key}\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        writer.write(head.encode() + raw)
        await writer.drain()
        return reader, writer


def _parsed(raw: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, rest = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    if not rest:
        return 0, {}, None
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(first.split()[1]), headers, json.loads(rest) if "json" in headers.get("content-type", "") else rest
