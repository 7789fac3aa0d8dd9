"""Pretraining runs that are hurt at random, and have the losses of a run that nobody disturbed, step for step.

Each seed draws thirty deeds: ranks that are killed or stopped and nodes that are taken away, each at a phase of its own
(forward, backward, all-reduce, vote, optimizer, gather, evaluation, save), drivers that are killed and started again,
nodes that are told to leave or come, and wishes for another size or shape. Some come while the one before is still
being dealt with: also where ranks are about to move what they hold, and while the bytes are on their way. Then every
step's loss, and every evaluation's, must be that of the quiet run; each step must have been done once, in order, on its
own samples; and no process of the run may be left over.

    python benchmarks/elastic_faults.py [--quick] [--seeds 20] [--first 0] [--faults 30] [--precision fp64]
                                        [--keep FOLDER]       (of runs; else they are removed)

In fp64 losses may differ by 1e-9 of their size. fp32 (lr 1e-3) is compared over 50 steps, to 1e-5; what the seed has
drawn is left undone from there on. Beside it stands what the same run makes of being split otherwise, without any
fault. Needs no quiet machine: nothing here is a time. The row's number is the share of seeds in which all of it held; a
seed in which it did not is told with its deeds.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from _common import emit, parse, write_results
from _drill import BATCH, MOVE_PHASES, STEP_PHASES, Deed, Drill, Driven, Site

from raytron.actors.journal import read_journal
from raytron.metrics import EvalRecord, StepRecord, read_records

BENCHMARK = "elastic_faults"
SHARES = {
    "kill": 8,
    "stop": 3,
    "remove node": 4,
    "drain": 2,
    "add node": 5,
    "resize": 3,
    "reshape": 4,
    "kill driver": 1,
}
HASTY = 0.3  # of the deeds do not wait until the one before is dealt with
MOVES = ("kill", "stop", "remove node", "resize", "reshape")  # deeds that a move follows


@dataclass(frozen=True)
class Way:
    """A precision, and what it is held to: relative tolerance, over so many steps."""

    precision: str
    lr: float
    tolerance: float
    pace_s: float
    steps: int | None = None
    most_after: int = 12

    @property
    def options(self) -> dict[str, Any]:
        """Of `_drill.config`."""
        return {"precision": self.precision, "lr": self.lr}


WAYS = {
    "fp64": Way("fp64", 3e-4, 1e-9, 0.1),
    "fp32": Way("fp32", 1e-3, 1e-5, 2.0, steps=50, most_after=1),
}


@dataclass
class Found:
    """What became of a seed; `wrong` says what did not hold."""

    seed: int
    deeds: list[Deed]
    wrong: str | None = None
    steps: int = 0
    worst: float = 0.0
    done: Counter = field(default_factory=Counter)
    events: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Curve:
    """Losses by step: of steps and of evaluations."""

    train: Mapping[int, float]
    held_out: Mapping[int, float]

    @classmethod
    def of(cls, folder: Path) -> Curve:
        """The curve of the run in that folder."""
        records = read_records(folder / "metrics.jsonl")
        train = {r.step: r.loss for r in records if isinstance(r, StepRecord)}
        return cls(train, {r.step: r.loss for r in records if isinstance(r, EvalRecord)})


def draw(seed: int, count: int, most_after: int = 12) -> list[Deed]:
    """A seed's deeds."""
    chance, deeds = random.Random(seed), []
    for number in range(count):
        what = chance.choices(list(SHARES), list(SHARES.values()))[0]
        hasty = number > 0 and chance.random() < HASTY
        # While the one before is dealt with, everyone moves; by chance also where no step is under way.
        moving = hasty and deeds[-1].what in MOVES
        phases = [*STEP_PHASES, *["evaluation", "save"] * 2, *(MOVE_PHASES * 5 if moving else [])]
        hurts = what in ("kill", "stop", "remove node", "kill driver")
        after = chance.randint(1, most_after)
        deeds.append(Deed(what, chance.choice(phases) if hurts else "", chance.random(), after, hasty))
    return deeds


def compare(hurt: Curve, quiet: Curve, tolerance: float, steps: int | None = None) -> tuple[float, str | None]:
    """The largest relative difference over the first `steps` (all), and where the tolerance is exceeded first."""
    worst, wrong = 0.0, None
    for name in ("train", "held_out"):
        ours, theirs = getattr(hurt, name), getattr(quiet, name)
        for step in sorted(step for step in ours if steps is None or step <= steps):
            off = abs(ours[step] - theirs[step]) / abs(theirs[step]) if step in theirs else inf
            worst = max(worst, off)
            if not off <= tolerance and wrong is None:
                wrong = f"{name} step {step}: {ours[step]!r} instead of {theirs.get(step)!r}, off by {off:.2g}"
    return worst, wrong


def ledger(folder: Path) -> str | None:
    """What is wrong with the steps a run reported; None if each was done once, in order, on its own samples."""
    records = [record for record in read_records(folder / "metrics.jsonl") if isinstance(record, StepRecord)]
    for at, record in enumerate(records, 1):
        if record.step != at or record.consumed_samples != BATCH * at:
            return f"record {at} is of step {record.step}, after {record.consumed_samples} samples"
    return None


class Quiet:
    """The run nobody disturbs, as long as the longest so far; and as it is when it is split otherwise."""

    def __init__(self, folder: Path, way: Way) -> None:
        self._folder, self._way, self._runs = folder, way, 0
        self.curve = Curve({}, {})

    def upto(self, step: int) -> Curve:
        """Its curve, at least that long."""
        if max(self.curve.train, default=0) < step:
            self.curve = self._of(step + step // 4)
        return self.curve

    def sensitivity(self, step: int) -> dict[str, float]:
        """The largest relative difference that another splitting makes within so many steps."""
        usual = self.upto(step)
        others = {"dp 2": {"num_workers": [2, 2]}, "tp 2": {"tp": 2}}
        return {name: compare(self._of(step, **how), usual, inf, step)[0] for name, how in others.items()}

    def _of(self, step: int, **how: Any) -> Curve:
        self._runs += 1
        name = f"quiet-{self._runs}"
        with Site() as site:
            driven = Driven(site, self._folder, name, {**self._way.options, **how})
            try:
                Drill(site, driven, 0.0).run([], step)
            finally:
                driven.end()
        return Curve.of(self._folder / name)


def hurt(folder: Path, seed: int, count: int, way: Way, quiet: Quiet) -> Found:
    """One seed."""
    found, name = Found(seed, draw(seed, count, way.most_after)), f"{way.precision}-{seed}"
    with Site() as site:
        driven = Driven(site, folder, name, {**way.options, "pace_s": way.pace_s})
        drill = Drill(site, driven, patience_s=20.0)
        try:
            drill.run(found.deeds, way.steps or 0, way.steps or inf)
            if left := drill.left_over():
                found.wrong = f"processes {left} are left over"
        except RuntimeError as error:
            found.wrong = str(error)
        finally:
            driven.end()
    found.done = drill.done
    found.events = Counter(event["event"] for event in read_journal(folder / name / "journal.jsonl"))
    if found.wrong is None:
        check(found, folder / name, way, quiet)
    return found


def check(found: Found, folder: Path, way: Way, quiet: Quiet) -> None:
    """Hold what a run left against the quiet one."""
    curve = Curve.of(folder)
    found.steps = max(curve.train)
    found.worst, found.wrong = compare(curve, quiet.upto(found.steps), way.tolerance, way.steps)
    found.wrong = ledger(folder) or found.wrong


def rows(way: Way, count: int, seeds: Sequence[Found], sensitivity: Mapping[str, float]) -> list[dict[str, Any]]:
    """All seeds, and those whose driver was killed."""
    killed = [found for found in seeds if any(what.startswith("kill driver") for what in found.done)]
    cases = [("all", seeds), ("driver killed too", killed)]
    return [
        emit(
            BENCHMARK,
            f"{way.precision} {count} faults: {case}",
            sum(found.wrong is None for found in some) / len(some),
            unit="share of seeds",
            details={
                "seeds": len(some),
                "target": 1.0,
                "faults": sum(sum(found.done.values()) for found in some),
                "longest run": f"{max(found.steps for found in some)} steps",
                "largest difference": f"{max(found.worst for found in some):.2g}",
                "by splitting alone": " / ".join(f"{name} {off:.2g}" for name, off in sensitivity.items()),
                "done": _counts(sum((found.done for found in some), Counter())),
                "journal": _counts(sum((found.events for found in some), Counter())),
            },
        )
        for case, some in cases
        if some
    ]


def _counts(counter: Counter) -> str:
    return "; ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def main() -> None:
    arguments = parse(
        __doc__.splitlines()[0], ["--force", *sys.argv[1:]], seeds=20, faults=30, first=0, precision="fp64", keep=""
    )
    way = WAYS[arguments.precision]
    count, seeds = (min(5, arguments.faults), 1) if arguments.quick else (arguments.faults, arguments.seeds)
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as root:
        folder, found = Path(arguments.keep or root).absolute(), []
        folder.mkdir(parents=True, exist_ok=True)
        quiet = Quiet(folder, way)
        for seed in range(arguments.first, arguments.first + seeds):
            found.append(hurt(folder, seed, count, way, quiet))
            told = {**asdict(found[-1]), "done": _counts(found[-1].done), "events": _counts(found[-1].events)}
            print(json.dumps(told), file=sys.stderr, flush=True)
        longest = 0 if arguments.quick else max(min(one.steps, way.steps or one.steps) for one in found)
        results = rows(way, count, found, quiet.sensitivity(longest) if longest else {})
    if arguments.output or not arguments.quick:
        page = f"{BENCHMARK}_{way.precision}.md"
        write_results(arguments.output or Path(__file__).parent / "results" / page, results)
    if wrong := [one for one in found if one.wrong]:
        sys.exit("\n".join(f"seed {one.seed}: {one.wrong}" for one in wrong))


if __name__ == "__main__":
    main()
