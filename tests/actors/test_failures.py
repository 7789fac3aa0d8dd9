"""Which failure is to blame."""

from __future__ import annotations

import pickle

import pytest
import torch.distributed as dist

from raytron.actors import Failure, WorkerError
from raytron.actors.failures import DIED, cause, is_echo
from raytron.parallel import GaveUp

GLOO = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:1"


def failure(rank: int, kind: str, echo: bool = False) -> Failure:
    return Failure(rank, "host", 1, "step", kind, "why", "trace", echo)


def test_the_cause_is_never_an_echo():
    closed, wrong, died = failure(0, "RuntimeError", echo=True), failure(1, "KeyError"), failure(2, DIED)
    assert cause([closed, wrong]) is wrong
    assert cause([closed, wrong, died]) is died
    assert cause([closed]) is closed


def chained(inner: Exception, *, suppress: bool = False) -> ValueError:
    """What an engine that catches `inner` and raises its own error ends with."""
    outer = ValueError("the step failed")
    outer.__context__ = inner
    outer.__suppress_context__ = suppress
    return outer


@pytest.mark.parametrize("error", [GaveUp("told to"), RuntimeError(GLOO), dist.DistNetworkError("reset")])
def test_echoes_are_recognised_also_where_the_engine_wrapped_them(error: Exception):
    assert is_echo(error)
    assert is_echo(chained(error))


def test_an_engines_own_error_is_no_echo():
    assert not is_echo(RuntimeError("shape mismatch"))
    assert not is_echo(chained(GaveUp("told to"), suppress=True))


def test_a_worker_error_says_who_and_why_and_crosses_processes():
    error = WorkerError(failure(3, "KeyError"), (failure(0, "GaveUp", echo=True),))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.failure == error.failure
    assert "rank 3 on host (pid 1) failed in step: KeyError: why" in str(error)
    assert "traceback of rank 3:\ntrace" in str(error)
    assert "then: rank 0: GaveUp" in str(error)
