"""Verifiers that may hang on what a model writes, each check in a process that can be killed.

Equality in sympy (math-verify), a regular expression, a JSON schema's patterns: all run for as long as the text makes
them. Timeouts by signal work in the main thread alone, and in a thread nothing can be stopped; so the checks run in
worker processes (`checker.py`), and one that is late is killed and replaced.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from raytron.rl.environments.base import Generated, Prompt

__all__ = ["CheckError", "Fits", "Matches", "Maths"]

_SCRIPT = Path(__file__).with_name("checker.py")
_START_S = 120.0


class CheckError(RuntimeError):
    """The verifier failed, which says nothing about the answer."""


class _Worker:
    """One process, used by one thread at a time."""

    def __init__(self, check: str, memory_mb: int, alarm_s: int) -> None:
        command = [sys.executable, "-P", str(_SCRIPT), check, str(memory_mb), str(alarm_s)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, bufsize=0)
        self._poll = select.poll()
        self._poll.register(self._process.stdout, select.POLLIN)
        self._read(_START_S)

    def ask(self, question: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return json.loads(self._read(timeout_s))

    def _read(self, timeout_s: float) -> bytes:
        """The next line. TimeoutError, or CheckError for a process that ended."""
        line, deadline = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise TimeoutError(f"no verdict within {timeout_s:g} s")
            part = os.read(self._process.stdout.fileno(), 1 << 16)
            if not part:
                raise CheckError(f"the checking process ended with code {self._process.wait()}")
            line += part
        return line

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class _Checked:
    """Asks a `workers`-sized pool of processes, which start when they are first needed.

    Args:
        workers: processes, and so answers checked at once.
        timeout_s: for one check; then its process is killed and the verdict is TimeoutError.
        memory_mb: address space of a process.
    """

    check = ""

    def __init__(self, workers: int = 2, timeout_s: float = 10.0, memory_mb: int = 4096) -> None:
        self.concurrency = workers
        self._timeout_s, self._memory_mb = timeout_s, memory_mb
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix=self.check)
        self._idle: list[_Worker] = []

    async def _ask(self, reference: Any, text: str) -> float:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._verdict, {"reference": reference, "text": text})

    def _verdict(self, question: Mapping[str, Any]) -> float:
        try:
            worker = self._idle.pop()
        except IndexError:
            worker = _Worker(self.check, self._memory_mb, math.ceil(self._timeout_s) + 5)
        try:
            reply = worker.ask(question, self._timeout_s)
        except BaseException:
            worker.kill()
            raise
        self._idle.append(worker)
        if "error" in reply:
            raise CheckError(reply["error"])
        return reply["verdict"]

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown()
        while self._idle:
            self._idle.pop().kill()


class Maths(_Checked):
    """1.0 where the result in the text equals the prompt's `answer` as mathematics (math-verify), else 0.0.

    The answer is plain (`1/2`) or LaTeX (`\\frac12`, with or without dollars); the text's result is its last boxed one,
    else the last expression. An answer that cannot be read as mathematics is a CheckError.
    """

    check = "maths"

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        return await self._ask(str(prompt.answer), answer.text)


class Matches(_Checked):
    """1.0 where the whole text matches a regular expression (dots match newlines), `pattern` or the prompt's answer."""

    check = "matches"

    def __init__(self, pattern: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._pattern = pattern

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        return await self._ask(self._pattern or prompt.answer, answer.text)


class Fits(_Checked):
    """1.0 where the text, or its last fenced block, is JSON that fits `schema`, or else the prompt's answer."""

    check = "fits"

    def __init__(self, schema: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._schema = schema

    async def __call__(self, prompt: Prompt, answer: Generated) -> float:
        return await self._ask(prompt.answer if self._schema is None else self._schema, answer.text)
