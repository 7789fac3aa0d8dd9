"""An RL run whose engines are killed, leave and come back while it goes on: answers a second before, and behind.

GRPO on a tiny Llama, synchronous, two engines of a thread each. Answers never end by themselves, so that all have the
same length whatever is learnt, and an engine takes few at a time: rollouts are most of a step, and it takes two engines
to be as fast as two. Again and again, with a window of whole steps before and behind each:

    killed    SIGKILL to an engine in the middle of a step: another takes its seat
    left      as `raytron scale RUN --engines 1` asks; after half a window with one engine, `--engines 2`

A step lasts from the end of a push to the end of the next, so that nothing is left out. The window behind begins with
the first step that begins with both engines. Then the same run is left alone: what its steps of the same numbers took
tells the machine's drift from ours. The disturbed run must end well, each group recorded once and trained on once.

    python benchmarks/elastic_rl.py [--quick] [--cycles 5] [--window 20]      (quick: one cycle, windows of ten)

The ratio is that of answers a second behind the event and before it, by the median of all windows' steps.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from _common import ROOT, Samples, emit, parse, write_results
from faults import ledger

from raytron.metrics import read_timeline
from raytron.rl.report import TIMELINE
from raytron.rl.tasks import EchoDigit

BENCHMARK = "elastic_rl"
PROMPTS, GROUP, TOKENS = 16, 8, 64
SEQUENCES = 8  # that an engine computes together, a sixteenth of a step's
PATIENCE_S = 180.0  # with a run that does not get on
LOOK_S = 0.05
WARM = 5  # steps that are slower, at the begin

T = TypeVar("T")


@dataclass(frozen=True)
class LongEcho(EchoDigit):
    """Echo-digit with answers that go on to their limit."""

    eos_token_ids = ()

    @property
    def max_tokens(self) -> int:
        """Of every answer."""
        return TOKENS


def drive(folder: str, name: str) -> None:
    """The driver's process."""
    from raytron import rl
    from raytron.config import CheckpointConfig, LoggingConfig, RunConfig, ScheduleConfig
    from recipes.grpo import config

    engine = replace(config.rollout.engine, max_num_seqs=SEQUENCES, threads=1)
    config = replace(
        config,
        rollout=replace(config.rollout, engines=(1, 2), engine=engine, max_restarts=-1),
        prompts=PROMPTS,
        group_size=GROUP,
        steps=100_000,  # until it is told to stop
        schedule=ScheduleConfig(kind="constant"),
        evaluation=replace(config.evaluation, interval=0),
        transcripts=0,
        logging=LoggingConfig(tensorboard=False),
        run=RunConfig(name, folder, checkpoint_config=CheckpointConfig(interval=0)),
    )
    rl.run(config, task=LongEcho(seed=config.seed))


# ------------------------------------------------------------------------------------------------------------- running


class Driven:
    """The run, a process of its own."""

    def __init__(self, storage: str, name: str) -> None:
        self.folder, self._log = Path(storage, name), Path(storage, f"{name}.log")
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
        environment |= {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        program = f"import sys, {BENCHMARK}; {BENCHMARK}.drive(*sys.argv[1:])"
        with self._log.open("wb") as log:
            command = [sys.executable, "-c", program, storage, name]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)

    def step(self) -> int:
        """Steps reported."""
        file = self.folder / "metrics.jsonl"
        return file.read_bytes().count(b'{"kind": "train"') if file.exists() else 0

    def events(self) -> list[dict[str, Any]]:
        """Its journal."""
        from raytron.actors.journal import JOURNAL, read_journal

        return read_journal(self.folder / JOURNAL)

    def until(self, found: Callable[[], T]) -> T:
        """What `found` says once that is true. RuntimeError when the run ends before, or `PATIENCE_S` are over."""
        deadline = time.monotonic() + PATIENCE_S
        while not (what := found()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"it ended, or hangs, at step {self.step()}:\n{self._said()}")
            time.sleep(LOOK_S)
        return what

    def steps(self, count: int) -> None:
        """Wait for so many more, each within `PATIENCE_S`."""
        for step in range(self.step() + 1, self.step() + count + 1):
            self.until(lambda step=step: self.step() >= step)

    def stop(self) -> int:
        """Have it finish its step, save and end; the steps it made. RuntimeError where it ends otherwise."""
        self.process.send_signal(signal.SIGTERM)
        if code := self.process.wait(PATIENCE_S):
            raise RuntimeError(f"it ended with status {code}:\n{self._said()}")
        return self.step()

    def close(self) -> None:
        """Kill it, if it is still there."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()

    def _said(self) -> str:
        return self._log.read_text(errors="replace")[-4000:]


@dataclass(frozen=True)
class Deed:
    """Something done to the run, in seconds since 1970.

    at: when it was done, or asked for. gone: when an engine was missing. back: from when another was wanted. whole:
    when that was ready.
    """

    what: str
    at: float
    gone: float
    back: float
    whole: float


class Hand:
    """Does things to a run, as `raytron scale` and `status` do once they are connected to it."""

    def __init__(self, run: Driven, ask: Callable[[Mapping[str, int]], str], status: Callable[[], Any]) -> None:
        self._run, self._ask, self._status = run, ask, status

    def kill(self, number: int, into_s: float) -> Deed:
        """Kill one of the two engines so many seconds into the next step."""
        victims = self._run.until(self._both)
        heard, pid = len(self._run.events()), victims[number % 2]
        self._run.steps(1)
        time.sleep(into_s)
        at = time.time()
        os.kill(pid, signal.SIGKILL)
        return Deed("killed", at, at, at, self._heard("engine joined", heard))

    def leave(self, steps: int) -> Deed:
        """Do with one engine for so many steps."""
        heard, at = len(self._run.events()), time.time()
        self._ask({"engines": 1})
        gone = self._heard("engine left", heard)
        self._run.steps(steps + 1)  # besides the one that is under way
        back = time.time()
        self._ask({"engines": 2})
        return Deed("left", at, gone, back, self._heard("engine joined", heard))

    def _both(self) -> list[int]:
        """Processes of the engines once both answer."""
        rows = self._status().get("engines", ())
        ready = [row["pid"] for row in rows if row["state"] == "ready"]
        return ready if len(ready) == 2 else []

    def _heard(self, event: str, after: int) -> float:
        """When that was journaled, behind so many other events."""
        times = lambda: [one["time"] for one in self._run.events()[after:] if one["event"] == event]  # noqa: E731
        return self._run.until(times)[0]


def hurt(storage: str, cycles: int, window: int) -> tuple[Story, list[Deed]]:
    """The run that things are done to. RuntimeError if it does not end well, or its books are wrong."""
    from raytron.actors import live

    with closing(Driven(storage, "hurt")) as run:
        deeds = []
        run.until(run.step)
        with live.talking_to(str(run.folder)) as mailbox:
            hand = Hand(run, partial(live.ask, mailbox), partial(live.status, mailbox))
            run.steps(window + WARM)
            for cycle, what in itertools.product(range(cycles), ("killed", "left")):
                usual = median(Story.of(run.folder).last(window))
                killed = what == "killed"
                deeds.append(hand.kill(cycle, usual / 2) if killed else hand.leave(max(1, window // 2)))
                run.steps(window + 2)  # the step under way had not both engines, nor perhaps the next
                print(f"{deeds[-1]}, step {run.step()}", file=sys.stderr, flush=True)
        made = run.stop()
    if wrong := ledger(run.folder, made, PROMPTS, stopped=True) or unasked(run.events(), deeds):
        raise RuntimeError(wrong)
    return Story.of(run.folder), deeds


def unasked(events: Sequence[Mapping[str, Any]], deeds: Sequence[Deed]) -> str | None:
    """What the engines did besides what was done to them: then the windows would not be what they are said to be."""
    counted = Counter(event["event"] for event in events)
    deed = Counter(deed.what for deed in deeds)
    wanted = {"engine failed": deed["killed"], "engine left": deed["left"], "engine joined": len(deeds)}
    found = {event: counted[event] for event in wanted}
    return None if found == wanted else f"of its engines the journal tells {found} instead of {wanted}"


def calm(storage: str, steps: int) -> Story:
    """The run that is left alone for so many steps."""
    with closing(Driven(storage, "calm")) as run:
        run.steps(steps)
        run.stop()
    return Story.of(run.folder)


# ----------------------------------------------------------------------------------------------------------- reporting


@dataclass(frozen=True)
class Story:
    """Of a run: when each of its steps ended, 0 standing for the begin of the first."""

    ends: Mapping[int, float]

    @classmethod
    def of(cls, folder: Path) -> Story:
        """As its timeline tells."""
        spans = read_timeline(folder / TIMELINE)
        return cls({span.args["step"]: span.start + span.seconds for span in spans if span.lane == "push"})

    def seconds(self, steps: range) -> list[float]:
        """Of each step."""
        return [self.ends[step] - self.ends[step - 1] for step in steps]

    def last(self, count: int) -> list[float]:
        """Seconds of the last steps."""
        end = max(self.ends)
        return self.seconds(range(end - count + 1, end + 1))

    def within(self, start: float, end: float) -> range:
        """The steps that began and ended between these times."""
        found = [step for step in self.ends if step and self.ends[step - 1] >= start and self.ends[step] <= end]
        return range(min(found), max(found) + 1) if found else range(0)


@dataclass(frozen=True)
class Fault:
    """A deed done to `run`, and the windows of so many steps around it."""

    run: Story
    deed: Deed
    window: int

    @property
    def before(self) -> range:
        """The last steps that had been made."""
        last = max(step for step, end in self.run.ends.items() if end <= self.deed.at)
        return range(last - self.window + 1, last + 1)

    @property
    def first(self) -> int:
        """The first step that began with both engines again."""
        return 1 + min(step for step, end in self.run.ends.items() if end >= self.deed.whole)

    @property
    def after(self) -> range:
        """Steps with both engines again."""
        return range(self.first, self.first + self.window)

    @property
    def meanwhile(self) -> list[float]:
        """Seconds of the steps between."""
        return self.run.seconds(range(self.before[-1] + 1, self.first))

    @property
    def alone(self) -> list[float]:
        """Seconds of the steps with one engine, and none on its way."""
        return self.run.seconds(self.run.within(self.deed.gone, self.deed.back))

    @property
    def recovered_s(self) -> float:
        """Until the first step with both engines, from when that was wanted."""
        return self.run.ends[self.first - 1] - self.deed.back


def rate(run: Story, windows: Sequence[range]) -> float:
    """Answers a second."""
    return PROMPTS * GROUP / median(seconds for steps in windows for seconds in run.seconds(steps))


def compared(case: str, run: Story, calm: Story, windows: Sequence[tuple[range, range]], more: Mapping[str, Any]):
    """The row of windows before and behind."""
    before, after = zip(*windows, strict=True)
    each = [rate(run, [behind]) / rate(run, [ahead]) for ahead, behind in windows]
    steps = Samples(tuple(seconds for steps in after for seconds in run.seconds(steps)))
    details = {
        "target": 0.95,
        "each": " / ".join(f"{ratio:.3f}" for ratio in each),
        "undisturbed, same steps": f"{rate(calm, after) / rate(calm, before):.3f}",
        "windows": f"{len(windows)} of {len(before[0])} steps",
        "step": f"{steps.median:.3f} s",
        "spread": round(steps.spread, 3),
    }
    rates, unit = (rate(run, after), rate(run, before), "before it"), "answers/s"
    return emit(BENCHMARK, f"echo-digit fp32 {case}", *rates, unit=unit, details=details | more)


def told(faults: Sequence[Fault]) -> dict[str, Any]:
    """What else happened."""
    back = Samples(tuple(fault.recovered_s for fault in faults))
    details = {
        "wanted to the first step with both": f"{back.median:.1f} s (at most {max(back.values):.1f})",
        "of which until it was ready": f"{median(fault.deed.whole - fault.deed.back for fault in faults):.1f} s",
        "steps meanwhile": " / ".join(str(len(fault.meanwhile)) for fault in faults),
        "longest of them": f"{max(seconds for fault in faults for seconds in fault.meanwhile):.2f} s",
    }
    if alone := [seconds for fault in faults for seconds in fault.alone]:
        usual = median(seconds for fault in faults for seconds in fault.run.seconds(fault.before))
        details["one engine answers"] = f"{usual / median(alone):.3f} of two"
        details["asked to gone"] = f"{median(fault.deed.gone - fault.deed.at for fault in faults):.1f} s"
    return details


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], cycles=5, window=20)
    cycles, window = (1, min(10, arguments.window)) if arguments.quick else (arguments.cycles, arguments.window)
    with tempfile.TemporaryDirectory(prefix="rt-", dir="/tmp") as storage:
        run, deeds = hurt(storage, cycles, window)
        quiet = calm(storage, max(run.ends))
    faults, rows = [Fault(run, deed, window) for deed in deeds], []
    for what, case in {"killed": "an engine killed", "left": "an engine left and joined"}.items():
        mine = [fault for fault in faults if fault.deed.what == what]
        rows.append(compared(case, run, quiet, [(fault.before, fault.after) for fault in mine], told(mine)))
    more = {"events": len(faults), "others cpu": round(arguments.others_cpu, 2)}
    rows.append(compared("all of it", run, quiet, [(faults[0].before, faults[-1].after)], more))
    if arguments.output or not arguments.quick:
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()
