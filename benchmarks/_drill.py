"""A pretraining run on a cluster of its own, and what is done to it meanwhile: ranks, nodes and drivers that go.

    Site     a Ray cluster of small nodes on this machine; one that is taken away goes with all its processes at once
    Driven   the run's driver, a process of its own; killed, it is started again by the same command
    Drill    does deed after deed to the run, as tests and `elastic_faults.py` ask

A signal from outside hits a phase by chance, and saving or voting almost never. So ranks look for a trap, a file named
after their process, wherever a phase begins (`Trap`), and kill or stop themselves there. Each step also sleeps for a
moment (`pace_s`): what is to be shown takes wall time, and steps that take none make nothing but rounding errors.

    python benchmarks/_drill.py FOLDER NAME '[{"what": "kill", "phase": "vote"}, {"what": "stop"}]' [LAST [MISSED_S]]

A script, since a process has one Ray. The run leaves metrics and journal in FOLDER/NAME.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor, nn

from raytron import pretrain
from raytron.actors import live
from raytron.actors.journal import read_journal
from raytron.actors.mailbox import find_mailbox
from raytron.actors.session import LOCAL
from raytron.config import (
    CheckpointConfig,
    DataConfig,
    ElasticConfig,
    EvalConfig,
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
from raytron.training.engine import TrainEngine
from raytron.training.task import PretrainTask
from raytron.training.twins import twins_that_differ

ROOT = Path(__file__).resolve().parents[1]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
RANKS, LEAST = 4, 2  # as many as there may be, as few as there may be
CPUS = 2  # of a node: two ranks
MOST_NODES = 4
BATCH = 8  # sequences
DRAIN_S = 30.0  # a node that is told to leave is gone so soon
PATIENCE_S = 300.0  # with a run that does not get on
# A node that was taken away refuses connections, and is missed as fast as in a Ray of a run's own; one that is only
# short of a processor is not taken for dead.
RAY = LOCAL | {"health_check_timeout_ms": 20_000}
TRAP_S = 30.0  # so long a rank may take to come to a phase
LOOK_S = 0.05
STEP_PHASES = ("forward", "backward", "all-reduce", "vote", "optimizer", "gather")
MOVE_PHASES = ("plan", "move")  # of a change of seats: nothing has moved yet; bytes are moving
PHASES = (*STEP_PHASES, "evaluation", "save", *MOVE_PHASES)
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
SHAPES = ((1, 1), (2, 1), (1, 2), (2, 2))  # tp, pp


def config(folder: str, name: str, precision: str = "fp64", lr: float = 3e-4, **changes: Any) -> PretrainConfig:
    """Four ranks, of which two may be missing, and evaluations and saves often enough to be hit.

    At ten times that learning rate the model has learnt all there is by step 200, and from there on the difference of a
    last bit is ten times as large every fifty steps, without any fault.
    """
    plain = PretrainConfig(
        model=ModelConfig(preset="llama-3m", overrides=SIZES),
        data=DataConfig(mock=True, tokenizer="null:127", sequence_length=64),
        optimizer=OptimizerConfig(lr=lr, min_lr=lr),
        schedule=ScheduleConfig(kind="constant", warmup_steps=5),
        parallel=ParallelConfig(twins=True),
        precision=precision,
        global_batch_size=BATCH,
        steps=100_000,  # the order of the data depends on it, so that it is the same for all
        evaluation=EvalConfig(interval=15, batches=1),
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name, folder, FailureConfig(-1), CheckpointConfig(interval=10)),
        scaling=ScalingConfig(num_workers=(LEAST, RANKS)),
        elastic=ElasticConfig(silence_s=8.0, hold_s=0.0),
    )
    return replace(plain, **changes)


# ------------------------------------------------------------------------------------------- what runs in the ranks


class Trap:
    """Of this process, in the run's folder. `trap("vote")` where the vote begins does what the file says, if it says
    so of the vote: `kill`, `stop`, or `wait` for the end of the node."""

    def __init__(self, folder: Path) -> None:
        self._set, self._sprung = trap_files(folder, os.getpid())

    def __call__(self, phase: str) -> None:
        if not self._set.exists():
            return
        deed, where = self._set.read_text().split()
        if where != phase:
            return
        with suppress(FileNotFoundError):  # taken back at this moment
            self._set.rename(self._sprung)
            if deed != "wait":
                os.kill(os.getpid(), SIGNALS[deed])
            while True:
                time.sleep(1)


def trap_files(folder: Path, pid: int) -> tuple[Path, Path]:
    """The file that is a process's trap, and what it is called once it has sprung."""
    return folder / "traps" / str(pid), folder / "traps" / f"{pid}.sprung"


class TrapEngine(TrainEngine):
    """An engine that looks for its trap where each phase begins, and in the middle of backward and the all-reduces."""

    def __init__(self, model: Any, config: Any, trap: Trap) -> None:
        self.trap = trap
        super().__init__(model, config)

    def _forward(self, *args: Any) -> Tensor:
        if torch.is_grad_enabled():
            self.trap("forward")
        return super()._forward(*args)

    def _make_hook(self, param: nn.Parameter, view: Tensor) -> Callable[[Tensor], None]:
        accumulated = super()._make_hook(param, view)

        def trapped(param: Tensor) -> None:
            self.trap("backward")
            accumulated(param)

        return trapped

    def _cut_shards(self) -> None:
        super()._cut_shards()
        finish = self._reducer.finish

        def trapped() -> None:
            self.trap("all-reduce")
            finish()

        self._reducer.finish = trapped

    def _enter(self, phase: str) -> None:
        super()._enter(phase)
        self.trap({"update": "optimizer"}.get(phase, phase))

    def evaluate(self, batches: Sequence[Any]) -> Tensor:
        self.trap("evaluation")
        return super().evaluate(batches)


class TrapAxis:
    """The axis that a move is made over. It looks for the trap when a message is on its way, and, for those who only
    receive, before all tell each other that what was moved is there: the weights are first, the moments follow."""

    def __init__(self, axis: Any, trap: Trap) -> None:
        self._axis, self._trap = axis, trap

    def __getattr__(self, name: str) -> Any:
        return getattr(self._axis, name)

    def isend(self, tensor: Tensor, dst: int) -> Any:
        handle = self._axis.isend(tensor, dst)
        self._trap("move")
        return handle

    def barrier(self) -> None:
        self._trap("move")
        self._axis.barrier()


class TrapTransit:
    """The world that a move is made over."""

    def __init__(self, world: Any, trap: Trap) -> None:
        self._world, self._trap = world, trap

    def axis(self, name: str) -> TrapAxis:
        return TrapAxis(self._world.axis(name), self._trap)


class TrapTask(PretrainTask):
    """A rank of the drilled run."""

    pace_s = 0.0

    def __init__(self, world: Any, config: Any, arch: Any, prepared: Any, checkpoints: str, **how: Any) -> None:
        self.trap = Trap(Path(checkpoints).parent)
        super().__init__(world, config, arch, prepared, checkpoints, **how)

    def train_step(self) -> Any:
        time.sleep(self.pace_s)
        return super().train_step()

    def save(self, wait: bool = False) -> str | None:
        self.trap("save")
        if differing := twins_that_differ(self.engine):
            raise ValueError(f"twins differ in {differing} at step {self.engine.counters.step}")
        return super().save(wait)

    def reshape(self, world: Any, transit: Any, *args: Any) -> Any:
        self.trap("plan")
        return super().reshape(world, TrapTransit(transit, self.trap), *args)

    def restart(self, world: Any) -> tuple[int, list[str]]:
        self.trap("plan")
        return super().restart(world)

    def load(self) -> tuple[int, list[str]]:
        found = super().load()
        self.trap("move")  # others may still be reading
        return found

    def _engine_of(self, model: Any, config: Any) -> TrapEngine:
        return TrapEngine(model, config, self.trap)


def drive(folder: str, name: str, options: str) -> None:
    """The driver's process."""
    given = json.loads(options)
    scaling = {"scaling": ScalingConfig(num_workers=tuple(given.pop("num_workers")))} if "num_workers" in given else {}
    shape = {"parallel": ParallelConfig(twins=True, tp=given.pop("tp"))} if "tp" in given else {}
    task = type("Paced", (TrapTask,), {"pace_s": given.pop("pace_s", 0.0)})  # by value, so that it comes along
    run = type("Drilled", (pretrain.Run,), {"task": task})
    run(config(folder, name, **given, **scaling, **shape)).drive()


# ------------------------------------------------------------------------------------------------- what it runs on


class Site:
    """A cluster whose head has no seats and whose other nodes have two each; this process is connected to it.

    Args:
        missed_s: how long Ray takes to notice that a node is gone, where it is not to be fast.
    """

    def __init__(self, nodes: int = 2, missed_s: float = 0.0) -> None:
        os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}  # for all that is started from here
        here = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, here))
        os.environ.pop("RAY_ADDRESS", None)
        self._root = tempfile.mkdtemp(prefix="rt-", dir="/tmp")  # other folders may be too deep for sockets
        slow = {"health_check_failure_threshold": 10, "health_check_period_ms": int(100 * missed_s)} if missed_s else {}
        head = {"num_cpus": 0, "include_dashboard": False, "temp_dir": self._root, "_system_config": RAY | slow}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self.address = self._cluster.address
        self.leaving: set[str] = set()
        try:
            for _ in range(nodes):
                self.add()
            ray.init(self.address, log_to_driver=False, logging_level="ERROR", namespace="drill")
        except BaseException:
            self.close()
            raise

    @property
    def head(self) -> str:
        """Id of the node without seats."""
        return self._cluster.head_node.node_id

    @property
    def nodes(self) -> list[str]:
        """Ids of the nodes that have seats and are not to leave."""
        return sorted(n.node_id for n in self._cluster.worker_nodes if n.node_id not in self.leaving)

    def add(self) -> None:
        """A node comes."""
        self._cluster.add_node(num_cpus=CPUS)

    def drain(self, node: str) -> None:
        """The node is told that it will be gone in `DRAIN_S`."""
        self.leaving.add(node)
        gcs, preemption = ray._raylet.GcsClient(address=self.address), 2
        gcs.drain_node(node, preemption, "the drill", int(1000 * (time.time() + DRAIN_S)))

    def freeze(self, node: str) -> None:
        """The node stands still, with all its processes: nobody gets an answer, and nobody is refused."""
        self.leaving.add(node)
        for pid in self.processes(node):
            signal_to(pid, signal.SIGSTOP)

    def take_away(self, node: str) -> None:
        """The node goes without a word, and with it all its processes, as a machine does."""
        one = self._find(node)
        family = self._family(one)  # whoever is stopped would not notice that its node is gone, and stay
        self._cluster.remove_node(one, allow_graceful=False)
        for pid in family:
            signal_to(pid, signal.SIGKILL)
        self.leaving.discard(node)

    def processes(self, node: str) -> list[int]:
        """Of the node."""
        return self._family(self._find(node))

    def _find(self, node: str) -> Any:
        return next(one for one in self._cluster.worker_nodes if one.node_id == node)

    def _family(self, node: Any) -> list[int]:
        return descendants([info[0].process.pid for info in node.all_processes.values()])

    def close(self) -> None:
        """End the cluster."""
        ray.shutdown()
        self._cluster.shutdown()
        shutil.rmtree(self._root, ignore_errors=True)

    def __enter__(self) -> Site:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Driven:
    """The run's driver on a site. options: of `config`, besides `pace_s`, `num_workers` and `tp`."""

    def __init__(self, site: Site, folder: Path, name: str, options: Mapping[str, Any]) -> None:
        self.name, self.folder, self._log = name, folder / name, folder / f"{name}.log"
        program = "import sys, _drill; _drill.drive(*sys.argv[1:])"
        self._command = [sys.executable, "-c", program, str(folder), name, json.dumps(options)]
        self._env = {**os.environ, "RAY_ADDRESS": site.address}
        self.start()

    def start(self) -> None:
        """Begin, or go on after a kill."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, env=self._env, stdout=log, stderr=log)

    def stop(self) -> None:
        """Have it finish its step, save and end.

        Raises:
            RuntimeError: it ended otherwise.
        """
        self.process.send_signal(signal.SIGTERM)
        if code := self.process.wait(PATIENCE_S):
            raise RuntimeError(f"it ended with status {code}:\n{self.said()}")

    def end(self) -> None:
        """Kill it, if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def step(self) -> int:
        """The step reported last."""
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return 0
        with file.open("rb") as lines:
            lines.seek(max(0, file.stat().st_size - 8192))
            whole = [line for line in lines.read().split(b"\n")[:-1] if line.startswith(b'{"kind": "train"')]
        return json.loads(whole[-1])["step"] if whole else 0

    def said(self) -> str:
        """The end of what it printed."""
        return self._log.read_text(errors="replace")[-4000:]


def descendants(roots: Sequence[int]) -> list[int]:
    """Processes below these, themselves included."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it ended meanwhile
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    found = set(roots)
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found)


def signal_to(pid: int, number: int) -> None:
    """Send it, if the process is there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def alive(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------------- what is done


@dataclass(frozen=True)
class Deed:
    """Something done to the run.

    Attributes:
        what: a method of `Drill`.
        phase: where the rank that is hit is at that moment; "" is anywhere. For planned changes it means nothing.
        chance: in [0, 1), says which rank, node, size or shape.
        after: steps done since the deed before, once the run has its ranks again.
        hasty: do it at once instead, whatever the run is at; where the phase is one of a move, then of the move that
            the deed before brings about.
    """

    what: str
    phase: str = ""
    chance: float = 0.999
    after: int = 10
    hasty: bool = False


class Drill:
    """Does deeds to `driven` on `site`.

    Attributes:
        done: what was done, and at which phase.
        pids: of everyone who ever had a rank, as far as was seen.
    """

    def __init__(self, site: Site, driven: Driven, patience_s: float = PATIENCE_S) -> None:
        self.site, self.driven, self._patience_s = site, driven, patience_s
        self.done: Counter[str] = Counter()
        self.pids: set[int] = set()
        self._victims: set[int] = set()
        self._aimed: dict[int, dict] = {}  # ranks whose traps are set already, by their deed's id
        self._size, self._shape = RANKS, (1, 1)  # that the user asked for
        (driven.folder / "traps").mkdir(parents=True, exist_ok=True)

    def run(self, deeds: Sequence[Deed], last: int = 0, until: float = inf) -> None:
        """The deeds, none from step `until` on; then on to step `last`, where the run is told to stop."""
        for deed, following in zip(deeds, [*deeds[1:], None], strict=False):
            if self.driven.step() >= until:
                break
            if not deed.hasty:
                self._settled()
                self._steps(deed.after)
            if following and following.hasty and following.phase in MOVE_PHASES:
                self._aim(following)  # a move takes a tenth of a second
            phase = getattr(self, deed.what.replace(" ", "_"))(deed)
            self.done[f"{deed.what} ({phase})" if phase else deed.what] += 1
            print(f"{deed.what} {phase}, step {self.driven.step()}", file=sys.stderr, flush=True)
        self._settled()
        self._steps(10)
        self._until(lambda: self.driven.step() >= last)
        self.driven.stop()

    def left_over(self) -> list[int]:
        """Ranks that outlive the run by more than a moment."""
        deadline = time.monotonic() + 20
        while (left := [pid for pid in self.pids if alive(pid)]) and time.monotonic() < deadline:
            time.sleep(LOOK_S)
        return left

    # Deeds; each returns the phase that it hit

    def kill(self, deed: Deed) -> str:
        """SIGKILL to a rank."""
        return self._hit(deed)

    def stop(self, deed: Deed) -> str:
        """SIGSTOP to a rank."""
        return self._hit(deed)

    def remove_node(self, deed: Deed) -> str:
        """A node goes while one of its ranks is at the phase."""
        self._provide()
        aimed = self._aimed.get(id(deed), {}).get("node")
        node = aimed if aimed in self.site.nodes else self._node(deed)
        phase = self._hit(deed, node)
        self._victims |= {rank["pid"] for rank in self._ranks() if rank["node"] == node}
        self.site.take_away(node)
        return phase

    def freeze_node(self, deed: Deed) -> str:
        """A node stands still, and is taken away once nobody counts on it."""
        self._provide()
        node = self._node(deed)
        self._victims |= {rank["pid"] for rank in self._ranks() if rank["node"] == node}
        self.site.freeze(node)
        self._until(lambda: node not in {r["node"] for r in self._ranks() or [{"node": node}]})
        self.site.take_away(node)
        return ""

    def drain(self, deed: Deed) -> str:
        """A node is told that it is to leave, and does: once nobody sits there, or when its time has come."""
        self._provide()
        node = self._node(deed)
        self.site.drain(node)
        gone = time.monotonic() + DRAIN_S
        self._until(lambda: node not in {r["node"] for r in self._ranks() or [{"node": node}]}, gone)
        self._victims |= {rank["pid"] for rank in self._ranks() if rank["node"] == node}
        self.site.take_away(node)
        return ""

    def add_node(self, deed: Deed) -> str:
        """A node comes."""
        if len(self.site.nodes) >= MOST_NODES:  # another goes first
            used = {rank["node"] for rank in self._ranks()}
            self.site.take_away(min(self.site.nodes, key=lambda node: (node in used, node)))
        self.site.add()
        return ""

    def resize(self, deed: Deed) -> str:
        """The user asks for another number of ranks."""
        unit = self._shape[0] * self._shape[1]
        sizes = [n for n in range(LEAST, RANKS + 1) if n % unit == 0]
        sizes = [n for n in sizes if n != self._size] or sizes
        self._size = sizes[int(deed.chance * len(sizes))]
        self._ask({"num_workers": self._size})
        return ""

    def reshape(self, deed: Deed) -> str:
        """The user asks for another tp x pp."""
        shapes = [shape for shape in SHAPES if shape != self._shape]
        self._shape, self._size = shapes[int(deed.chance * len(shapes))], RANKS
        self._ask({"tp": self._shape[0], "pp": self._shape[1]})
        return ""

    def kill_driver(self, deed: Deed) -> str:
        """SIGKILL to the driver, when a rank has come to the phase; the same command again."""
        phase = self._hit(deed) if deed.phase else ""
        self._victims |= {rank["pid"] for rank in self._ranks()}
        self.driven.process.kill()
        self.driven.process.wait()
        self.driven.start()
        return phase

    def _hit(self, deed: Deed, node: str | None = None) -> str:
        """A rank (of the node) falls at the phase; "any" where it does not come there."""
        rank = self._aimed.get(id(deed))
        if rank is None or not self._within_reach(rank["pid"]):
            rank = self._aim(deed, node)
        pid = rank["pid"]
        trap, sprung = trap_files(self.driven.folder, pid)
        if deed.phase:
            self._until(lambda: sprung.exists() or not alive(pid), time.monotonic() + TRAP_S)
        del self._aimed[id(deed)]
        self._victims |= {pid}
        if sprung.exists():
            return deed.phase
        with suppress(FileNotFoundError):
            trap.unlink()
        if deed.what in SIGNALS:
            signal_to(pid, SIGNALS[deed.what])
        return "any"

    def _aim(self, deed: Deed, node: str | None = None) -> dict:
        """Set the trap of a rank (of the node, where it is a node that is to go)."""
        ranks: list[dict] = []
        node = node or (self._node(deed) if deed.what == "remove node" else None)
        taken = {rank["pid"] for rank in self._aimed.values()} | self._victims

        def there() -> bool:
            ranks[:] = [r for r in self._ranks() if alive(r["pid"]) and r["pid"] not in taken]
            ranks[:] = [r for r in ranks if r["node"] == node] or ranks
            return bool(ranks)

        self._until(there)
        self._aimed[id(deed)] = rank = ranks[int(deed.chance * len(ranks))]
        if deed.phase:
            trap, _ = trap_files(self.driven.folder, rank["pid"])
            part = trap.with_suffix(".part")
            part.write_text(f"{deed.what if deed.what in SIGNALS else 'wait'} {deed.phase}")
            part.rename(trap)
        return rank

    def _within_reach(self, pid: int) -> bool:
        return alive(pid) or trap_files(self.driven.folder, pid)[1].exists()

    def _node(self, deed: Deed) -> str:
        used = {rank["node"] for rank in self._ranks()}
        nodes = [node for node in self.site.nodes if node in used] or self.site.nodes
        return nodes[int(deed.chance * len(nodes))]

    def _provide(self) -> None:
        """A node is about to go: not the last one."""
        if len(self.site.nodes) < 2:
            self.site.add()

    def _ask(self, request: dict[str, int]) -> None:
        """Like `raytron scale` and `reshape`; again where the driver died before it had taken it on."""

        def asked() -> bool:
            with suppress(ValueError, ray.exceptions.RayError):
                live.ask(find_mailbox(self.driven.name), request, PATIENCE_S)
                return True
            return False

        self._until(asked)

    # What the run is at

    def _ranks(self) -> list[dict]:
        """As of a second ago; none while there is no driver."""
        try:
            state = live.status(find_mailbox(self.driven.name))
        except (ValueError, ray.exceptions.RayError):
            return []
        ranks = state.get("ranks", [])
        self.pids |= {rank["pid"] for rank in ranks if rank["pid"]}
        return [rank for rank in ranks if rank["rank"] is not None]

    def _settled(self) -> None:
        """Until whoever was hit is gone and the run has as many ranks as there is room for, or does not want them."""

        def settled() -> bool:
            ranks = self._ranks()
            there = len(ranks) >= LEAST and all(alive(rank["pid"]) for rank in ranks)
            return there and not any(alive(pid) for pid in self._victims)

        self._until(settled)
        self._victims.clear()
        self._until(lambda: settled() and len(self._ranks()) == self._expected(), time.monotonic() + self._patience_s)

    def _expected(self) -> int:
        unit, room = self._shape[0] * self._shape[1], min(self._size, CPUS * len(self.site.nodes))
        return room // unit * unit or room

    def _steps(self, count: int) -> None:
        """So many more steps, those that are done again included."""
        seen, made = self.driven.step(), 0

        def more() -> bool:
            nonlocal seen, made
            step = self.driven.step()
            made, seen = made + max(0, step - seen), step
            return made >= count

        self._until(more)

    def _until(self, holds: Callable[[], bool], give_up: float | None = None) -> None:
        """Wait for it; from the time `give_up` on do without it.

        Raises:
            RuntimeError: the run has ended meanwhile, or does not get on.
        """
        deadline = time.monotonic() + PATIENCE_S
        while not holds():
            if give_up is not None and time.monotonic() > give_up:
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"it does not get on: {read_journal(self.driven.folder / 'journal.jsonl')[-8:]}")
            if (code := self.driven.process.poll()) is not None:
                raise RuntimeError(f"it ended with status {code}:\n{self.driven.said()}")
            time.sleep(LOOK_S)


def main(folder: Path, name: str, deeds: Sequence[Deed], last: int = 0, missed_s: float = 0.0, **options: Any) -> Drill:
    """A run and its drill, from the start of a cluster to its end; the drill, with what it did.

    missed_s: see `Site`.

    Raises:
        RuntimeError: the run did not come through, or left processes over.
    """
    with Site(missed_s=missed_s) as site:
        driven = Driven(site, folder, name, options)
        drill = Drill(site, driven)
        try:
            drill.run(deeds, last)
        finally:
            driven.end()
        if left := drill.left_over():
            raise RuntimeError(f"processes {left} are left over")
    return drill


if __name__ == "__main__":
    listed = [Deed(**deed) for deed in json.loads(sys.argv[3])]
    main(Path(sys.argv[1]), sys.argv[2], listed, *map(int, sys.argv[4:]), pace_s=0.02 if listed else 0.0)
