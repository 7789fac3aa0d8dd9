"""Runs Python that a model wrote, where it can reach nothing: see `confine.py` for what is refused and how.

It is meant for code that is wrong, greedy or curious: against people who attack the kernel use a virtual machine. Disk
space is limited by file only, and given back when the program has ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from raytron.config import Typed

__all__ = ["Limits", "Ran", "SandboxError", "run_python"]

_SCRIPT = Path(__file__).with_name("confine.py")
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/urandom", "/dev/zero")


class SandboxError(RuntimeError):
    """This machine cannot run the program safely; nothing was run."""


@dataclass(frozen=True)
class Limits(Typed):
    """What a program may use. One that wants more is ended or gets an error; it may start no other process."""

    cpu_s: int = 10
    """Seconds of processor time, over its threads."""
    wall_s: float = 30.0
    """Seconds until it is killed."""
    memory_mb: int = 1024
    """Address space."""
    file_mb: int = 16
    """Of each file it writes, its standard output among them."""
    output_kb: int = 256
    """Of its output and of its errors that are read."""
    any_files: bool = False
    """Run it even where the kernel (before Linux 5.13) can't keep it to its own files: it may then write any."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value in vars(self).items():
            if name != "any_files" and value <= 0:
                raise ValueError(f"limits.{name} is {value}; it must be positive")

    def of_process(self) -> dict[str, int]:
        """By the names of `setrlimit`."""
        return {
            "RLIMIT_CPU": self.cpu_s,
            "RLIMIT_AS": self.memory_mb << 20,
            "RLIMIT_FSIZE": self.file_mb << 20,
            "RLIMIT_NOFILE": 64,
            "RLIMIT_CORE": 0,
        }


@dataclass(frozen=True)
class Ran:
    """What became of a program. code: its exit code, or minus the signal that ended it."""

    code: int
    output: str
    errors: str
    timed_out: bool = False


async def run_python(source: str, stdin: str = "", limits: Limits | None = None) -> Ran:
    """Run `source` as a program of its own, in an empty folder that is removed afterwards.

    It has this interpreter with its packages, nothing of this process's environment, and `stdin`. Raises SandboxError.
    """
    limits = limits or Limits()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="raytron-", ignore_cleanup_errors=True))
        given, output, errors = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
        given.write(stdin.encode(errors="replace"))
        given.seek(0)
        Path(folder, "main.py").write_bytes(source.encode(errors="replace"))
        code, timed_out = await _run(_order(folder, limits), limits.wall_s, folder, (given, output, errors))
        return Ran(code, *(_start_of(file, limits.output_kb << 10) for file in (output, errors)), timed_out)


def _order(folder: str, limits: Limits) -> dict:
    """What `confine.py` is to do."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    return {
        "program": [sys.executable, "-I", "-B", "main.py"],
        "env": {"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", **threads},
        "readable": [*_SYSTEM, *{os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix)}],
        "writable": [folder, "/dev/null"],
        "any_files": limits.any_files,
        "limits": limits.of_process(),
    }


async def _run(order: dict, wall_s: float, folder: str, files: tuple[IO[bytes], ...]) -> tuple[int, bool]:
    """(exit code, whether it was killed for its time)."""
    report, told = os.pipe()
    try:
        command = [sys.executable, "-I", "-S", "-B", str(_SCRIPT), json.dumps(order), str(told)]
        stdin, stdout, stderr = files
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={},
            cwd=folder,
            pass_fds=(told,),
            start_new_session=True,
        )
        os.close(told)
        told = -1
        timed_out = await _ended(process, wall_s)
        if trouble := os.read(report, 4096):
            raise SandboxError(trouble.decode(errors="replace"))
        return process.returncode, timed_out
    finally:
        os.close(report)
        if told >= 0:
            os.close(told)


async def _ended(process: asyncio.subprocess.Process, wall_s: float) -> bool:
    """Wait for it, or kill it; whether it had to be killed for its time."""
    try:
        async with asyncio.timeout(wall_s):
            await process.wait()
        return False
    except TimeoutError:
        return True
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


def _start_of(file: IO[bytes], most: int) -> str:
    file.seek(0)
    return file.read(most).decode(errors="replace")
