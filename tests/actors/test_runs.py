"""When a run is tried again, and when its failure is the user's to mend."""

from __future__ import annotations

import threading

import pytest

from raytron.actors import Failure, WorkerError
from raytron.actors.runs import Failures, attempts
from raytron.config import FailureConfig, RunConfig


def failing(*kinds: str):
    """An attempt that fails in these ways, one after the other, then returns; and how it was called."""
    left, calls = list(kinds), []

    def attempt(resume: bool) -> str:
        calls.append(resume)
        if left:
            raise WorkerError(Failure(0, "host", 1, "train_step", left.pop(0), "the message"))
        return "done"

    return attempt, calls


def tried(attempt, allowed: int, stop: threading.Event | None = None) -> tuple[str, list[str]]:
    said: list[str] = []
    run = RunConfig(failure_config=FailureConfig(max_failures=allowed))
    return attempts(attempt, run, False, stop or threading.Event(), said.append), said


def test_failures_that_are_allowed_are_followed_by_a_resume_and_told():
    attempt, calls = failing("process died", "RuntimeError")
    result, said = tried(attempt, 2)
    assert result == "done"
    assert calls == [False, True, True]
    assert [line.splitlines()[-1] for line in said] == [
        "failure 1 of 2: starting the actors again",
        "failure 2 of 2: starting the actors again",
    ]


def test_one_failure_too_many_ends_the_run():
    attempt, calls = failing("process died", "process died")
    with pytest.raises(WorkerError):
        tried(attempt, 1)
    assert len(calls) == 2


def test_any_number_can_be_allowed_but_none_after_a_wish_to_stop():
    attempt, calls = failing(*["process died"] * 20)
    assert tried(attempt, -1)[0] == "done"
    assert len(calls) == 21
    stop = threading.Event()
    stop.set()
    with pytest.raises(WorkerError):
        tried(failing("process died")[0], -1, stop)


def test_what_the_user_has_to_mend_is_not_tried_again():
    attempt, calls = failing("ValueError")
    with pytest.raises(ValueError, match="the message"):
        tried(attempt, -1)
    assert len(calls) == 1


def test_failures_go_on_from_those_of_a_driver_before_and_are_told():
    told: list[tuple[int, int, str]] = []
    failures, error = Failures(2, 1, lambda *failure: told.append(failure)), RuntimeError("one line\nand another")
    assert [failures.survives(error), failures.survives(error), failures.survives(RuntimeError())] == [
        True,
        True,
        False,
    ]
    assert told == [(2, 2, "one line"), (3, 2, "")]


def test_failures_are_counted_over_attempts_and_each_once():
    failures, errors = Failures(2), [RuntimeError(), RuntimeError(), RuntimeError()]
    assert [failures.survives(error) for error in (errors[0], errors[0], errors[1], errors[1])] == [True] * 4
    assert failures.count == 2
    assert not failures.survives(errors[2])
    attempt, calls = failing("process died")
    with pytest.raises(WorkerError):
        attempts(attempt, RunConfig(), False, threading.Event(), print, failures)  # what went before counts
    assert len(calls) == 1
