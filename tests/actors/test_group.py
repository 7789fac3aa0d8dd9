"""The actor group on a real Ray: fan-out, failure, regrouping, shutdown."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray

from raytron.actors import ActorGroup, Session, WorkerError
from raytron.actors.worker import cores
from raytron.parallel import Mesh
from tests.actors.engines import Toy


def test_ranks_meet_on_every_axis(group: ActorGroup):
    assert group.call("sum", per_rank=[1, 2, 3, 4]) == [10] * 4
    assert group.call("sum", per_rank=[1, 2, 3, 4], axis="tp") == [3, 3, 7, 7]
    assert group.call("sum", per_rank=[1, 2, 3, 4], axis="dp") == [4, 6, 4, 6]


def test_fan_out_arguments(group: ActorGroup):
    shared = ray.put("large")
    results = group.call("echo", shared, per_rank="abcd", key=1)
    assert results == [(rank, (letter, "large"), {"key": 1}) for rank, letter in enumerate("abcd")]
    assert group.call("echo", per_rank=["x", "y"], ranks=[3, 1]) == [(3, ("x",), {}), (1, ("y",), {})]
    with pytest.raises(ValueError, match="per_rank has 3 items for 4 ranks"):
        group.call("echo", per_rank=[1, 2, 3])


def test_factories_take_arguments(group: ActorGroup):
    group.create(Toy, scale=3)
    assert group.call("sum", 1) == [12] * 4


def test_calls_under_way_run_in_the_order_they_were_sent(group: ActorGroup):
    calls = [group.submit("sum", value) for value in range(20)]
    assert [call.results()[2] for call in calls] == [4 * value for value in range(20)]


def test_ranks_share_their_nodes_cores(group: ActorGroup):
    fair = max(1, cores() // 4)
    assert group.call("environment", "OMP_NUM_THREADS") == [(str(fair), fair)] * 4


def test_an_error_names_rank_host_and_traceback_and_releases_the_others(group: ActorGroup):
    pids = [where.pid for where in group.where]
    with pytest.raises(WorkerError, match="no such shard") as caught:
        group.call("fail_on", 2)
    failure = caught.value.failure
    assert (failure.rank, failure.pid, failure.kind) == (2, pids[2], "KeyError")
    assert failure.host == group.where[2].host
    assert "engines.py" in failure.trace
    assert failure.method == "fail_on"
    with pytest.raises(RuntimeError, match=r"broken \(a rank failed in fail_on\); regroup it"):
        group.call("echo")
    # The others left their barrier: nothing but their own control thread had to answer for this to return.
    assert group.regroup() == ()
    assert [where.pid for where in group.where] == pids
    assert group.call("sum", per_rank=[1, 2, 3, 4]) == [10] * 4


def test_later_calls_of_a_failed_generation_do_not_run(group: ActorGroup):
    failing, queued = group.submit("fail_on", 0), group.submit("train_step")
    with pytest.raises(WorkerError, match="no such shard"):
        failing.results()
    with pytest.raises(WorkerError):
        queued.results()
    group.regroup()
    assert all(step is None or step["step"] == 1 for step in group.call("train_step"))


def test_a_killed_rank_is_blamed_and_replaced_while_survivors_keep_their_process(group: ActorGroup):
    group.call("load", 7)
    pids = [where.pid for where in group.where]
    with pytest.raises(WorkerError, match=r"rank 1 on .* failed in die_on: process died") as caught:
        group.call("die_on", 1)
    assert caught.value.failure.pid == pids[1]
    assert group.regroup() == (1,)
    assert [rank for rank, where in enumerate(group.where) if where.pid != pids[rank]] == [1]
    group.create(Toy, ranks=[1])
    group.call("load", 7, ranks=[1])
    assert group.call("train_step")[0] == {"step": 8, "sum": 32}
    assert group.generation >= 1


def test_a_rank_that_is_late_is_named(group: ActorGroup):
    group.submit("wait_for_all", ranks=[0, 1, 3])
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1, 3\] did not answer echo within 0.5 s"):
        group.submit("echo").results(timeout_s=0.5)
    assert group.regroup() == ()


def test_results_that_cannot_be_sent_are_errors_of_their_rank(group: ActorGroup):
    with pytest.raises(WorkerError, match=r"rank \d on .* failed in lock: TypeError: cannot pickle '_thread.lock'"):
        group.call("lock")


def test_shutdown_leaves_no_process_whatever_the_ranks_are_doing(cluster: Session):
    with ActorGroup(Mesh(dp=2)) as group:
        group.create(Toy)
        assert group.call("sum", 1) == [2, 2]
        pids = [where.pid for where in group.where]
        group.submit("wait_for_all", ranks=[0])  # waits for a peer that never comes
        group.abandon("the test is over")
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
    group.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        group.call("sum", 1)


def fail_within(pids: list[int]) -> None:
    with ActorGroup(Mesh(), env={"RAYTRON_TEST": "1"}) as group:
        group.create(Toy)
        pids += [where.pid for where in group.where]
        assert group.call("environment", "RAYTRON_TEST")[0][0] == "1"
        group.call("fail_on", 0)


def test_the_error_that_ends_a_with_block_is_the_one_seen(cluster: Session):
    pids: list[int] = []
    with pytest.raises(WorkerError, match="no such shard"):
        fail_within(pids)
    assert len(pids) == 1
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
