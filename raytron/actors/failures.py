"""What went wrong, and which of many things went wrong first.

When one rank dies, all others report something: a closed connection, a collective told to give up. Those are echoes.
The cause is the death, or the exception that made the first rank leave. A failure crosses processes as text (rank,
host, traceback), never as the exception itself: user exceptions need not survive pickling.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch.distributed as dist

from raytron.parallel.collectives import GaveUp

__all__ = ["DIED", "GONE", "HUNG", "BrokenError", "Failure", "WorkerError", "cause", "is_echo"]

DIED = "process died"
GONE = "node gone"  # Ray has declared it dead, or nobody listens there any more, or nobody there says a word
HUNG = "does not answer"  # not even its control thread
SILENT = (DIED, GONE, HUNG)  # kinds of failures that others had to tell of


@dataclass(frozen=True)
class Failure:
    """One rank's report.

    Attributes:
        rank, host, pid: who; rank None is a worker that has no rank.
        method: what it was doing.
        kind: the exception's type name, or `DIED`, `GONE`, `HUNG`.
        message: the exception's text.
        trace: the formatted traceback on that rank, "" where the rank could not tell.
        echo: it failed because another rank did.
    """

    rank: int | None
    host: str
    pid: int
    method: str
    kind: str
    message: str
    trace: str = ""
    echo: bool = False

    @classmethod
    def of(cls, error: BaseException, rank: int | None, host: str, pid: int, method: str) -> Failure:
        trace = "".join(traceback.format_exception(error))
        return cls(rank, host, pid, method, type(error).__name__, str(error), trace, is_echo(error))


class BrokenError(RuntimeError):
    """A group was called after it had been told to give up: whoever watches the ranks does so at any time."""


class WorkerError(RuntimeError):
    """A rank failed: `failure` is the cause, `others` what the remaining ranks reported by then."""

    def __init__(self, failure: Failure, others: tuple[Failure, ...] = ()) -> None:
        super().__init__(failure, others)
        self.failure, self.others = failure, others

    def __str__(self) -> str:
        f = self.failure
        text = f"{_name(f.rank)} on {f.host} (pid {f.pid}) failed in {f.method}: {f.kind}: {f.message}"
        if f.trace:
            text += f"\n\ntraceback of {_name(f.rank)}:\n{f.trace.rstrip()}"
        if self.others:
            text += "\n\nthen: " + "; ".join(f"{_name(o.rank)}: {o.kind}" for o in self.others)
        return text


def _name(rank: int | None) -> str:
    return "a worker without a rank" if rank is None else f"rank {rank}"


def cause(failures: Iterable[Failure]) -> Failure:
    """The failure to blame: the first that is not an echo, a death before an exception seen at the same time."""
    ranked = sorted(failures, key=lambda f: (f.echo, f.kind not in SILENT))
    return ranked[0]


def is_echo(error: BaseException) -> bool:
    """Whether `error` only says that a peer is gone or that the world was told to give up."""
    return any(
        isinstance(e, GaveUp | dist.DistError) or (isinstance(e, RuntimeError) and "gloo/" in str(e))
        for e in _chain(error)
    )


def _chain(error: BaseException) -> Iterator[BaseException]:
    at: BaseException | None = error
    while at is not None:
        yield at
        at = at.__cause__ or (None if at.__suppress_context__ else at.__context__)
