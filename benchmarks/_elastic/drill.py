"""What both sides of elastic.py share: the model, a cluster of one-CPU nodes, who did which step when, and the faults.

A side (ours.py, peer.py) is a process with a cluster of its own, started with a folder and a `Drill`. Rank 0 appends a
line to steps.jsonl when a step has ended, each rank one to seats.jsonl when it takes a seat, and a thread of the side's
driver does the deeds and writes them to deeds.jsonl. So both meet the same faults at the same moment of the same step,
and what is read from them is read from files of the same form.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SHARED = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "rope_theta": 1e4}
MODEL = {"hidden_size": 512, "num_hidden_layers": 8, "intermediate_size": 1408, **SHARED}  # train_step.py's 25M
TOY = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, **SHARED}
LENGTH, BATCH = 64, 12  # tokens of a sequence, sequences of a global batch: four ranks take three each, three take four
RANKS = 4
MOMENT = 0.4  # of a median step: so long after its begin a fault strikes
PATIENCE_S = 180.0


@dataclass(frozen=True)
class Drill:
    """What is done to a run.

    deeds: (steps after the deed before was dealt with, "kill" | "kill node" | "add node"), in order.
    nodes: of one CPU each. fewest: ranks, of at most `RANKS`.
    interval: steps between checkpoints; faults strike in the middle between two.
    twins, spares: ours only. minutes: instead of deeds, SIGKILL to a rank every minute for so long.
    """

    deeds: tuple[tuple[int, str], ...] = ()
    nodes: int = RANKS
    fewest: int = RANKS
    interval: int = 10
    twins: bool = True
    spares: int = 0
    minutes: float = 0.0
    toy: bool = False
    seed: int = 0

    @property
    def sizes(self) -> dict[str, Any]:
        """The model's."""
        return TOY if self.toy else MODEL

    @property
    def told(self) -> str:
        """In words."""
        return ", ".join(deed for _, deed in self.deeds) or f"{self.minutes:g} minutes"

    def text(self) -> str:
        """As a side's command line takes it."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def read(cls, text: str) -> Drill:
        """What `text` wrote."""
        told = json.loads(text)
        return cls(**told | {"deeds": tuple((after, deed) for after, deed in told["deeds"])})


class Ledger:
    """Lines of JSON in a folder that all nodes see."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def note(self, name: str, **what: Any) -> None:
        """Append a line, in one write."""
        with (self.folder / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    def seat(self, rank: int, ranks: int) -> None:
        """This process is rank `rank` of `ranks` from now on."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        self.note("seats", time=time.time(), rank=rank, ranks=ranks, pid=os.getpid(), node=node)

    def step(self, step: int, start: float, ranks: int) -> None:
        """Step number `step`, begun at `start`, has ended now."""
        self.note("steps", step=step, start=start, end=time.time(), ranks=ranks)

    def read(self, name: str) -> list[dict[str, Any]]:
        """All whole lines."""
        path = self.folder / f"{name}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


@contextmanager
def nodes(count: int) -> Iterator[Any]:
    """A cluster of so many nodes of one CPU beside a head without any, this process connected to it."""
    import ray
    from ray.cluster_utils import Cluster

    from raytron.actors.session import LOCAL

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    threading.Thread(target=_follow, args=(os.getppid(),), name="follow", daemon=True).start()
    root = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # sockets want short paths
    head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": root, "_system_config": LOCAL}
    cluster = Cluster()
    try:
        for arguments in (head, *[{"num_cpus": 1}] * count):
            cluster.add_node(**arguments)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        shutil.rmtree(root, ignore_errors=True)


def _follow(parent: int) -> None:
    """Leave, as after Ctrl-C, once whoever started this process has left: a cluster would outlive both."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGINT)


class Deeds:
    """Does what `drill` says to the run whose files are in `folder`, in a thread of its own for the length of a block.

    Args:
        ready: whether the run is as it should be before anything is done to it.
        stop: called when all is done, or nothing more can be.
    """

    def __init__(
        self, cluster: Any, folder: str | Path, drill: Drill, ready: Callable[[], bool], stop: Callable[[], object]
    ) -> None:
        self._cluster, self._ledger, self._drill = cluster, Ledger(folder), drill
        self._ready, self._stop = ready, stop
        self._added: list[subprocess.Popen] = []
        self._chance = random.Random(drill.seed)
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="deeds", daemon=True)

    def __enter__(self) -> Deeds:
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        for process in self._added:
            process.terminate()
            process.wait()
        if self._error is not None and kind is None:
            raise self._error

    def _run(self) -> None:
        try:
            self._until(lambda: len(self._ledger.read("steps")) >= 3 and self._ready())
            if self._drill.minutes:
                self._every_minute()
            ranks = RANKS
            for after, deed in self._drill.deeds:
                ranks = {"kill node": ranks - 1, "add node": ranks + 1}.get(deed, ranks)
                at = self._strike(after, deed)
                self._until(lambda at=at, ranks=ranks: self._since(at, ranks) and self._ready())
            self._steps(5)
        except Exception as error:
            self._error = error
        finally:
            self._stop()

    def _strike(self, after: int, deed: str) -> float:
        """Do it, in the middle between two checkpoints and of a step; when it was done."""
        interval = self._drill.interval
        self._steps(after)
        self._until(lambda: self._ledger.read("steps")[-1]["step"] % interval == interval // 2)
        steps = self._ledger.read("steps")
        time.sleep(MOMENT * statistics.median(line["end"] - line["start"] for line in steps[-after:]))
        at = time.time()
        getattr(self, f"_{deed.replace(' ', '_')}")(self._victim(-1))
        self._ledger.note("deeds", deed=deed, time=at, step=steps[-1]["step"] + 1)
        return at

    def _every_minute(self) -> None:
        start = time.time()
        while (minute := (time.time() - start) // 60 + 1) <= self._drill.minutes:
            self._until(lambda at=start + 60 * minute: time.time() >= at, 120)
            if minute < self._drill.minutes:
                self._until(self._alive)
                at = time.time()
                self._kill(self._chance.choice(self._alive()))
                self._ledger.note("deeds", deed="kill", time=at, step=self._ledger.read("steps")[-1]["step"] + 1)
        self._ledger.note("deeds", deed="end", time=time.time(), step=0)

    def _kill(self, seat: dict[str, Any]) -> None:
        os.kill(seat["pid"], signal.SIGKILL)

    def _kill_node(self, seat: dict[str, Any]) -> None:
        """The rank, and the node it is on."""
        self._kill(seat)
        node = next(node for node in self._cluster.worker_nodes if node.node_id == seat["node"])
        self._cluster.remove_node(node, allow_graceful=False)

    def _add_node(self, _: object) -> None:
        """By a process of its own, since Ray's cluster_utils adds nodes in a main thread only."""
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._added.append(subprocess.Popen([*command, "--address", self._cluster.address], **quiet))

    def _victim(self, at: int) -> dict[str, Any]:
        return self._alive()[at]

    def _alive(self) -> list[dict[str, Any]]:
        """Seats by rank, as taken last, whose process is there."""
        seats = self._ledger.read("seats")
        newest = {line["rank"]: line for line in seats if line["rank"] < seats[-1]["ranks"]}
        return [newest[rank] for rank in sorted(newest) if Path(f"/proc/{newest[rank]['pid']}").exists()]

    def _since(self, at: float, ranks: int) -> bool:
        return any(line["start"] > at and line["ranks"] == ranks for line in self._ledger.read("steps"))

    def _steps(self, count: int) -> None:
        """Wait for so many more."""
        done = len(self._ledger.read("steps"))
        self._until(lambda: len(self._ledger.read("steps")) >= done + count)

    def _until(self, holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + patience_s
        while not holds():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the run does not get on; its last steps: {self._ledger.read('steps')[-3:]}")
            time.sleep(0.005)
