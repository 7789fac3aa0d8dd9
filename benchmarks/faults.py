"""RL runs that are killed: engines, trainer actors and drivers, at random moments, with SIGKILL.

The same run (echo-digit, GRPO, reproducible mode, a checkpoint every ten steps) once undisturbed and then once a seed
with one victim killed at a random moment of a random step. A killed driver is started again with the same command. Each
disturbed run must end with the numbers of the undisturbed one, to the bit: its last step's reward and loss, and its
greedy evaluation. The journal is checked: no group lost, none trained twice, in the same order. The longest time
without a step, from the kill on, must stay under 60 s.

    python benchmarks/faults.py [--quick] [--seeds 20]      (quick: three)

Needs no quiet machine. The row's number is the share of seeds in which all of it held.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import ROOT, emit, parse, write_results

BENCHMARK = "faults"
STEPS, INTERVAL, PROMPTS = 30, 10, 32
LIMIT_S = 60.0
TITLES = {"engine": "ray::RolloutEngine", "trainer": "ray::Worker"}  # of the victims' processes


class Run:
    """A recipe in a process group of its own."""

    def __init__(self, storage: str, name: str) -> None:
        self.folder = Path(storage, name)
        self._command = [sys.executable, str(ROOT / "recipes" / "grpo.py"), "--run.name", name]
        self._command += ["--run.storage-path", storage, "--steps", str(STEPS), "--reproducible"]
        self._command += ["--run.checkpoint-config.interval", str(INTERVAL), "--transcripts", "0"]
        self._command += ["--run.failure-config.max-failures", "2", "--evaluation.interval", "0"]
        self._log = Path(storage, f"{name}.log").open("ab")  # noqa: SIM115 - lives as long as it
        self.start()

    def start(self) -> None:
        """Begin, or go on after a kill."""
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(self._command, env=environment, stdout=self._log, stderr=self._log)

    def records(self) -> list[dict[str, Any]]:
        """What it has reported so far; the last of each step, since steps after a checkpoint may be made again."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        records = [json.loads(line) for line in lines if line.endswith("\n")]
        return list({(record["kind"], record["step"]): record for record in records}.values())

    def step(self) -> int:
        """Steps reported."""
        return max((record["step"] for record in self.records() if record["kind"] == "train"), default=0)

    def victim(self, kind: str) -> int | None:
        """The process id of an actor of this run; None while there is none."""
        if kind == "driver":
            return self.process.pid
        return next((pid for pid in descendants(self.process.pid) if title(pid).startswith(TITLES[kind])), None)

    def failed(self) -> str:
        """The end of what it printed."""
        return Path(self._log.name).read_text()[-3000:]


def descendants(root: int) -> Iterator[int]:
    """Process ids below `root`."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it ended meanwhile
            continue
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    yield from sorted(found - {root})


def title(pid: int) -> str:
    """What a process calls itself."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


def finish(run: Run) -> float:
    """Wait for the end of a run; the longest time without a step. RuntimeError when it fails or hangs."""
    seen, at, longest = run.step(), time.monotonic(), 0.0
    while run.process.poll() is None:
        time.sleep(0.2)
        if (step := run.step()) != seen:
            seen, at = step, time.monotonic()
        longest = max(longest, time.monotonic() - at)
        if longest > 2 * LIMIT_S:
            run.process.kill()
            raise RuntimeError(f"no step for {longest:.0f} s after step {seen}:\n{run.failed()}")
    if run.process.returncode:
        raise RuntimeError(f"it ended with status {run.process.returncode}:\n{run.failed()}")
    return longest


def disturb(run: Run, kind: str, step: int, within: float) -> None:
    """Kill a victim so many seconds after a step was reported."""
    while run.step() < step:
        if run.process.poll() is not None:
            raise RuntimeError(f"it ended before step {step}:\n{run.failed()}")
        time.sleep(0.02)
    time.sleep(within)
    while (pid := run.victim(kind)) is None:
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    if kind == "driver":
        run.process.wait()
        run.start()


def ends(run: Run) -> dict[str, Any]:
    """What must not depend on what was killed."""
    records = {(record["kind"], record["step"]): record for record in run.records()}
    last, evaluated = records["train", STEPS], records["eval", STEPS]
    return {
        "reward": last["extra"]["rollout/reward_mean"],
        "loss": last["loss"],
        "grad_norm": last["grad_norm"],
        "evaluation": evaluated["extra"]["reward"],
    }


def ledger(folder: Path, made: int, prompts: int, stopped: bool = False) -> str | None:
    """What is wrong with the journal in a run's folder; None if every group was trained once, in order.

    stopped: the run was told to end after `made` steps: later groups may have been recorded, each once.
    """
    from raytron.rl.buffer import from_line

    groups, steps = [], {}
    for line in (folder / "rollouts.jsonl").read_bytes().splitlines(keepends=True):
        record = from_line(line)
        if isinstance(record, tuple):
            if steps.setdefault(record[0], record[1]) != record[1]:
                return f"step {record[0]} was trained on other groups after the fault"
        else:
            groups.append(record.index)
    trained = [index for step in sorted(steps) for index in steps[step]]
    if len(groups) != len(set(groups)):
        return "a group was recorded twice"
    kept = [index for index in sorted(groups) if not stopped or index < made * prompts]
    if trained != list(range(made * prompts)) or kept != trained:
        return f"{len(trained)} groups trained, {len(groups)} recorded, {made * prompts} expected"
    return None


def drill(storage: str, seed: int, wanted: dict[str, Any]) -> dict[str, Any]:
    """One disturbed run; "wrong" says what did not hold."""
    chance = random.Random(seed)
    kind, step, within = chance.choice(["engine", "trainer", "driver"]), chance.randrange(STEPS - 1), chance.random()
    run = Run(storage, f"seed-{seed}")
    found: dict[str, Any] = {"seed": seed, "kind": kind, "step": step, "wrong": None}
    try:
        disturb(run, kind, step, within * 0.5)
        found["stalled"] = finish(run)
        if found["stalled"] > LIMIT_S:
            found["wrong"] = f"no step for {found['stalled']:.0f} s"
        elif (got := ends(run)) != wanted:
            found["wrong"] = f"{got} instead of {wanted}"
        else:
            found["wrong"] = ledger(run.folder, STEPS, PROMPTS)
    except RuntimeError as error:
        found["wrong"] = str(error)
    finally:
        if run.process.poll() is None:
            run.process.kill()
            run.process.wait()
    print(json.dumps(found), file=sys.stderr, flush=True)
    return found


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], ["--force", *sys.argv[1:]], seeds=20)
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as storage:
        calm = Run(storage, "calm")
        finish(calm)
        wanted = ends(calm)
        drills = [drill(storage, seed, wanted) for seed in range(3 if arguments.quick else arguments.seeds)]
    rows = [row(kind, [found for found in drills if found["kind"] == kind]) for kind in ("engine", "trainer", "driver")]
    rows.append(row("all", drills))
    if arguments.output or not arguments.quick:
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)
    for found in drills:
        if found["wrong"]:
            sys.exit(f"seed {found['seed']} ({found['kind']} at step {found['step']}): {found['wrong']}")


def row(kind: str, drills: list[dict[str, Any]]) -> dict[str, Any]:
    good = sum(found["wrong"] is None for found in drills)
    details = {"runs": len(drills), "target": 1.0}
    if stalls := [found["stalled"] for found in drills if "stalled" in found]:
        details["longest without a step"] = f"{max(stalls):.1f} s"
    return emit(BENCHMARK, f"{kind} killed", good / max(1, len(drills)), unit="share", details=details)


if __name__ == "__main__":
    main()
