"""What every driver of a run needs besides actors: its folder, its metrics, and a way to be asked to stop."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from raytron.actors.failures import WorkerError
from raytron.checkpoint import Storage
from raytron.config import RunConfig, to_dict
from raytron.metrics import JsonlSink, MlflowSink, ProgressSink, PrometheusSink, TensorBoardSink, WandbSink

__all__ = ["Failures", "RunFolder", "attempts", "first_line", "stop_requests", "versions", "write_json"]

T = TypeVar("T")

# Kinds of failures of a rank that say what the user can do, and are no reason to start it again.
USER_ERRORS = ("ValueError", "DamagedFile", "CoverageError", "TrainingStopped")


class RunFolder:
    """Where a run's output goes: storage_path/name. A remote run keeps its small files here and copies them over.

    Attributes:
        path: the local folder. storage: the run's, local or remote. checkpoints: folder or URI of its checkpoints.
    """

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.storage = Storage.open(run.storage_path) / run.name
        remote = "://" in run.storage_path
        self.path = (Path("runs") if remote else Path(run.storage_path)).absolute() / run.name
        self.checkpoints = str(self.storage / "checkpoints")

    def refuse_overwriting(self, resume: bool) -> None:
        """ValueError where the run has checkpoints and is not to continue from them."""
        if not resume and (self.storage / "checkpoints").folders():
            raise ValueError(
                f"run {self.run.name!r} already has checkpoints in {self.checkpoints} and resume is off; leave "
                "resume on to continue it, choose another run.name, or remove them"
            )

    def describe(self, config: Any) -> None:
        """Write the resolved configuration, and what the run is made with."""
        self.write_json("config.json", to_dict(config))
        self.write_json("versions.json", versions())

    def write_json(self, name: str, value: Any) -> None:
        """See the function of that name."""
        write_json(self.path / name, value)

    def sinks(self, config: Any, console: Console, step: int) -> list[Any]:
        """Where records go, as `config.logging` says; files continue where a run resumed at `step` does."""
        options, resume_step, name = config.logging, step or None, self.run.name
        sinks: list[Any] = [JsonlSink(self.path / "metrics.jsonl", resume_step=resume_step)]
        sinks.append(ProgressSink(config.steps, console=console))
        if options.tensorboard:
            sinks.append(TensorBoardSink(self.path / "tensorboard", resume_step=resume_step))
        if options.prometheus:
            sinks.append(PrometheusSink(self.path / "metrics.prom", run=name))
        named = {"run": name, "config": to_dict(config)}
        if options.wandb_project:
            sinks.append(WandbSink(options.wandb_project, directory=self.path / "wandb", **named))
        if options.mlflow_experiment:
            sinks.append(MlflowSink(options.mlflow_experiment, **named))
        return sinks

    def upload(self) -> None:
        """Copy a remote run's small files to its storage; checkpoints are there already."""
        if self.storage.renames is not False:
            return
        for file in sorted(self.path.rglob("*")):
            part = file.relative_to(self.path)
            if file.is_file() and part.parts[0] not in ("data", "checkpoints"):
                self.storage.write(part.as_posix(), file.read_bytes())


class Failures:
    """How often a run has failed, over all its attempts; `allowed` (-1: any number) of them it survives.

    count: those counted before. tell: called with each that is counted as (its number, `allowed`, what it was).
    """

    def __init__(
        self, allowed: int, count: int = 0, tell: Callable[[int, int, str], None] = lambda *failure: None
    ) -> None:
        self.allowed, self.count, self._tell = allowed, count, tell
        self._last: BaseException | None = None

    def survives(self, failure: BaseException) -> bool:
        """Count it, once, and say whether it is survived."""
        if failure is not self._last:
            self.count, self._last = self.count + 1, failure
            self._tell(self.count, self.allowed, first_line(failure))
        return self.allowed < 0 or self.count <= self.allowed


def first_line(error: BaseException) -> str:
    """What it says, as far as it fits a line."""
    return textwrap.shorten(str(error).partition("\n")[0], 160, placeholder=" ...")


def attempts(
    attempt: Callable[[bool], T],
    run: RunConfig,
    resume: bool,
    stop: threading.Event,
    say: Callable[[str], None],
    failures: Failures | None = None,
) -> T:
    """What `attempt(resume)` returns, tried again from the newest checkpoint after every failure that `run` allows.

    Args:
        resume: whether the first attempt continues from a checkpoint; all others do.
        stop: once it is set, a failure is the last.
        say: takes a line for the user.
        failures: where they are counted, if not all of them end an attempt.

    Raises:
        ValueError: a rank failed over something that the user has to mend.
        WorkerError: ranks failed more often than `run.failure_config.max_failures`.
    """
    failures = failures or Failures(run.failure_config.max_failures)
    again = False
    while True:
        try:
            return attempt(resume or again)
        except WorkerError as error:
            if error.failure.kind in USER_ERRORS:  # it would fail again
                raise ValueError(error.failure.message) from error
            if not failures.survives(error) or stop.is_set():
                raise
            again = True
            say(f"{error}\nfailure {failures.count} of {failures.allowed}: starting the actors again")


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C or SIGTERM sets; a second Ctrl-C raises KeyboardInterrupt as usual."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, frame: Any) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.set()
        print(f"\n{signal.Signals(number).name}: finishing the step, saving, then leaving", flush=True)

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file; readers see the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    temporary.replace(path)


def versions() -> dict[str, str | None]:
    """What the run was made with."""
    packages = ("raytron", "torch", "ray", "transformers", "tokenizers", "safetensors", "numpy")
    found = {"python": platform.python_version(), "platform": platform.platform(), "commit": _commit()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _commit() -> str | None:
    """The commit of the working directory, "+" behind it where files differ from it; None outside git."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True)
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
