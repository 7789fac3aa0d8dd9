"""A driver hears of no fault that its group can go on from, whoever noticed it first."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from raytron.actors import ActorGroup, WorkerError
from raytron.actors.elastic import Elastic
from raytron.actors.failures import BrokenError


def test_what_the_watch_noticed_between_two_calls_is_a_fault_like_any_other(group: ActorGroup):
    group.abandon("rank 1 hangs")  # as the watch does, in its own thread
    elastic, faults = object.__new__(Elastic), []
    elastic.group = SimpleNamespace(evaluate=lambda: group.call("where_am_i"))

    def recover(error: WorkerError) -> None:
        faults.append(error)
        elastic.group = SimpleNamespace(evaluate=lambda: "held-out loss")

    elastic._recover = recover
    with pytest.raises(BrokenError, match="rank 1 hangs"):
        elastic.group.evaluate()
    assert elastic.call("evaluate") == "held-out loss"
    assert [error.failure.kind for error in faults] == ["BrokenError"]
    assert "rank 1 hangs" in str(faults[0])
