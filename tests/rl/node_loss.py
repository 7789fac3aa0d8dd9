"""RL runs on a cluster of Ray's own that loses nodes: `python -m tests.rl.node_loss FOLDER` says "ok" at its end.

Trainer ranks need a resource that two nodes have, whose only CPU they take; engines sit on other nodes.
"""

from __future__ import annotations

import asyncio
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from raytron import rl
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


def config(folder: str, name: str) -> RLConfig:
    """Two trainer ranks, two engines."""
    return replace(
        recipe,
        steps=STEPS,
        prompts=PROMPTS,
        group_size=4,
        reproducible=True,
        rollout=replace(recipe.rollout, engines=2),
        evaluation=replace(recipe.evaluation, prompts=4),
        logging=replace(recipe.logging, tensorboard=False),
        scaling=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 1.0, "train": 1.0}),
        run=RunConfig(name, folder, FailureConfig(max_failures=1), CheckpointConfig(interval=2)),
    )


def numbers(folder: str, name: str, visits: dict[int, Visit]) -> list[dict]:
    """A run's records without times. visits: called once, with trainers and engines, when a step has been made."""
    milestone = driver._Run._milestone

    async def milestones(run: Any, trainers: Any, engines: Any, writer: Any, version: int) -> None:
        await milestone(run, trainers, engines, writer, version)
        if version in visits:
            await visits.pop(version)(trainers, engines)

    driver._Run._milestone = milestones
    try:
        rl.run(config(folder, name))
    finally:
        driver._Run._milestone = milestone
    assert not visits, f"{name} never came to steps {list(visits)}"
    assert (wrong := ledger(Path(folder, name), STEPS, PROMPTS)) is None, f"{name}: {wrong}"
    return [same_numbers(record) for record in steps(Path(folder, name))]


def main(folder: str) -> None:
    """A run that is left alone, one that loses its engines' node, one that loses a trainer rank's."""
    temp = tempfile.mkdtemp(prefix="rt-", dir="/tmp")
    head = {"include_dashboard": False, "temp_dir": temp, "_system_config": NOTICED}
    cluster = Cluster(True, head_node_args={**TRAINS, **head})
    trains, answers = cluster.add_node(**TRAINS), cluster.add_node(num_cpus=2)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    before: set[str] = set()

    async def lose_engines(trainers: Any, engines: Any) -> None:
        before.update(engines.node(engine) for engine in engines.fleet.ready)
        assert len(before) == 1
        assert not before & {where.node for where in trainers.policy.where}
        cluster.add_node(num_cpus=1)  # room for one of the two
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
    cluster.add_node(num_cpus=1)
    assert numbers(folder, "trainer", {3: lose_trainer, 5: look_again}) == calm
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(temp, ignore_errors=True)
    print("ok")


if __name__ == "__main__":
    main(sys.argv[1])
