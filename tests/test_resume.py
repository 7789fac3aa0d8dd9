"""Kill the driver of a real run, start the same command again: the run's losses are those of one nobody disturbed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raytron.metrics import StepRecord, read_records

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 50
RECIPE = f"""
from raytron.config import *

config = PretrainConfig(
    model=ModelConfig(
        preset="llama-3m",
        overrides=dict(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
    data=DataConfig(mock=True, tokenizer="null:127", sequence_length=32),
    optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-4),
    schedule=ScheduleConfig(warmup_steps=5),
    global_batch_size=8,
    steps={STEPS},
    evaluation=EvalConfig(interval=20, batches=1),
    logging=LoggingConfig(tensorboard=False),
    run=RunConfig(checkpoint_config=CheckpointConfig(interval=5)),
    scaling=ScalingConfig(num_workers=4),
)

if __name__ == "__main__":
    config = cli(config)
    from raytron import pretrain

    pretrain.run(config)
"""
TP2_PP2 = ["--parallel.tp", "2", "--parallel.pp", "2"]
PP2_DP2 = ["--parallel.tp", "1", "--parallel.pp", "2"]


def start(tmp_path: Path, name: str, *flags: str) -> subprocess.Popen:
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    command = [sys.executable, str(recipe), "--run.name", name, "--run.storage-path", str(tmp_path), *flags]
    log = (tmp_path / f"{name}.log").open("a")
    return subprocess.Popen(command, cwd=tmp_path, env=shell(), stdout=log, stderr=subprocess.STDOUT)


def shell() -> dict[str, str]:
    """A user's environment, without what this process's own Ray has put there."""
    return {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}


def finish(tmp_path: Path, name: str, *flags: str) -> None:
    assert start(tmp_path, name, *flags).wait(timeout=300) == 0, (tmp_path / f"{name}.log").read_text()


def losses(tmp_path: Path, name: str) -> dict[int, float]:
    file = tmp_path / name / "metrics.jsonl"
    records = read_records(file) if file.exists() else []
    return {record.step: record.loss for record in records if isinstance(record, StepRecord)}


def follow(process: subprocess.Popen, tmp_path: Path, name: str, step: int) -> None:
    """Wait until the run has reported `step`."""
    deadline = time.monotonic() + 240
    while max(losses(tmp_path, name), default=0) < step:
        assert process.poll() is None, (tmp_path / f"{name}.log").read_text()
        assert time.monotonic() < deadline, "the run does not get to the step"
        time.sleep(0.02)


def kill_at(tmp_path: Path, name: str, step: int, *flags: str) -> None:
    """Run until `step` was reported, then SIGKILL the driver; its actors follow it."""
    process = start(tmp_path, name, *flags)
    follow(process, tmp_path, name, step)
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_killed_run_continues_bit_for_bit(tmp_path):
    flags = [*TP2_PP2, "--precision", "bf16"]
    finish(tmp_path, "quiet", *flags)
    kill_at(tmp_path, "killed", random.randint(6, 40), *flags)
    finish(tmp_path, "killed", *flags)
    quiet = losses(tmp_path, "quiet")
    assert len(quiet) == STEPS
    assert losses(tmp_path, "killed") == quiet


def test_a_killed_run_continues_at_another_layout_and_back(tmp_path):
    exact = ["--precision", "fp64"]
    finish(tmp_path, "quiet", *TP2_PP2, *exact)
    kill_at(tmp_path, "moved", random.randint(7, 18), *TP2_PP2, *exact)
    kill_at(tmp_path, "moved", random.randint(25, 38), *PP2_DP2, *exact)
    finish(tmp_path, "moved", *TP2_PP2, *exact)
    quiet = losses(tmp_path, "quiet")
    assert len(quiet) == STEPS
    assert losses(tmp_path, "moved") == pytest.approx(quiet, rel=1e-9)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_exits_cleanly(tmp_path, number):
    process = start(tmp_path, "stopped", *TP2_PP2, "--steps", "100000")
    follow(process, tmp_path, "stopped", 3)
    process.send_signal(number)
    assert process.wait(timeout=60) == 0, (tmp_path / "stopped.log").read_text()
    last = max(losses(tmp_path, "stopped"))
    assert (tmp_path / "stopped" / "checkpoints" / f"step_{last:08d}").is_dir()


def test_another_shell_sees_a_run_that_started_its_own_cluster(tmp_path):
    process = start(tmp_path, "seen", *TP2_PP2, "--steps", "100000")
    follow(process, tmp_path, "seen", 3)
    command = [str(Path(sys.executable).with_name("raytron")), "status", str(tmp_path / "seen"), "--json"]
    told = subprocess.run(command, env=shell(), capture_output=True, text=True, timeout=60)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    state = json.loads(told.stdout)
    assert state["run"] == "seen"
    assert state["step"] >= 2
    assert len(state["ranks"]) == 4


def descendants(root: int) -> dict[int, str]:
    """pid -> command line of everything below `root`."""
    parents, names = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(path.name)] = (path / "cmdline").read_text()
        except OSError:  # it ended while we looked
            continue
    found, pending = {}, [root]
    while pending:
        pid = pending.pop()
        children = [child for child, parent in parents.items() if parent == pid]
        found |= {child: names.get(child, "") for child in children}
        pending += children
    return found


def test_a_run_survives_a_killed_actor_when_told_to(tmp_path):
    flags = [*TP2_PP2, "--run.failure-config.max-failures", "1", "--steps", "200"]
    process = start(tmp_path, "hurt", *flags)
    follow(process, tmp_path, "hurt", 12)
    actors = [pid for pid, name in descendants(process.pid).items() if name.startswith("ray::Worker")]
    assert len(actors) == 4
    os.kill(random.choice(actors), signal.SIGKILL)
    log = tmp_path / "hurt.log"
    assert process.wait(timeout=240) == 0, log.read_text()
    assert sorted(losses(tmp_path, "hurt")) == list(range(1, 201))
    assert "failure 1 of 1" in log.read_text()
