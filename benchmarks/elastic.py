"""From a fault to the next step: runs that go on in place against Ray Train v2, which starts again from a checkpoint.

Four ranks of the 25M model (fp32, small batches) on nodes of one CPU, and the same faults to both, at the same step and
moment of it:

    shrink   SIGKILL to a rank and its node, and there is no other: the others go on without it
    grow     then a node comes: how long those who train stand still for it, in normal steps
    spare    SIGKILL to a rank while a warm one stands by (ours; the peer knows none and starts again)
    cold     SIGKILL to a rank whose seat stays: another process takes it
    rewind   the same without twins: from the newest checkpoint

What counts is the time from the fault to the begin of the first step after it, whichever step that is: the peer's is
always one that had been done before. The peer (_elastic/peer.py) is tuned as far as it can be from outside. Each run is
a process with a cluster of its own; sides take turns.

Our recoveries are then taken apart: what each part took, beside its floor (_elastic/floors.py), and the bytes moved
beside what places lack, counted without the planner. At last the price: the same step with and without twins, in turns.

Goodput: a rank is ended every minute; steps that count (each once) times a normal step, over the time.

It takes an hour, and another one for goodput, in which much can happen: with --keep, what each run came to is
kept in a folder, and the same command goes on where it was cut.

    python benchmarks/elastic.py [--quick] [--case cold] [--repeats 3] [--goodput 20] [--size toy] [--keep FOLDER]
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from _common import ROOT, Samples, emit, parse, significant, write_results
from _elastic.drill import Drill, Ledger

BENCHMARK, PEER = "elastic", "Ray Train v2, tuned, DDP"
SIDES = ("ours", "peer")
KILL = (12, "kill")
CASES = {
    "shrink": Drill(deeds=((12, "kill node"), (10, "add node")), fewest=3),
    "spare": Drill(deeds=(KILL, KILL), nodes=5, spares=1),
    "cold": Drill(deeds=(KILL, KILL)),
    "rewind": Drill(deeds=(KILL,), twins=False),
}
QUICK = ("spare", "cold")
TARGETS = {"shrink": 10.0, "spare": 10.0, "cold": 3.0}
LIMIT_S = 600.0
PARTS = ("detect", "survey", "release", "newcomers", "rendezvous", "move", "adopt", "load")
HERE = Path(__file__).parent
Keep = Callable[[str], Path | None]


# ------------------------------------------------------------------------------------------------------------- running


def side(name: str, *arguments: object, limit_s: float = LIMIT_S) -> str:
    """What a module of _elastic/ prints. RuntimeError with the end of what it said if it fails."""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"_elastic.{name}", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, **pipes)
    try:
        out, errors = process.communicate(timeout=limit_s)
    except BaseException:
        process.send_signal(signal.SIGINT)  # so that it takes its cluster with it
        process.communicate(timeout=60)
        raise
    if process.returncode:
        raise RuntimeError(f"{name} ended with status {process.returncode}:\n{(out + errors)[-4000:]}")
    return out


def drilled(name: str, drill: Drill, kept: Path | None = None) -> Outcome:
    """What came of one side's run; with a file, what it says, or will say from now on."""
    if kept is not None and kept.exists():
        return Outcome(**json.loads(kept.read_text()))
    start = time.monotonic()
    outcome = _drilled(name, drill)
    print(f"{name}, {drill.told}: {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)
    if kept is not None:
        unfinished = kept.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(asdict(outcome)))
        unfinished.rename(kept)
    return outcome


def _drilled(name: str, drill: Drill) -> Outcome:
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        side(name, folder, drill.text(), limit_s=LIMIT_S + 90 * drill.minutes)
        ledger, journal = Ledger(folder), Ledger(Path(folder, "run"))
        return Outcome(*map(ledger.read, ("steps", "deeds", "changes")), journal.read("journal"))


@dataclass
class Outcome:
    """A run: lines of its files."""

    steps: list[dict[str, Any]]
    deeds: list[dict[str, Any]]
    changes: list[dict[str, Any]]
    events: list[dict[str, Any]]

    def faults(self) -> list[Fault]:
        """What was done to it, and what it did then."""
        ends = [deed["time"] for deed in self.deeds[1:]] + [float("inf")]
        return [Fault(self, deed, end) for deed, end in zip(self.deeds, ends, strict=True)]

    def normal(self, until: float, ranks: int | None = None) -> float:
        """Median seconds of a step begun before `until`, without the first two."""
        done = [line for line in self.steps[2:] if line["end"] < until and ranks in (None, line["ranks"])]
        return statistics.median(line["end"] - line["start"] for line in done)


@dataclass
class Fault:
    """A deed done to `run`, until the next one at `end`."""

    run: Outcome
    deed: dict[str, Any]
    end: float

    @cached_property
    def before(self) -> dict[str, Any]:
        """The last step that had been done."""
        return [line for line in self.run.steps if line["end"] <= self.first["start"]][-1]

    @cached_property
    def first(self) -> dict[str, Any]:
        """The first step begun after it; after a node came, with one rank more."""
        after = [line for line in self.run.steps if line["start"] > self.deed["time"]]
        more = self.deed["deed"] == "add node" and after[0]["ranks"]
        return next(line for line in after if not more or line["ranks"] > more)

    @property
    def seconds(self) -> float:
        """From the deed to the begin of the first step."""
        return self.first["start"] - self.deed["time"]

    @property
    def lost(self) -> int:
        """Steps that had been done and are done again."""
        return max(0, self.before["step"] + 1 - self.first["step"])

    @property
    def stall(self) -> float:
        """Between the steps, those done again included, in normal ones."""
        return (self.first["start"] - self.before["end"]) / self.run.normal(self.deed["time"]) + self.lost

    @property
    def parts(self) -> dict[str, float]:
        """Seconds of each part of the recovery; ours only."""
        start, begun = self.deed["time"], self.first["start"]
        events = [event for event in self.run.events if start <= event["time"] <= min(begun + 0.1, self.end)]
        fault = next(event for event in events if event["event"] == "fault")
        done = [event for event in events if event["event"] in ("recovered", "rewound")][-1]
        found = {"detect": fault["time"] - start}
        found |= {part: done[f"{part}_s"] for part in PARTS if f"{part}_s" in done}
        known = sum(found.values())
        resumed = begun - done["time"]
        return found | {"else": self.seconds - known - resumed, "resume": resumed}

    @property
    def change(self) -> dict[str, Any] | None:
        """What the move came to, and what went over the wire; ours only."""
        told = [line for line in self.run.changes if self.deed["time"] <= line["time"] < self.end]
        same = [line for line in told if line["new"] == told[0]["new"]]
        return {**told[0], "sent": sum(line["sent"] for line in same)} if told else None


# ------------------------------------------------------------------------------------------------------------ reporting


def compared(case: str, size: str, found: Mapping[str, Sequence[Fault]], others_cpu: float) -> Iterator[dict[str, Any]]:
    """The row of a case, and of what it was made of. `found`: side -> its faults."""
    name = f"{size} fp32 {case}"
    taken = {side: Samples(tuple(fault.seconds for fault in faults)) for side, faults in found.items()}
    details = {"target": TARGETS[case]} if case in TARGETS else {}
    details |= {"samples": len(taken["ours"].values), **_each("s", taken), "others cpu": round(others_cpu, 2)}
    peer = (taken["peer"].median, PEER)
    information = case not in TARGETS
    kind = {"unit": "s", "higher_is_better": False, "for_information": information, "details": details}
    yield emit(BENCHMARK, f"{name}: fault to the next step", taken["ours"].median, *peer, **kind)
    lost = {side: statistics.median(fault.lost for fault in faults) for side, faults in found.items()}
    details = {"twins": case != "rewind", "checkpoints every": f"{CASES[case].interval} steps"}
    kind = {"unit": "steps", "for_information": True, "details": details}
    yield emit(BENCHMARK, f"{name}: steps lost", lost["ours"], lost["peer"], PEER, **kind)


def _each(unit: str, taken: Mapping[str, Samples]) -> dict[str, str]:
    return {side: " ".join(f"{value:.2f}" for value in samples.values) + f" {unit}" for side, samples in taken.items()}


def grown(size: str, found: Mapping[str, Sequence[Fault]]) -> dict[str, Any]:
    """The row of a node that came."""
    taken = {side: Samples(tuple(fault.stall for fault in faults)) for side, faults in found.items()}
    details = {"target": "below 2", **_each("steps", taken)}
    for side_, faults in found.items():
        seconds = statistics.median(fault.seconds for fault in faults)
        details[f"node added to the first step with it, {side_}"] = f"{seconds:.1f} s"
    peer = (taken["peer"].median, PEER)
    kind = {"unit": "normal steps", "for_information": True, "details": details}
    return emit(BENCHMARK, f"{size} fp32 grow: stall", taken["ours"].median, *peer, **kind)


def broken_down(case: str, size: str, faults: Sequence[Fault], floors: Mapping[str, float]) -> Iterator[dict[str, Any]]:
    """A row for each part of our recoveries, beside its floor."""
    parts = [fault.parts for fault in faults]
    moved = [fault.change for fault in faults if fault.change]
    floors = dict(floors)
    if moved:
        floors["move"] = max((line["bytes_moved"] + line["bytes_local"]) / floors["copy rate"] / 2 for line in moved)
    for part in (*PARTS, "else", "resume"):
        if not any(found.get(part) for found in parts):
            continue
        values = Samples(tuple(found.get(part, 0.0) for found in parts))
        details = {"samples": len(parts), "spread": round(values.spread, 2)}
        details |= {"floor": f"{floors[part]:.4f} s"} if part in floors else {}
        yield emit(BENCHMARK, f"{size} fp32 {case}: of which {part}", values.median, unit="s", details=details)


def bytes_moved(case: str, config: Any, size: str, faults: Sequence[Fault]) -> dict[str, Any] | None:
    """A row of what moved, against what places lacked."""
    from _elastic.floors import bytes_to_move

    changes = [fault.change for fault in faults if fault.change]
    if not changes:
        return None
    least = [bytes_to_move(config, change) for change in changes]
    equal = all(change["bytes_moved"] == floor for change, floor in zip(changes, least, strict=True))
    wire = statistics.median(change["sent"] for change in changes)
    details = {"minimum": significant(statistics.median(least) / 1e6), "equal in all": equal}
    details |= {"on the wire": significant(wire / 1e6), "samples": len(changes)}
    moved = statistics.median(change["bytes_moved"] for change in changes) / 1e6
    return emit(BENCHMARK, f"{size} fp32 {case}: bytes moved", moved, unit="MB", details=details)


def twins(drill: Drill, size: str, rounds: int) -> dict[str, Any]:
    """The row of what twins cost."""
    found = json.loads(side("twins", drill.text(), rounds).splitlines()[-1])
    with_, without = (Samples(tuple(found[name])) for name in ("with", "without"))
    details = {"target": 0.98, "rounds": rounds, "spread": round(with_.spread, 3), "twins that differ": found["differ"]}
    kind = {"unit": "s", "higher_is_better": False, "details": details}
    return emit(BENCHMARK, f"{size} fp32 dp4: step with twins", with_.median, without.median, "without twins", **kind)


def goodput(size: str, drill: Drill, keep: Keep) -> tuple[list[dict[str, Any]], str]:
    """Rows, and the table."""
    spare = replace(drill, nodes=5, spares=1, interval=100)
    outcomes = {
        "ours, a spare": drilled("ours", spare, keep("goodput-spare")),
        "ours, cold starts": drilled("ours", replace(drill, interval=100), keep("goodput-cold")),
        PEER: drilled("peer", drill, keep("goodput-peer")),
    }
    table = [
        "| one fault a minute | minutes | faults | steps that count | normal step | goodput |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    shares = {}
    for name, run in outcomes.items():
        first, end = run.deeds[0]["time"] - 60, run.deeds[-1]["time"]
        count = len({line["step"] for line in run.steps if first <= line["start"] and line["end"] <= end})
        normal, faults = run.normal(run.deeds[0]["time"]), len(run.deeds) - 1
        shares[name] = count * normal / (end - first)
        numbers = f"{(end - first) / 60:.1f} | {faults} | {count} | {normal:.3f} s | {100 * shares[name]:.1f} %"
        table.append(f"| {name} | {numbers} |")
    kind = {"unit": "share", "for_information": True, "details": {"target": "above 0.9", "minutes": drill.minutes}}
    rows = [
        emit(BENCHMARK, f"{size} fp32 goodput, {name.partition(', ')[2]}", share, shares[PEER], PEER, **kind)
        for name, share in shares.items()
        if name != PEER
    ]
    return rows, "\n".join(table)


# ----------------------------------------------------------------------------------------------------------- measuring


def measured(
    cases: Sequence[str], repeats: int, toy: bool, quick: bool, keep: Keep
) -> dict[str, dict[str, list[Fault]]]:
    """Case -> side -> its faults. Sides take turns."""
    found: dict[str, dict[str, list[Fault]]] = {case: {name: [] for name in SIDES} for case in cases}
    for repeat in range(repeats):
        for case in cases:
            for name in SIDES[:: -1 if repeat % 2 else 1]:
                drill = replace(CASES[case], toy=toy)
                if quick and case != "shrink":
                    drill = replace(drill, deeds=drill.deeds[:1])
                found[case][name] += drilled(name, drill, keep(f"{case}-{repeat}-{name}")).faults()
    return found


def floors_of(toy: bool) -> dict[str, float]:
    """Part -> seconds at best, and the rate of copies."""
    from _elastic.floors import copy_rate, detect, process, rendezvous

    return {"detect": detect(), "newcomers": process(), "rendezvous": rendezvous(4), "copy rate": copy_rate()}


def rows_of(case: str, size: str, found: Mapping[str, Sequence[Fault]], floors: Mapping[str, float], others_cpu: float):
    """All rows of a case."""
    from _elastic.ours import config

    faults = {name: [f for f in of if f.deed["deed"] != "add node"] for name, of in found.items()}
    yield from compared(case, size, faults, others_cpu)
    yield from broken_down(case, size, faults["ours"], floors)
    told = config("", replace(CASES[case], toy=size == "toy"))
    if row := bytes_moved(case, told, size, faults["ours"]):
        yield row
    if case == "shrink":
        came = {name: [f for f in of if f.deed["deed"] == "add node"] for name, of in found.items()}
        yield grown(size, came)
        if row := bytes_moved("grow", told, size, came["ours"]):
            yield row


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], case="", repeats=3, goodput=20.0, size="25M", keep="")
    toy, quick = arguments.size == "toy", arguments.quick
    cases = [case for case in (QUICK if quick and not arguments.case else CASES) if arguments.case in case]
    floors = floors_of(toy)
    folder = Path(arguments.keep).absolute() if arguments.keep else None
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)

    def keep(name: str) -> Path | None:
        return folder and folder / f"{name}.json"

    found = measured(cases, 1 if quick else arguments.repeats, toy, quick, keep)
    rows = [row for case in cases for row in rows_of(case, arguments.size, found[case], floors, arguments.others_cpu)]
    notes = ""
    if arguments.case in "twins":
        rows.append(twins(Drill(toy=toy), arguments.size, 3 if quick else 20))
    if arguments.goodput and not quick and arguments.case in "goodput":
        more, notes = goodput(arguments.size, Drill(minutes=arguments.goodput, toy=toy), keep)
        rows += more
    if arguments.output or not (quick or arguments.case):
        write_results(arguments.output or HERE / "results" / f"{BENCHMARK}.md", rows, notes=notes)


if __name__ == "__main__":
    main()
