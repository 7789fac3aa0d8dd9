"""A group that changes size and shape on a real Ray: survivors stay, nobody waits for who does not come."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from raytron.actors import CapacityError, Session, WorkerError
from raytron.actors.failures import DIED, HUNG
from raytron.actors.members import survey
from raytron.actors.reseating import ElasticGroup
from raytron.parallel import Mesh
from tests.actors.engines import Keeper

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def group(cluster: Session) -> Iterator[ElasticGroup]:
    """Two ranks that hold 10 and 11."""
    with ElasticGroup(Mesh(dp=2), {"CPU": 0.25}) as group:
        group.create(Keeper)
        group.call("keep", per_rank=[10, 11])
        yield group


def names(group: ElasticGroup) -> list[str]:
    return [member.name for member in group.members]


def move(group: ElasticGroup, mesh: Mesh, seated: list, leaving: tuple = ()) -> list[int]:
    """Reseat and reshape; how many took part, as each of them saw it."""
    group.reseat(mesh, seated, leaving)
    took_part = group.reshape([member.name for member in (*seated, *leaving)], leaving)
    group.call("adopt")
    return took_part


def placement_groups() -> int:
    return sum(g["state"] == "CREATED" for g in ray.util.placement_group_table().values())


def test_growing_changing_shape_and_shrinking_keep_processes_and_what_they_hold(group: ElasticGroup):
    before, pids, held = names(group), group.call("process"), placement_groups()
    newcomers = group.recruit(2, engine=partial(Keeper, number=5))
    assert group.call("sum", "world") == [1, 1]  # the others go on meanwhile
    new = newcomers.result()
    assert placement_groups() == held + 2

    assert move(group, Mesh(tp=2, pp=2), [new[0], *group.members, new[1]]) == [4] * 4
    assert names(group) == ["actor-2", *before, "actor-3"]
    assert group.call("process")[1:3] == pids
    assert group.call("sum", "tp") == [1, 1, 5, 5]
    heard = {"actor-2": 5, "actor-0": 10, "actor-1": 11, "actor-3": 5}
    assert group.consult(group.members, "standing") == [heard] * 4

    # A leaving member is a source of the move, and ends after it.
    first, second, third, fourth = group.members
    group.call("keep", per_rank=[1, 2, 3, 4])
    assert move(group, Mesh(dp=3), [second, third, fourth], (first,)) == [4] * 4
    group.dismiss([first])
    assert group.consult(group.members, "standing")[0] == {"actor-0": 2, "actor-1": 3, "actor-3": 4, "actor-2": 1}
    assert placement_groups() == held + 1
    assert group.call("sum", "world") == [3] * 3
    assert group.member("actor-2") is None


def test_lost_members_are_told_apart_and_their_chairs_taken_by_others(group: ElasticGroup):
    killed, stopped = group.members
    chairs = [member.chair for member in group.members]
    os.kill(killed.where.pid, signal.SIGKILL)
    os.kill(stopped.where.pid, signal.SIGSTOP)
    group.abandon("the test hurts it")
    assert survey(group.members, patience_s=2.0) == {killed.name: DIED, stopped.name: HUNG}
    group.lose([killed.name, stopped.name])
    held = placement_groups()
    new = group.recruit(2).result()
    assert [member.chair for member in new] == chairs
    assert placement_groups() == held
    group.reseat(Mesh(dp=2), new)
    group.create(Keeper)
    assert group.call("sum", "world") == [1, 1]
    assert names(group) == ["actor-2", "actor-3"]
    pids = [member.where.pid for member in (killed, stopped)]
    group.shutdown()
    assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_whoever_does_not_come_to_the_rendezvous_holds_up_nobody(group: ElasticGroup):
    held = placement_groups()
    (new,) = group.recruit(1, engine=Keeper).result()
    os.kill(new.where.pid, signal.SIGKILL)
    with pytest.raises(WorkerError, match="failed in connect: process died"):
        group.reseat(Mesh(dp=3), [*group.members, new])
    assert group.broken is not None
    old = group.members[:2]
    assert survey([*old, new]) == {new.name: DIED}
    assert group.consult(old, "standing") == [{"mine": 10}, {"mine": 11}]  # their engines' threads are free again
    group.lose([new.name])
    assert move(group, Mesh(dp=2), old) == [2, 2]
    assert group.call("sum", "world") == [1, 1]
    with pytest.raises(CapacityError, match="cannot hold 39 ranks"):
        group.recruit(40, wait_s=0.5).result()
    assert group.call("sum", "world") == [1, 1]  # asking for too much hurts nobody
    group.dismiss([])
    assert placement_groups() == held
