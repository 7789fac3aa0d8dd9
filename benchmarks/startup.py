"""From the command to the first training step of `recipes/quickstart.py`, and where the time goes.

The recipe itself runs, unchanged, in a folder of its own; the functions that begin and end a phase are wrapped to note
the time, and after the first step the run is asked to stop as Ctrl-C would. The first run finds nothing and makes
corpus, tokenizer and tokens ("cold"); those after it find them ("cached"), which is what a user waits for again and
again. Rejected: timestamps in the driver, which every user would carry for the sake of one benchmark.

Floor, in seconds on two quiet cores: importing torch 2.1 and ray 0.6 in the driver, ray.init 2.4, one actor with torch
1.0 (four share two cores: 2 to 3), groups over gloo 0.05, one step 0.1; 8 to 9 in all. No bytes or FLOPs to speak of:
3M weights, and a corpus of some 10 MB, written by the recipe and read once to see that it is still the same.

All rows are for information: nobody else's quickstart does the same.

    python benchmarks/startup.py [--quick] [--size toy]
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from _common import ROOT, Samples, emit, parse, seconds, write_results

BENCHMARK = "startup"
RECIPE = ROOT / "recipes" / "quickstart.py"
STARTED, PHASES = "RAYTRON_STARTUP_BEGAN", "RAYTRON_STARTUP_PHASES"  # environment of the run that is watched


# --------------------------------------------------------------------------------------- inside the run that is watched


class Watch:
    """Seconds by phase, and the moment of the first step."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.first_step = 0.0

    def add(self, phase: str, since: float) -> None:
        self.phases[phase] = self.phases.get(phase, 0.0) + time.time() - since

    def wrap(self, owner: Any, name: str, phase: str) -> None:
        """Count the time in `owner.name` as `phase`."""
        real: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(real)
        def timed(*args: Any, **kwargs: Any) -> Any:
            since = time.time()
            try:
                return real(*args, **kwargs)
            finally:
                self.add(phase, since)

        setattr(owner, name, timed)

    def wrap_steps(self, group: type) -> None:
        """Note the first step's end, and ask the run to stop."""
        real = group.steps

        def steps(*args: Any, **kwargs: Any) -> Iterator[Any]:
            since = time.time()
            for record in real(*args, **kwargs):
                if not self.first_step:
                    self.first_step = time.time()
                    self.add("first step", since)
                    os.kill(os.getpid(), signal.SIGTERM)
                yield record

        group.steps = steps


def watched(argv: Sequence[str]) -> None:
    """Run the recipe with its phases timed; what they took goes to the file named in the environment."""
    watch, began = Watch(), float(os.environ[STARTED])
    watch.add("python", began)
    since = time.time()
    import raytron.config
    import raytron.data
    import raytron.inference
    import raytron.models
    from raytron import pretrain
    from raytron.actors import group

    watch.add("imports", since)
    watch.wrap(raytron.config, "cli", "command line")
    watch.wrap(raytron.data, "write_stdlib_corpus", "data")
    watch.wrap(pretrain, "prepare", "data")
    watch.wrap(pretrain.Session, "__init__", "ray.init")
    watch.wrap(group, "place", "placement")
    watch.wrap(pretrain.TrainerGroup, "_hire", "actors")
    watch.wrap(pretrain.TrainerGroup, "_connect", "connect")
    watch.wrap(pretrain.TrainerGroup, "create", "engines")
    watch.wrap_steps(pretrain.TrainerGroup)
    sys.argv = [str(RECIPE), *argv]
    runpy.run_path(str(RECIPE), run_name="__main__")
    total = watch.first_step - began
    rest = total - sum(watch.phases.values())
    Path(os.environ[PHASES]).write_text(json.dumps({"total": total, **watch.phases, "rest": rest}))


# ----------------------------------------------------------------------------------------------------------- measuring


def run_once(folder: Path, name: str) -> dict[str, float]:
    """Seconds by phase of one run in `folder`, whose cached data it shares with those before."""
    phases = folder / f"{name}.json"
    environment = {**os.environ, "RAYTRON_CACHE": str(folder / "cache"), PHASES: str(phases)}
    command = [sys.executable, __file__, "--run.name", name]
    with (folder / f"{name}.log").open("w") as log:
        done = subprocess.run(
            command, cwd=folder, env={**environment, STARTED: str(time.time())}, stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode or not phases.is_file():
        text = (folder / f"{name}.log").read_text()
        raise RuntimeError(f"the recipe ended with status {done.returncode}:\n{text[-3000:]}")
    return json.loads(phases.read_text())


def help_seconds() -> float:
    """Seconds until the recipe's `--help` is printed."""
    command = [sys.executable, str(RECIPE), "--help"]
    return seconds(lambda: subprocess.run(command, check=True, capture_output=True))()


def rows_of(case: str, runs: Sequence[dict[str, float]]) -> Iterator[dict[str, Any]]:
    """The total, then its parts, medians over the runs."""
    for phase in runs[0]:
        found = Samples(tuple(run[phase] for run in runs))
        what = "command to first step" if phase == "total" else f"of which {phase}"
        details = {"runs": len(runs), "spread": f"{found.spread:.1%}"}
        yield emit(BENCHMARK, f"quickstart fp32, {case}: {what}", found.median, unit="s", details=details)


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse("Command to first step of the quickstart recipe, with its parts.", argv, size="full")
    runs = 1 if arguments.size == "toy" else 3 if arguments.quick else 7
    help_seconds()  # fills the bytecode cache
    helps = Samples(tuple(help_seconds() for _ in range(5)))
    rows = [emit(BENCHMARK, "quickstart --help", helps.median, unit="s", details={"target": "below 0.5"})]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows += rows_of("cold data", [run_once(Path(folder), "cold")])
        rows += rows_of("cached data", [run_once(Path(folder), f"cached-{i}") for i in range(runs)])
    if arguments.output:
        write_results(arguments.output, rows)


if __name__ == "__main__":
    if PHASES in os.environ:
        watched(sys.argv[1:])
    else:
        main()
