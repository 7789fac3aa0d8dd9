"""Pushes: every engine holds what was trained, and one that does not is found out."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raytron.actors import ActorGroup, LocalTrainer, RolloutGroup, Session, WeightSync, WorkerError
from raytron.actors.fleet import Health
from raytron.config import EngineConfig
from raytron.inference import SamplingParams, WeightUpdateError
from raytron.models import build
from raytron.parallel import Mesh, World
from raytron.parallel.checksum import checksums, fold
from raytron.parallel.layout import owners
from tests.actors import rollouts

EACH = {"CPU": 0.5}
PROMPT = (1, 2, 3, 4)
ROOT = Path(__file__).parents[2]
NODES = """
import asyncio, ray, sys, tempfile
from ray.cluster_utils import Cluster
from raytron.actors import ActorGroup, RolloutGroup, WeightSync
from raytron.parallel import Mesh
from tests.actors import rollouts
from tests.actors.test_weight_sync import config, sum_of, versions
folder = tempfile.mkdtemp(prefix="rt-", dir="/tmp")
cluster = Cluster(True, head_node_args=dict(num_cpus=4, include_dashboard=False, temp_dir=folder))
cluster.add_node(num_cpus=2)
ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

async def main():
    async with RolloutGroup([config(sys.argv[1], tp=2)] * 2) as group:
        nodes = {group.node(0), group.node(1), *(where.node for where in trainer.where)}
        assert len(nodes) == 2, nodes
        sync = WeightSync(group, trainer)
        for version in (1, 2):
            trainer.call("train", version)
            report = await sync.push(version, delta=True)
            assert report.checksum == sum_of(version) == await sync.verify()
        trainer.call("nudge", 2.0)
        report = await sync.push(3, delta=True)
        assert report.checksum == await sync.verify() != sum_of(2)
        assert report.engines == (0, 1)
        assert await versions(group) == [3]
        await sync.close()

with ActorGroup(Mesh(tp=2)) as trainer:
    trainer.create(rollouts.Trains)
    asyncio.run(asyncio.wait_for(main(), 240))
ray.shutdown()
cluster.shutdown()
print("ok")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """Configuration without weights: they come by the first push."""
    path = rollouts.save(tmp_path_factory.mktemp("model"))
    Path(path, "model.safetensors").unlink()
    return path


@pytest.fixture(scope="module")
def trainer(cluster: Session) -> Iterator[ActorGroup]:
    with ActorGroup(Mesh(tp=2), EACH) as group:
        group.create(rollouts.Trains)
        yield group


def config(folder: str, **options: Any) -> EngineConfig:
    return EngineConfig(path=folder, **{**rollouts.CONFIG, "weights": "await", **options})


def run(main: Callable[[], Awaitable[Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(main(), 240))


def sum_of(seed: int, dtype: torch.dtype = torch.float32) -> int:
    """The folded checksum of the model of a seed, by this process."""
    model = build(rollouts.ARCH, seed=seed)
    model.weights.data = model.weights.to(dtype)
    layout = build(rollouts.ARCH, dtype=dtype, device="meta").layout()
    return fold(checksums(owners(layout), {("rank-0", "weights"): model.weights}))


async def versions(group: RolloutGroup) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    return sorted({int(v) for v in (await group.generate(PROMPT, params)).versions})


ENGINES = [
    pytest.param([{}], id="one", marks=pytest.mark.slow),
    pytest.param([{"tp": 2}, {"pp": 2}], id="layouts"),
    pytest.param([{"dtype": "bf16"}], id="bf16", marks=pytest.mark.slow),
]


@pytest.mark.parametrize("engines", ENGINES)
@pytest.mark.parametrize("delta", [pytest.param(False, marks=pytest.mark.slow), True], ids=["whole", "delta"])
def test_every_engine_holds_the_trainers_weights(cluster: Session, trainer, folder, engines, delta: bool):
    async def main() -> None:
        async with RolloutGroup([config(folder, **options) for options in engines], EACH) as group:
            sync = WeightSync(group, trainer)
            assert group.fleet.ready == ()
            for version in (1, 2, 3):
                trainer.call("train", version)
                report = await sync.push(version, delta=delta)
                dtype = torch.bfloat16 if engines[0].get("dtype") == "bf16" else torch.float32
                assert report.checksum == sum_of(version, dtype) == await sync.verify()
                assert report.engines == tuple(range(len(engines)))
                assert report.version == version
                assert await versions(group) == [version]
            paths = list(sync._state.directories.values())
            await sync.close()
            assert not any(map(os.path.exists, paths))

    run(main)


@pytest.mark.slow
def test_a_trainer_in_the_drivers_process(cluster: Session, folder):
    local = rollouts.Trains(World.single())
    local.train(3)

    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            sync = WeightSync(group, LocalTrainer([local]))
            assert (await sync.push(1)).checksum == sum_of(3)
            await sync.close()

    run(main)


@pytest.mark.slow
def test_native_and_vllm_engines_take_the_same_push_and_answer_alike(cluster: Session, trainer, folder):
    pytest.importorskip("vllm")
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=0)

    async def main() -> None:
        async with RolloutGroup([config(folder), config(folder, engine="vllm")], EACH) as group:
            sync = WeightSync(group, trainer)
            for version in (1, 2):
                trainer.call("train", version)
                report = await sync.push(version)
                assert report.engines == (0, 1)
                assert report.checksum == sum_of(version) == await sync.verify()
                found = await asyncio.gather(*(group.generate(PROMPT, params) for _ in range(8)))
                by_engine = {one.engine: one for one in found}
                native, vllm = by_engine[0], by_engine[1]
                assert native.token_ids.tolist() == vllm.token_ids.tolist()
                assert abs(native.logprobs - vllm.logprobs).max() < 1e-4
                assert {int(v) for one in found for v in one.versions} == {version}
            await sync.close()

    run(main)


async def half_way(group: RolloutGroup) -> asyncio.Future:
    """An answer of nine tokens that `rollouts.halting` keeps from going on."""
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=9, ignore_eos=True)
    answer = asyncio.ensure_future(group.generate(PROMPT, params))
    while (await group.stats())[0].generated_tokens < rollouts.HALT:
        await asyncio.sleep(0)
    return answer


@pytest.mark.parametrize("mode", ["keep", pytest.param("abort", marks=pytest.mark.slow)])
def test_running_requests_at_a_push(cluster: Session, trainer, folder, mode: str):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH, start=rollouts.halting) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            answer = await half_way(group)
            trainer.call("train", 2)
            await sync.push(2, mode)
            await group.resume()
            found = await answer
            halt = rollouts.HALT
            assert found.versions.tolist() == [1] * halt + ([2] * (9 - halt) if mode == "keep" else [])
            assert found.finish_reason == ("length" if mode == "keep" else "abort")
            assert await versions(group) == [2]
            await sync.close()

    run(main)


@pytest.mark.slow
def test_a_push_that_waits_lets_running_requests_finish(cluster: Session, trainer, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            params = SamplingParams(temperature=1.0, seed=5, max_tokens=200, ignore_eos=True)
            answer = asyncio.ensure_future(group.generate(PROMPT, params))
            await asyncio.sleep(0)
            trainer.call("train", 2)
            await sync.push(2, "wait")
            assert (await answer).versions.tolist() == [1] * 200
            assert await versions(group) == [2]
            await sync.close()

    run(main)


@pytest.mark.parametrize(
    ("start", "why"),
    [
        (rollouts.skipping, r"rollout engine 0: .*weight: the engine holds checksum .* where the trainer pushed"),
        (rollouts.pretending, r"rollout engine 0 confirms version 2 with checksum None of all its tensors"),
        (rollouts.behind, r"rollout engine 0 answers with weights of version 1 after version 2 was pushed"),
    ],
    ids=["sums", "silence", "version"],
)
def test_a_stale_engine_is_caught(cluster: Session, trainer, folder, start, why: str):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH, start=start) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            trainer.call("train", 2)
            with pytest.raises(WeightUpdateError, match=why):
                await sync.push(2)
            await sync.close()

    run(main)


@pytest.mark.slow
def test_verify_finds_an_engine_that_was_changed_behind_its_back(cluster: Session, trainer, folder, tmp_path):
    other = rollouts.save(tmp_path / "other", seed=8)

    async def main() -> None:
        async with RolloutGroup([config(folder), config(folder)], EACH) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            await group.call(1, "update", other, "keep", 1)  # other weights under the same version
            with pytest.raises(WeightUpdateError, match=r"rollout engine 1: .*weight: the engine holds checksum"):
                await sync.verify()
            await sync.push(2, delta=True)
            await sync.verify()
            await sync.close()

    run(main)


def test_a_restarted_engine_answers_only_with_the_current_weights(cluster: Session, trainer, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder), config(folder)], EACH) as group:
            sync = WeightSync(group, trainer)
            for version in (1, 2):
                trainer.call("train", version)
                await sync.push(version)
            os.kill(group._started[0].pid, signal.SIGKILL)
            params = SamplingParams(temperature=1.0, seed=1, max_tokens=8, ignore_eos=True)
            while group.fleet.failures == 0 or 0 not in group.fleet.ready:
                found = await asyncio.gather(*(group.generate(PROMPT, params) for _ in range(4)))
                assert all((one.versions == 2).all() for one in found)
            assert await sync.verify() == sum_of(2)
            trainer.call("train", 3)
            assert (await sync.push(3)).engines == (0, 1)
            await sync.close()

    run(main)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_an_engine_that_dies_or_hangs_at_a_push_does_not_stop_the_others(cluster: Session, trainer, folder, how):
    async def main() -> None:
        async with RolloutGroup([config(folder), config(folder)], EACH, timeout_s=10.0) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            trainer.call("train", 2)
            os.kill(group._started[1].pid, how)
            report = await sync.push(2)
            assert report.failed == (1,)
            assert report.engines == (0,)
            while group.fleet.failures == 0 or 1 not in group.fleet.ready:
                await asyncio.sleep(0.05)
            assert await sync.verify() == sum_of(2)
            await sync.close()

    run(main)


@pytest.mark.slow
def test_a_trainer_that_dies_half_way_leaves_engines_stale_until_another_push(cluster: Session, folder):
    """Nobody is started again, and what they were asked is answered, by weights of one version at a time."""

    async def main(trainer: ActorGroup) -> None:
        async with RolloutGroup([config(folder)], EACH, start=rollouts.halting) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            answer = await half_way(group)
            with pytest.raises(WorkerError):
                await sync.push(2)
            assert group.fleet.of(Health.STALE) == (0,)
            assert (await group.stats())[0].health == "stale: its last push was not finished"
            assert trainer.regroup() == (0,)
            trainer.create(rollouts.Trains)
            trainer.call("train", 3)
            await sync.reset()
            assert (await sync.push(3)).checksum == sum_of(3) == await sync.verify()
            await group.resume()
            assert (await answer).versions.tolist() == [1] * rollouts.HALT + [3] * (9 - rollouts.HALT)
            assert group.fleet.failures == 0
            assert await versions(group) == [3]
            await sync.close()

    with ActorGroup(Mesh(), EACH) as trainer:
        trainer.create(rollouts.Dying)
        run(lambda: main(trainer))


@pytest.mark.slow
def test_a_new_trainer_group_is_reached_after_a_reset(cluster: Session, trainer, folder):
    async def main() -> None:
        async with RolloutGroup([config(folder)], EACH) as group:
            sync = WeightSync(group, trainer)
            trainer.call("train", 1)
            await sync.push(1)
            trainer.create(rollouts.Trains)  # as after a regroup: fresh engines that know of no directory
            trainer.call("train", 2)
            await sync.reset()
            assert (await sync.push(2, delta=True)).checksum == sum_of(2)
            await sync.close()

    run(main)


def test_engines_of_two_dtypes_are_refused(cluster: Session, folder):
    group = RolloutGroup([config(folder), config(folder, dtype="bf16")], EACH)
    with pytest.raises(ValueError, match=r"engines compute in bfloat16 and float32; give all .* one engine\.dtype"):
        WeightSync(group, LocalTrainer([]))


@pytest.mark.slow
def test_engines_on_other_nodes(folder):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", NODES, folder], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert done.stdout.split()[-1:] == ["ok"], done.stderr[-4000:]
