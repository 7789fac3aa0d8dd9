"""A pretraining run on a cluster of its own, and what is done to it meanwhile; a script, since a process has one Ray.

    python -m tests.drill FOLDER NAME '[[20, "kill"], [60, "remove node"]]' [LAST]

Each deed is done once the run has reported its step, dealt with the deed before, and has its four ranks again. The run
is told to stop when all are dealt with and it has reported step LAST; it leaves metrics and journal under FOLDER/NAME.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from raytron import pretrain
from raytron.actors import live
from raytron.actors.journal import read_journal
from raytron.actors.mailbox import find_mailbox
from raytron.actors.session import LOCAL
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    ElasticConfig,
    FailureConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScalingConfig,
    ScheduleConfig,
)
from raytron.metrics import StepRecord, read_records

SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DEALT = ("recovered", "rewound", "resized")  # events that end what a deed began
CPUS = 2  # of a node: two ranks


def config(folder: Path, name: str) -> PretrainConfig:
    """Four ranks, of which two may be missing, in exact arithmetic."""
    return PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides=SIZES),
        data=DataConfig(mock=True, tokenizer="null:127", sequence_length=64),
        optimizer=OptimizerConfig(lr=3e-3, min_lr=3e-3),
        schedule=ScheduleConfig(kind="constant", warmup_steps=5),
        parallel=ParallelConfig(twins=True),
        precision="fp64",
        global_batch_size=8,
        steps=100_000,
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name, str(folder), FailureConfig(-1), CheckpointConfig(interval=50)),
        scaling=ScalingConfig(num_workers=(2, 4)),
        elastic=ElasticConfig(silence_s=5.0, hold_s=0.0),
    )


class Drill:
    """What is done to the run, by a thread beside its driver."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, deeds: list[list], last: int) -> None:
        self.cluster, self.folder, self.name, self.deeds, self.last = cluster, folder / name, name, deeds, last
        self.error: Exception | None = None
        self.added: list[subprocess.Popen] = []
        self.pids: set[int] = set()  # of everyone who ever had a rank, as far as was seen

    def run(self) -> None:
        try:
            for step, deed in self.deeds:
                self._until(lambda step=step: self._step() >= step)
                if deed != "add node":
                    self._until(lambda: len(self._ranks()) == 4)
                before = self._dealt()
                getattr(self, deed.replace(" ", "_"))()
                self._until(lambda before=before: self._dealt() > before)
            self._until(lambda: self._step() >= self.last)
        except Exception as error:
            self.error = error
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL to a rank."""
        os.kill(self._ranks()[-1]["pid"], signal.SIGKILL)

    def stop(self) -> None:
        """SIGSTOP to a rank."""
        os.kill(self._ranks()[0]["pid"], signal.SIGSTOP)

    def remove_node(self) -> None:
        """A node of two ranks goes without a word."""
        used = {rank["node"] for rank in self._ranks()}
        node = next(node for node in self.cluster.worker_nodes if node.node_id in used)
        self.cluster.remove_node(node, allow_graceful=False)

    def add_node(self) -> None:
        """A node comes; by a process of its own, since Ray's cluster_utils adds nodes in a main thread only."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", str(CPUS)]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.added.append(subprocess.Popen([*command, "--address", self.cluster.address], **quiet))

    def scale_down(self) -> None:
        """The user asks for two ranks."""
        live.ask(find_mailbox(self.name), {"num_workers": 2})

    def drain(self) -> None:
        """A node is to leave within a minute."""
        node, reason = self._ranks()[-1]["node"], 2  # DRAIN_NODE_REASON_PREEMPTION
        gcs = ray._raylet.GcsClient(address=self.cluster.address)
        gcs.drain_node(node, reason, "the drill", int(1000 * (time.time() + 60)))

    def reshape(self) -> None:
        """The user asks for tensor parallelism."""
        live.ask(find_mailbox(self.name), {"tp": 2, "pp": 1})

    def _ranks(self) -> list[dict]:
        ranks = live.status(find_mailbox(self.name)).get("ranks", ())  # none before there are any
        self.pids |= {rank["pid"] for rank in ranks}
        return [rank for rank in ranks if rank["rank"] is not None]

    def left_over(self) -> list[int]:
        """Processes that outlive the run by more than a moment."""
        deadline = time.monotonic() + 10
        while (left := [pid for pid in self.pids if Path(f"/proc/{pid}").exists()]) and time.monotonic() < deadline:
            time.sleep(0.1)
        return left

    def _step(self) -> int:
        file = self.folder / "metrics.jsonl"
        steps = [r.step for r in read_records(file) if isinstance(r, StepRecord)] if file.exists() else []
        return max(steps, default=0)

    def _dealt(self) -> int:
        return sum(event["event"] in DEALT for event in read_journal(self.folder / "journal.jsonl"))

    def _until(self, holds) -> None:
        deadline = time.monotonic() + 240
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the drill does not get on: {read_journal(self.folder / 'journal.jsonl')[-5:]}")
            time.sleep(0.1)


def main(folder: Path, name: str, deeds: list[list], last: int) -> None:
    """The run and its drill."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    root = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # pytest's own folders are too deep for sockets
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": root, "_system_config": LOCAL}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    drill = Drill(cluster, folder, name, deeds, last)
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=CPUS)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        threading.Thread(target=drill.run, daemon=True).start()
        pretrain.run(config(folder, name))
        if drill.error is not None:
            raise drill.error
    finally:
        ray.shutdown()
        for node in drill.added:
            node.terminate()
            node.wait()
        cluster.shutdown()
        shutil.rmtree(root, ignore_errors=True)
    if left := drill.left_over():
        raise RuntimeError(f"processes {left} are left over")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), int(sys.argv[4]))
