"""RL runs on a cluster whose nodes come and go: `python -m tests.rl.node_loss FOLDER` says "ok" at its end.

Trainer ranks need a resource that two nodes have, whose only CPU they take; engines sit on other nodes.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raytron import rl
from raytron.actors import WeightSync, live
from raytron.actors.fleet import Health
from raytron.actors.journal import read_journal
from raytron.actors.mailbox import find_mailbox
from raytron.actors.members import survey
from raytron.config import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from raytron.rl import driver
from raytron.rl.config import RLConfig
from recipes.grpo import config as recipe
from tests.rl.test_driver import same_numbers, steps

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from faults import ledger

STEPS, PROMPTS = 6, 8
# A node that is gone refuses connections at once; one that is merely busy gets its time.
NOTICED = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 300,
    "health_check_timeout_ms": 10_000,
    "health_check_failure_threshold": 3,
}
TRAINS = {"num_cpus": 1, "resources": {"train": 1}}
Visit = Callable[[Any, Any], Awaitable[None]]


def config(folder: str, name: str, engines: int | tuple[int, int] = 2) -> RLConfig:
    """Two trainer ranks, and engines."""
    return replace(
        recipe,
        steps=STEPS,
        prompts=PROMPTS,
        group_size=4,
        reproducible=True,
        rollout=replace(recipe.rollout, engines=engines),
        evaluation=replace(recipe.evaluation, prompts=4),
        logging=replace(recipe.logging, tensorboard=False),
        scaling=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1.0, "train": 1.0}),
        run=RunConfig(name, folder, FailureConfig(max_failures=1), CheckpointConfig(interval=2)),
    )


def numbers(folder: str, name: str, visits: dict[int, Visit], engines: int | tuple[int, int] = 2) -> list[dict]:
    """A run's records without times. visits: called once, with trainers and engines, when a step has been made."""
    milestone = driver._Run._milestone

    async def milestones(run: Any, trainers: Any, engines: Any, writer: Any, version: int) -> None:
        await milestone(run, trainers, engines, writer, version)
        if version in visits:
            await visits.pop(version)(trainers, engines)

    driver._Run._milestone = milestones
    try:
        rl.run(config(folder, name, engines))
    finally:
        driver._Run._milestone = milestone
    assert not visits, f"{name} never came to steps {list(visits)}"
    assert (wrong := ledger(Path(folder, name), STEPS, PROMPTS)) is None, f"{name}: {wrong}"
    return [same_numbers(record) for record in steps(Path(folder, name))]


class Changes:
    """What is done to a run of one to three engines, each deed while they answer: those of a visit to step k when the
    rollouts that step k + 1 launches have begun."""

    def __init__(self, cluster: Cluster, name: str, nodes: list[Any]) -> None:
        self.cluster, self.name, self.nodes = cluster, name, nodes
        self.deed: asyncio.Task[None] | None = None

    def while_answering(self, deed: Callable[[Any], Awaitable[None]], ready: int) -> Visit:
        """A visit that waits for the deed before, and for so many engines, and does this one in the next rollouts."""

        async def visit(trainers: Any, engines: Any) -> None:
            await self.rest(engines, ready)
            self.deed = asyncio.create_task(self._once_busy(engines, deed))

        return visit

    async def rest(self, engines: Any, ready: int) -> None:
        if self.deed is not None:
            await self.deed
        while len(engines.fleet.ready) != ready or engines.fleet.of(Health.LEAVING):
            await asyncio.sleep(0.05)

    async def _once_busy(self, engines: Any, deed: Callable[[Any], Awaitable[None]]) -> None:
        while not engines._requests.counts():
            await asyncio.sleep(0)  # they last for a few turns of the event loop, no more
        await deed(engines)

    async def add(self, engines: Any) -> None:
        """A node with room for one engine comes."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    async def lose(self, engines: Any) -> None:
        """One with an engine goes without a word."""
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)

    async def drain(self, engines: Any) -> None:
        """The last engine's is to leave; another one takes over."""
        (engine,) = engines.fleet.ready
        gcs = ray._raylet.GcsClient(address=self.cluster.address)
        gcs.drain_node(engines.node(engine), 2, "the test", int(1000 * (time.time() + 600)))
        while engine not in engines.fleet.of(Health.LEFT):
            await asyncio.sleep(0.05)

    def ask(self, count: int) -> Callable[[Any], Awaitable[None]]:
        """The user wants so many engines."""

        async def deed(engines: Any) -> None:
            wishes = ({"engines": 4}, {"num_workers": 1}, {"engines": count})
            asked = (asyncio.to_thread(live.ask, find_mailbox(self.name), wish) for wish in wishes)
            many, ranks, said = await asyncio.gather(*asked, return_exceptions=True)
            assert "outside rollout.engines 1 to 3" in str(many)
            assert "keeps its size" in str(ranks)
            assert "has taken it on" in said

        return deed

    async def look(self, trainers: Any, engines: Any) -> None:
        """At the end one engine is left, and whoever asks is told so."""
        await self.rest(engines, 1)
        await asyncio.to_thread(live.ask, find_mailbox(self.name), {"engines": 2})  # so the status is one of now
        state = await asyncio.to_thread(live.status, find_mailbox(self.name))
        assert len(state["ranks"]) == 2
        (row,) = state["engines"]
        assert (row["engine"], row["state"], row["version"]) == (*engines.fleet.ready, "ready", STEPS - 1)


def elastic(cluster: Cluster, folder: str, nodes: list[Any], calm: list[dict]) -> None:
    """Engines leave and join while the run goes on, by lost, new and draining nodes and by request."""
    changes, extend = Changes(cluster, "elastic", nodes), WeightSync._extend

    async def from_the_trainer(*_: object) -> bool:
        raise AssertionError("a newcomer's weights came from the trainer, not from another node")

    deeds = {
        1: changes.while_answering(changes.add, ready=2),
        2: changes.while_answering(changes.lose, ready=3),
        3: changes.while_answering(changes.ask(1), ready=2),
        4: changes.while_answering(changes.drain, ready=1),
        5: changes.look,
    }
    WeightSync._extend = from_the_trainer
    try:
        assert numbers(folder, "elastic", deeds, (1, 3)) == calm
    finally:
        WeightSync._extend = extend
    events = read_journal(Path(folder, "elastic", "journal.jsonl"))
    assert [event["engines"] for event in events if event["event"] == "asked"] == [3, 1, 2]
    decided = [event for event in events if event["event"] == "decided"]
    assert all(event["reason"] for event in decided)
    assert {"grow", "shrink"} <= {event["action"] for event in decided}
    assert len([event for event in events if event["event"] == "engine joined"]) >= 2
    assert len([event for event in events if event["event"] == "engine left"]) >= 3


def main(folder: str) -> None:
    """A run that is left alone, one that loses its engines' node, one that loses a trainer rank's, and one whose number
    of engines changes."""
    temp = tempfile.mkdtemp(prefix="rt-", dir="/tmp")
    head = {"include_dashboard": False, "temp_dir": temp, "_system_config": NOTICED}
    cluster = Cluster(True, head_node_args={**TRAINS, **head})
    trains, answers = cluster.add_node(**TRAINS), cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    before: set[str] = set()
    small: list[Any] = []

    async def lose_engines(trainers: Any, engines: Any) -> None:
        before.update(engines.node(engine) for engine in engines.fleet.ready)
        assert len(before) == 1
        assert not before & {where.node for where in trainers.policy.where}
        small.append(cluster.add_node(num_cpus=1))  # room for one of the two
        cluster.remove_node(answers, allow_graceful=False)
        while engines.fleet.failures < 2:
            await asyncio.sleep(0.05)

    async def look(trainers: Any, engines: Any) -> None:
        (left,) = engines.fleet.ready
        assert engines.node(left) not in before

    async def lose_trainer(trainers: Any, engines: Any) -> None:
        before.update(where.node for where in trainers.policy.where)
        cluster.add_node(**TRAINS)
        cluster.remove_node(trains, allow_graceful=False)
        while not survey(trainers.policy.members):
            await asyncio.sleep(0.05)

    async def look_again(trainers: Any, engines: Any) -> None:
        assert {where.node for where in trainers.policy.where} - before
        assert len(engines.fleet.ready) == 2

    calm = numbers(folder, "calm", {})
    assert numbers(folder, "engines", {2: lose_engines, 4: look}) == calm
    small.append(cluster.add_node(num_cpus=1))
    assert numbers(folder, "trainer", {3: lose_trainer, 5: look_again}) == calm
    elastic(cluster, folder, small, calm)
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
