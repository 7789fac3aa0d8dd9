"""What is judged of ranks from what is heard of them, and a thread that acts on it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raytron.actors import Session, WorkerError
from raytron.actors.health import STEPPING, Limits, Stillness, Watch, judge, scores
from raytron.actors.reseating import ElasticGroup
from raytron.actors.worker import Progress
from raytron.parallel import Mesh
from tests.actors.engines import Keeper

LIMITS = Limits(silence_s=5, still_s=10, factor=20, other_s=100)


def at(method: str | None = STEPPING, still_s: float = 0.0, waiting_s: float | None = None, silent_s: float = 0.0):
    return Stillness(Progress(method, still_s, waiting_s, 0, 0.0), silent_s)


def test_who_waits_for_a_hung_rank_is_not_blamed():
    heard = {"a": at(still_s=30, waiting_s=30), "b": at(still_s=31), "c": at(still_s=30, waiting_s=30)}
    verdict = judge(heard, LIMITS, step_s=0.1)
    assert list(verdict.hung) == ["b"]
    assert verdict.deadlock is None


def test_patience_grows_with_the_step_and_with_what_is_done():
    slow = {"a": at(still_s=30)}
    assert judge(slow, LIMITS, step_s=0.1).hung
    assert not judge(slow, LIMITS, step_s=2.0).hung  # 20 steps of 2 s
    assert not judge(slow, LIMITS, step_s=None).hung  # the first step may compile
    assert not judge({"a": at("evaluate", 30)}, LIMITS, step_s=0.1).hung
    assert judge({"a": at("evaluate", 101)}, LIMITS, step_s=0.1).hung
    assert not judge({"a": at(None, 1000)}, LIMITS, step_s=0.1).hung  # nothing was asked of it


def test_a_silent_process_hangs_whatever_it_said_last():
    assert "silent" in judge({"a": at(silent_s=6), "b": at()}, LIMITS, step_s=None).hung["a"]
    assert judge({"a": Stillness(None, 6)}, LIMITS, step_s=None).hung


def test_where_all_wait_nobody_is_to_blame():
    waiting = {name: at(still_s=30, waiting_s=30) for name in "abc"}
    assert judge(waiting, LIMITS, step_s=0.1).deadlock
    assert not judge(waiting, LIMITS, step_s=0.1).hung
    assert not judge({**waiting, "d": at()}, LIMITS, step_s=0.1).deadlock


@given(st.dictionaries(st.text(max_size=2), st.floats(0.1, 10), min_size=2), st.floats(0.5, 4))
def test_scores_are_of_own_work_among_peers(busy_s: dict[str, float], factor: float):
    stages = dict.fromkeys(busy_s, 0)
    found = scores(busy_s, stages)
    assert found.keys() == busy_s.keys()
    assert min(found.values()) <= 1 <= max(found.values())
    scaled = scores({name: factor * seconds for name, seconds in busy_s.items()}, stages)
    assert scaled == pytest.approx(found)


def test_stages_are_not_compared_with_each_other():
    assert scores({"a": 1, "b": 9}, {"a": 0, "b": 1}) == {}
    found = scores({"a": 1, "b": 2, "c": 9, "d": 9}, {"a": 0, "b": 0, "c": 1, "d": 1})
    assert found == {"a": 1.0, "b": 2.0, "c": 1.0, "d": 1.0}


@pytest.fixture
def group(cluster: Session) -> Iterator[ElasticGroup]:
    with ElasticGroup(Mesh(dp=2), {"CPU": 0.25}) as group:
        group.create(Keeper)
        yield group


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stopped_process_is_ended_and_its_peers_are_released(group: ElasticGroup):
    told: list[str] = []
    with Watch(group, Limits(silence_s=3.0), lambda event, what: told.append(event), period_s=0.2) as watch:
        assert group.call("train_step") == [1, 1]
        stopped = group.members[1]
        os.kill(stopped.where.pid, signal.SIGSTOP)
        with pytest.raises(WorkerError, match=rf"{stopped.name}|process died|does not answer"):
            group.call("wait_for_all")
        assert list(watch.hung) == [stopped.name]
        assert told == ["hung"]
        assert group.regroup() == (1,)
        group.create(Keeper)
        assert group.call("sum", "world") == [1, 1]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_engine_that_gets_on_with_nothing_is_ended_and_whoever_waits_is_not(group: ElasticGroup):
    limits = Limits(silence_s=60.0, other_s=2.0)
    with Watch(group, limits, lambda event, what: None, period_s=0.2) as watch:
        hung, waiting = group.members
        busy = group.submit("sleep", 600.0, ranks=[0])
        waits = group.submit("wait_for_all", ranks=[1])
        with pytest.raises(WorkerError):
            waits.results()
        with pytest.raises(WorkerError, match="process died"):
            busy.results()
        assert list(watch.hung) == [hung.name]
        assert waiting.name not in watch.hung
