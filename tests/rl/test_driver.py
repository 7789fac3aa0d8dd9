"""Whole runs: they learn, they go on where they were cut, and every token was chosen by the weights it says."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from raytron import rl
from raytron.actors import Session, WeightSync, placement
from raytron.actors.failures import WorkerError
from raytron.actors.placement import Node
from raytron.config import (
    CheckpointConfig,
    EngineConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
)
from raytron.metrics import read_timeline
from raytron.rl import driver, scorers, trainers
from raytron.rl.buffer import Journal
from raytron.rl.config import RewardConfig, RewardModelConfig, RLConfig
from raytron.rl.engines import fitting_dp, fitting_engines
from raytron.rl.trainers import Trainers
from recipes.grpo import config as recipe
from recipes.ppo import config as ppo
from tests.actors.scorers import Failing
from tests.inference.classifiers import random_classifier, scores_of
from tests.rl.dying import HalfWay


def config(tmp_path: Path, name: str, steps: int, interval: int = 0, **more) -> RLConfig:
    run = RunConfig(name=name, storage_path=str(tmp_path), checkpoint_config=CheckpointConfig(interval=interval))
    more = {"schedule": ScheduleConfig(kind="constant"), **more}  # the same for any number of steps
    return replace(recipe, run=run, steps=steps, logging=replace(recipe.logging, tensorboard=False), **more)


def steps(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def same_numbers(record: dict) -> dict:
    """What does not depend on the clock."""
    timed = ("step_time_s", "tokens_per_s", "phases_s")
    extra = {k: v for k, v in record["extra"].items() if not k.endswith("_s")}  # a critic's time
    return {k: v for k, v in record.items() if k not in timed} | {"extra": extra}


@pytest.fixture(scope="module")
def whole(cluster: Session, tmp_path_factory) -> list[dict]:
    """The records of nine steps that nothing disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    rl.run(config(folder, "whole", 9, reproducible=True))
    return steps(folder / "whole")


def test_a_run_resumes_bit_for_bit_and_keeps_its_books(cluster: Session, tmp_path: Path, whole):
    records = whole
    assert [r["extra"]["policy/bit_equal"] for r in records] == [1.0] * 9
    assert {r["extra"]["rollout/staleness_max"] for r in records} == {0.0}
    rl.run(config(tmp_path, "cut", 4, 4, reproducible=True, transcripts=5))
    rl.run(config(tmp_path, "cut", 9, 4, reproducible=True, transcripts=5))
    assert [same_numbers(r) for r in steps(tmp_path / "cut")] == [same_numbers(r) for r in records]
    page = (tmp_path / "cut" / "transcripts.html").read_text()
    assert all(f'id="step-{step}"' in page for step in (1, 5))
    spans = read_timeline(tmp_path / "cut" / "timeline.json")
    trained = [(span.start_of, span.args["step"]) for span in spans if span.name == "train"]
    assert trained == [(1 + (step > 4), step) for step in range(1, 10)]
    assert {"generating", "updating"} == {span.name for span in spans if span.lane == "engine 0"}
    assert {"evaluation", "push", "saves", "trainer", "engine 0"} == {span.lane for span in spans}
    assert {file.name for file in (tmp_path / "cut").glob("timeline.*")} == {
        "timeline.html", "timeline.json", "timeline.png"
    }  # fmt: skip
    journal = Journal(tmp_path / "cut" / "rollouts.jsonl")
    groups = {group.index: group for group in journal.recover()}
    trained = [index for step in sorted(journal._steps) for index in journal._steps[step]]
    assert trained == sorted(groups) == list(range(9 * recipe.prompts))
    versions = {
        group.index: {int(v) for t in group.trajectories for v in t.versions[t.chosen]} for group in groups.values()
    }
    assert all(found == {index // recipe.prompts} for index, found in versions.items())


def test_engines_that_take_turns_with_the_trainer_change_no_bit_and_need_no_seats(cluster, tmp_path, whole):
    free = max(1.0, sum(node.available["CPU"] for node in placement.cluster()))
    rollout = replace(recipe.rollout, colocate=True, release="weights")
    scaling = ScalingConfig(resources_per_worker={"CPU": free})
    rl.run(config(tmp_path, "turns", 4, reproducible=True, rollout=rollout, scaling=scaling))
    assert [same_numbers(r) for r in steps(tmp_path / "turns")] == [same_numbers(r) for r in whole[:4]]


@pytest.mark.parametrize(
    ("rollout", "more", "message"),
    [
        ({}, {"max_staleness": 1}, "set it to 0, or give the engines seats of their own"),
        ({"engines": 3}, {}, "3 engines of tp x pp = 1 x 1 ranks share the seats of the trainer, which has 1"),
        ({"engine": EngineConfig(tp=2)}, {"scaling": ScalingConfig(num_workers=(1, 4))}, "which has 1"),
        ({"engine": EngineConfig(engine="vllm")}, {}, "vLLM gives memory back on a GPU only"),
        ({"gpus": 1.0}, {}, "not what colocated engines take"),
        ({"colocate": False, "release": "weights"}, {}, "set rollout.colocate too"),
        ({"engines": (1, 2)}, {}, "give one number"),
    ],
)
def test_what_cannot_be_done_in_turns_is_refused(rollout, more, message):
    with pytest.raises(ValueError, match=message):
        replace(recipe, rollout=replace(recipe.rollout, **{"colocate": True, **rollout}), **more)


def struck(monkeypatch, rolling: dict[int, str], training: dict[int, str]) -> None:
    """Have an actor killed when a run has come so far: as the rollouts, or the training, after a step begin."""
    milestone, train, seen = driver._Run._milestone, Trainers.train, {}

    def strike(kind: str | None) -> None:
        if kind is not None:
            run = {"engine": lambda: seen["engines"]._started[0], "trainer": lambda: seen["trainers"].policy.where[0]}
            os.kill(run[kind]().pid, signal.SIGKILL)

    async def milestones(run, trainers, engines, writer, version) -> None:
        await milestone(run, trainers, engines, writer, version)
        seen.update(trainers=trainers, engines=engines, version=version)
        strike(rolling.pop(version, None))

    async def trained(trainers, batch) -> dict[str, float]:
        strike(training.pop(seen.get("version"), None))
        return await train(trainers, batch)

    monkeypatch.setattr(driver._Run, "_milestone", milestones)
    monkeypatch.setattr(Trainers, "train", trained)


@pytest.mark.slow
def test_whoever_dies_while_taking_turns_is_replaced_and_no_bit_is_lost(cluster, tmp_path, whole, monkeypatch):
    rolling, training = {1: "engine", 5: "trainer"}, {3: "engine", 6: "trainer"}
    struck(monkeypatch, rolling, training)
    disturbed = config(tmp_path, "struck", 9, 2, reproducible=True, rollout=replace(recipe.rollout, colocate=True))
    failures = FailureConfig(max_failures=2)
    rl.run(replace(disturbed, run=replace(disturbed.run, failure_config=failures)))
    assert rolling == training == {}
    assert [same_numbers(r) for r in steps(tmp_path / "struck")] == [same_numbers(r) for r in whole]


@pytest.mark.slow
def test_whoever_dies_when_half_of_a_push_is_written_is_replaced_and_no_bit_is_lost(
    cluster, tmp_path, whole, monkeypatch
):
    """An engine in the push of version 2, and the trainer's rank in that of version 6."""
    victims, pushes = {1: lambda _, engines: engines._started[0].pid, 5: lambda t, _: t.policy.where[0].pid}, {}
    milestone, push = driver._Run._milestone, WeightSync.push

    async def milestones(run, trainers, engines, writer, version) -> None:
        await milestone(run, trainers, engines, writer, version)
        if version in victims:
            (tmp_path / "push" / "victim").write_text(str(victims.pop(version)(trainers, engines)))

    async def pushed(sync, version, *args, **kwargs):
        try:
            pushes.setdefault(version, []).append(report := await push(sync, version, *args, **kwargs))
        except WorkerError:
            pushes.setdefault(version, []).append(None)
            raise
        return report

    monkeypatch.setattr(driver._Run, "_milestone", milestones)
    monkeypatch.setattr(WeightSync, "push", pushed)
    monkeypatch.setattr(trainers, "PolicyTask", HalfWay)
    disturbed = config(tmp_path, "push", 9, 2, reproducible=True)
    rl.run(replace(disturbed, run=replace(disturbed.run, failure_config=FailureConfig(max_failures=2))))
    assert victims == {}
    assert [report.failed for report in pushes[2]] == [(0,)]
    assert pushes[6][0] is None
    assert [same_numbers(r) for r in steps(tmp_path / "push")] == [same_numbers(r) for r in whole]


@pytest.mark.slow
def test_a_run_learns(cluster: Session, tmp_path: Path):
    result = rl.run(config(tmp_path, "learns", 60, schedule=recipe.schedule))
    assert result.metrics["eval/reward"] == 1.0
    assert np.mean([r["extra"]["rollout/reward_mean"] for r in steps(tmp_path / "learns")][-10:]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2])
def test_an_asynchronous_run_learns_and_keeps_to_its_bound(cluster: Session, tmp_path: Path, staleness: int):
    result = rl.run(config(tmp_path, "late", 60, max_staleness=staleness, schedule=recipe.schedule))
    assert result.metrics["eval/reward"] > 0.6  # it depends on the clock how old the answers are
    seen = [r["extra"]["rollout/staleness_max"] for r in steps(tmp_path / "late")]
    assert max(seen) <= staleness
    assert np.mean(seen[5:]) > 0


@pytest.mark.slow
def test_a_run_is_rewarded_by_a_model_that_dies_on_the_way(cluster: Session, tmp_path: Path, monkeypatch):
    folder, theirs = random_classifier(tmp_path / "classifier", vocabulary=13)
    monkeypatch.setattr(scorers, "Scorer", Failing)
    Path(folder, "fail").write_text("kill")  # at the first answers
    model = RewardModelConfig(path=str(folder), replicas=2, cpus=0.5)
    reward = RewardConfig(task=0.25, model=model)
    result = rl.run(config(tmp_path, "scored", 4, prompts=4, group_size=4, reward=reward))
    assert result.metrics["rollout/excluded_total"] == 0
    assert not Path(folder, "fail").exists()
    groups = list(Journal(tmp_path / "scored" / "rollouts.jsonl").recover())
    assert len(groups) == 16
    for t in (t for group in groups for t in group.trajectories):
        score = scores_of(theirs, [t.tokens.tolist()])[0, 0]
        assert t.reward == pytest.approx(score + 0.25 * t.info["task_reward"], abs=1e-4)
    spans = read_timeline(tmp_path / "scored" / "timeline.json")
    did = {(span.lane, span.name) for span in spans if span.lane.startswith("reward model")}
    assert {lane for lane, _ in did} == {"reward model 0", "reward model 1"}
    assert {name for _, name in did} == {"scoring", "restarting"}


@pytest.mark.parametrize(
    ("options", "groups", "free", "dp"),
    [
        ({"num_workers": (1, 8)}, 1, 6, 4),  # engines take two
        ({"num_workers": (1, 8)}, 2, 6, 2),  # a critic beside the policy
        ({"num_workers": (1, 3)}, 1, 64, 3),
        ({"num_workers": (3, 8)}, 1, 4, 8),  # not even the fewest: asked for as a whole, and refused
        ({"num_workers": 8}, 1, 4, 8),
        ({"num_workers": (1, 8), "resources_per_worker": {"CPU": 2.0}}, 1, 8, 3),
    ],
)
def test_as_many_ranks_train_as_find_seats_beside_the_engines(options, groups, free, dp):
    nodes = [Node("a", "a", {"CPU": 64.0}, {"CPU": float(free)})]
    config = replace(recipe, scaling=ScalingConfig(**options))
    assert fitting_dp(config, groups, [{"CPU": 1.0}] * 2, nodes) == dp


@pytest.mark.parametrize(
    ("engines", "requested", "free", "count"),
    [
        (2, None, 0, 2),
        (2, 1, 9, 2),
        ((1, 4), None, 3, 3),
        ((1, 4), None, 9, 4),
        ((2, 4), None, 0, 2),
        ((1, 4), 2, 9, 2),
    ],
)
def test_as_many_engines_start_as_find_seats(engines, requested, free, count):
    nodes = [Node("a", "a", {"CPU": 64.0}, {"CPU": float(free)})]
    assert fitting_engines(replace(recipe.rollout, engines=engines), nodes, requested) == count


@pytest.mark.slow
def test_a_run_of_a_range_of_ranks_takes_what_there_is(cluster: Session, tmp_path: Path, capsys):
    scaling = ScalingConfig(num_workers=(1, 4), resources_per_worker={"CPU": 3.0})
    wanted = min(4, int((sum(node.available["CPU"] for node in placement.cluster()) - 1) // 3))
    result = rl.run(config(tmp_path, "range", 3, prompts=4, group_size=4, scaling=scaling))
    assert f"training on {wanted} ranks, of 1 to 4" in capsys.readouterr().out
    assert result.metrics["consumed_samples"] == 48


@pytest.mark.slow
def test_a_run_that_was_cut_between_two_saves_goes_on_from_the_version_that_both_have(cluster: Session, tmp_path: Path):
    """The critic is saved first: it alone has version 4, and version 2 of it is read again."""
    few = {"prompts": 4, "group_size": 2, "reproducible": True, "algorithm": ppo.algorithm, "critic": ppo.critic}
    rl.run(config(tmp_path, "whole", 6, 2, **few))
    rl.run(config(tmp_path, "cut", 4, 2, **few))
    shutil.rmtree(tmp_path / "cut/checkpoints/step_00000004")
    rl.run(config(tmp_path, "cut", 6, 2, **few))
    assert [same_numbers(r) for r in steps(tmp_path / "cut")] == [same_numbers(r) for r in steps(tmp_path / "whole")]
    shutil.rmtree(tmp_path / "cut/checkpoints")
    with pytest.raises(ValueError, match="no good two are of one version"):
        rl.run(config(tmp_path, "cut", 8, 2, **few))
