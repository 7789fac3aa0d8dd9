"""What every benchmark script shares: a quiet machine, interleaved measurements, one JSON line a case, a results page.

A number is only worth as much as the run it comes from, so each script measures itself and its peer in the same run,
in turns (`interleave`), on a machine nobody else is using (`wait_until_quiet`), and says what machine it was. Rejected:
a load average as the measure of quiet (it counts this process and remembers the last minute) and best-of-N (it rewards
the case with the noisier clock).

A script in this folder is `import _common`, one `parse`, some `emit` and, on a full run, one `write_results`.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

BUSY = 75  # exit status of a refusal: EX_TEMPFAIL, "try again later"
ROOT = Path(__file__).resolve().parents[1]


# ------------------------------------------------------------------------------------------------------------- running


def parse(description: str, argv: Sequence[str] | None = None, **extra: Any) -> argparse.Namespace:
    """Arguments common to all scripts, then waits for a quiet machine.

    Args:
        description: one line for `--help`.
        argv: the command line; that of the process by default.
        extra: further options by name, `layers=4` adding `--layers 4` of the default's type.

    Returns:
        A namespace with `quick`, `force`, `output` (a path, or None), `others_cpu` and the further options.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="fewer cases and rounds: at most 3 minutes")
    parser.add_argument("--force", action="store_true", help="measure though others are using the machine")
    parser.add_argument("--output", type=Path, default=None, help="also write the results page here")
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = parser.parse_args(argv)
    arguments.others_cpu = wait_until_quiet(force=arguments.force)
    return arguments


def wait_until_quiet(
    *,
    force: bool = False,
    limit: float = 0.15,
    patience_s: float = 60.0,
    measure: Callable[[], float] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Waits until others use less than `limit` of the machine, as a fraction of its cores.

    Args:
        force: measure once, say so if others are busy, and go on.
        patience_s: after so many seconds of waiting the process exits with status 75.
        measure: gives the cores in use by others; `others_cpu` over 3 s by default; `clock` gives seconds.

    Returns:
        Cores in use by others when it was decided to go on; NaN on a system that does not tell.
    """
    measure = measure or others_cpu
    allowed = limit * (os.cpu_count() or 1)
    deadline = clock() + patience_s
    while (used := measure()) > allowed:
        busy = f"others use {used:.2f} cores of this machine ({allowed:.2f} is quiet enough)"
        if force:
            print(f"{busy}; measuring nevertheless, as asked", file=sys.stderr)
            break
        if clock() >= deadline:
            print(f"{busy} for over {patience_s:.0f} s; come back later or say --force", file=sys.stderr)
            raise SystemExit(BUSY)
        print(f"{busy}; waiting", file=sys.stderr)
    return used


def others_cpu(seconds: float = 3.0) -> float:
    """Cores used over `seconds` by everything but this process and its descendants; NaN where there is no /proc."""
    if not Path("/proc/stat").exists():
        return float("nan")
    busy, own = busy_ticks(Path("/proc/stat").read_text()), _own_ticks()
    start = time.monotonic()
    time.sleep(seconds)
    busy, own = busy_ticks(Path("/proc/stat").read_text()) - busy, _own_ticks() - own
    return max(0.0, busy - own) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - start)


def busy_ticks(proc_stat: str) -> int:
    """Clock ticks all cores were not idle, from the text of /proc/stat; time stolen by a hypervisor counts as busy."""
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, proc_stat.splitlines()[0].split()[1:9])
    return user + nice + system + irq + softirq + steal


def _own_ticks() -> int:
    processes = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            processes[int(path.parent.name)] = path.read_text()
        except OSError:  # it ended between the listing and the reading
            continue
    return tree_ticks(processes, os.getpid())


def tree_ticks(processes: Mapping[int, str], root: int) -> int:
    """Clock ticks used by `root` and all below it, reaped children included, from the texts of /proc/*/stat."""
    # The name, field 2, may hold spaces and brackets: the fields proper begin after its last ")".
    values = {pid: text.rpartition(")")[2].split() for pid, text in processes.items()}
    children: dict[int, list[int]] = {}
    for pid, value in values.items():
        children.setdefault(int(value[1]), []).append(pid)
    total, pending = 0, [root]
    while pending:
        pid = pending.pop()
        pending += children.get(pid, [])
        total += sum(map(int, values[pid][11:15]))  # utime, stime, and the same of reaped children
    return total


# ----------------------------------------------------------------------------------------------------------- measuring


@dataclass(frozen=True)
class Samples:
    """The measurements of one case, in the order taken."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles over the median: how far to trust a ratio of two medians."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2 / self.median if self.median else 0.0


def seconds(action: Callable[[], object], repeat: int = 1) -> Callable[[], float]:
    """A measurement of `action`: seconds a call, over `repeat` calls."""

    def measure() -> float:
        start = time.perf_counter()
        for _ in range(repeat):
            action()
        return (time.perf_counter() - start) / repeat

    return measure


def interleave(cases: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Samples]:
    """Measures all cases in turns, every other round backwards, so that a machine that drifts drifts for all alike.

    Args:
        cases: name to a measurement, a callable that returns its own number (see `seconds`); warm each up before.
        rounds: measurements a case.
    """
    taken: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds):
        for name in list(cases)[:: -1 if round_ % 2 else 1]:
            taken[name].append(cases[name]())
    return {name: Samples(tuple(values)) for name, values in taken.items()}


# ----------------------------------------------------------------------------------------------------------- reporting


def emit(
    benchmark: str,
    case: str,
    ours: float,
    peer: float | None = None,
    peer_name: str | None = None,
    *,
    unit: str,
    higher_is_better: bool = True,
    for_information: bool = False,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Prints one case as one JSON line and returns it.

    Args:
        ours, peer: in `unit`; `peer` was measured in the same run and `peer_name` says what it is.
        higher_is_better: False for times and sizes, whose ratio is turned round: above 1 always means ours is better.
        for_information: the case has no target: the row carries no ratio even though it has a peer.
        details: anything that helps to believe the number: spread, rounds, shapes, cores in use by others.

    Returns:
        The row, as `write_results` takes it.
    """
    row: dict[str, Any] = {"benchmark": benchmark, "case": case, "ours": significant(ours)}
    if peer is not None:
        assert peer_name, f"{benchmark} {case} is compared with something that has no name"
        row |= {"peer": significant(peer), "peer_name": peer_name}
        if not for_information:
            row["ratio"] = significant(ours / peer if higher_is_better else peer / ours)
    row |= {"unit": unit, "details": dict(details or {})}
    print(json.dumps(row), flush=True)
    return row


def significant(value: float, digits: int = 5) -> float:
    """Rounded to as many digits as a measurement can mean."""
    return float(f"{value:.{digits}g}")


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    return {
        "CPU": cpu_model(_text("/proc/cpuinfo")) or platform.processor() or platform.machine(),
        "cores": str(os.cpu_count()),
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        **({"GPU": gpu} if (gpu := _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")) else {}),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in ("torch", "ray", "transformers")),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def cpu_model(cpuinfo: str) -> str:
    """The processor's name from the text of /proc/cpuinfo, or ""."""
    names = (line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name"))
    return next(names, "")


def commit() -> str:
    """The commit checked out, marked where files differ from it."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return (head or "unknown") + (" with changes" if changed else "")


def write_results(
    path: str | Path, rows: Iterable[Mapping[str, Any]], *, notes: str = "", command: str | None = None
) -> None:
    """Writes the results page: how it was measured, on what, when, at which commit, and a table of all rows.

    Args:
        path: usually `benchmarks/results/NAME.md`; replaced atomically.
        rows: what `emit` returned.
        notes: Markdown put below the table.
        command: what was run; the process's own command line by default.
    """
    path = Path(path)
    command = command or shlex.join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    facts = {"command": f"`{command}`", "commit": commit(), **machine()}
    page = results_page(path.stem, facts, list(rows), notes)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(page)
    os.replace(partial, path)


def results_page(title: str, facts: Mapping[str, str], rows: Sequence[Mapping[str, Any]], notes: str = "") -> str:
    """The Markdown of a results page; a pure function of what it shows."""
    lines = [f"# {title}", "", *(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += ["| case | ours | peer | | unit | ratio | details |", "|---|--:|--:|---|---|--:|---|"]
    for row in rows:
        details = ", ".join(f"{name} {_cell(value)}" for name, value in row.get("details", {}).items())
        names = ("case", "ours", "peer", "peer_name", "unit", "ratio")
        lines.append("| " + " | ".join([*(_cell(row.get(name, "")) for name in names), details]) + " |")
    lines += ["", "A ratio above 1 means raytron is better; rows without one have no target."]
    return "\n".join([*lines, *(["", notes.strip()] if notes else [])]) + "\n"


def _cell(value: object) -> str:
    shown = f"{value:,.4g}" if isinstance(value, float) and abs(value) < 1000 else value
    shown = f"{value:,.0f}" if isinstance(value, float) and abs(value) >= 1000 else shown
    return str(shown).replace("|", r"\|")


def _text(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
