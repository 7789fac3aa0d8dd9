"""Where records go: one file per run first of all, and whatever tracker the team already looks at.

Metrics never decide whether training goes on: a sink that raises (disk full, tracker unreachable) is reported once and
dropped. The library of a sink is imported when that sink is made. Rejected: `torch.utils.tensorboard` (needs torch for
what is a protobuf), `prometheus_client` (a process-wide registry), `ray.util.metrics` (needs a cluster, which a
`torchrun` job has not) and MLflow's module-level run (global state).
"""

import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from raytron.metrics.records import Record, parse_lines, to_line, write_atomically

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Where records go."""

    def write(self, record: Record) -> None:
        """Takes one record; may raise, which drops the sink."""

    def close(self) -> None:
        """Makes everything written durable and lets go of files, threads and ports."""


class MetricsWriter:
    """Passes each record to every sink; a sink that raises is reported once and dropped, training goes on."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def write(self, record: Record) -> None:
        """Hands `record` to every sink that is still alive."""
        for sink in tuple(self.sinks):
            if not _attempt(sink, lambda sink=sink: sink.write(record), f"at step {record.step}"):
                self.sinks.remove(sink)

    def close(self) -> None:
        """Closes every sink; safe to call twice."""
        while self.sinks:
            sink = self.sinks.pop(0)
            _attempt(sink, sink.close, "while closing")

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _attempt(sink: Sink, action: Callable[[], None], when: str) -> bool:
    try:
        action()
    except Exception as error:  # whatever a tracker raises, it must not end a training run
        name = type(sink).__name__
        log.error("%s failed %s and is dropped; training goes on. %s: %s", name, when, type(error).__name__, error)
        return False
    return True


class JsonlSink:
    """One JSON object a line, flushed at once; after a resume the file is that of an uninterrupted run.

    Args:
        path: the file; its folder is made.
        resume_step: the committed step that training continues from. Records of later steps, which the resumed run
            writes again, and a line torn by a kill are dropped in one atomic replacement. None starts the file anew.
    """

    def __init__(self, path: str | Path, *, resume_step: int | None = None):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        keep = resume_step is not None and self.path.exists()
        kept = [line for record, line in parse_lines(self.path) if record.step <= resume_step] if keep else []
        write_atomically(self.path, "".join(kept), durable=True)
        self._file = self.path.open("a")

    def write(self, record: Record) -> None:
        """Appends one line and flushes it to the operating system."""
        self._file.write(to_line(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Syncs the file to disk and closes it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


class TensorBoardSink:
    """Scalars as TensorBoard event files in `directory`, written with TensorBoard's own writer.

    With `resume_step`, a session start at the next step tells TensorBoard to forget what an earlier process wrote
    from there on, so a curve has no fold in it.
    """

    def __init__(self, directory: str | Path, *, resume_step: int | None = None):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory), flush_secs=10)
        if resume_step is not None:
            start = SessionLog(status=SessionLog.START)
            self._writer.add_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Queues one event with all scalars of the record; a thread of the writer puts it on disk."""
        values = [self._summary.Value(tag=tag, simple_value=value) for tag, value in record.scalars().items()]
        summary = self._summary(value=values)
        self._writer.add_event(self._event(wall_time=time.time(), step=record.step, summary=summary))

    def close(self) -> None:
        """Flushes the queue and ends the writer's thread."""
        self._writer.close()


class PrometheusSink:
    """The newest value of every scalar in Prometheus' text format: in a file, and over HTTP when given a port.

    The file is the default because a training run is a batch job: node_exporter's textfile collector (or a sidecar)
    reads it with no port to choose and no service to discover, two runs on one host do not collide, and the last values
    stay readable after the run. The port, served by the standard library, is for clusters that scrape pods directly.

    Args:
        path: file to replace atomically at every record, or None for HTTP alone.
        run: value of the `run` label on every sample.
        port: TCP port to serve `/metrics` on; 0 takes a free one (see `.port`), None serves nothing.
        host: address to listen on. Only this machine by default: metrics carry no password; a pod says "0.0.0.0".

    Raises:
        ValueError: neither a path nor a port was given.
    """

    def __init__(
        self, path: str | Path | None, *, run: str = "raytron", port: int | None = None, host: str = "127.0.0.1"
    ):
        if path is None and port is None:
            raise ValueError("PrometheusSink has nowhere to write: give it a path, a port or both")
        self._path = None if path is None else Path(path)
        if self._path:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        escaped = run.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
        self._label = f'{{run="{escaped}"}}'
        self._values: dict[str, float] = {}
        self.text = ""
        self._server = None if port is None else self._serve(host, port)
        self.port = self._server.server_address[1] if self._server else None

    def _serve(self, host: str, port: int) -> Any:
        from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

        sink = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                found = self.path.split("?")[0] == "/metrics"
                body = sink.text.encode() if found else b"see /metrics\n"
                self.send_response(200 if found else 404)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                """Scrapes are no news."""

        server = ThreadingHTTPServer((host, port), Handler)
        threading.Thread(target=server.serve_forever, args=(0.1,), name="prometheus", daemon=True).start()
        return server

    def write(self, record: Record) -> None:
        """Replaces the values this record carries, keeps the others (an evaluation stays until the next one)."""
        self._values |= record.scalars() | {"step": record.step}
        self.text = "".join(self._sample(tag, value) for tag, value in sorted(self._values.items()))
        if self._path:
            write_atomically(self._path, self.text)

    def _sample(self, tag: str, value: float) -> str:
        name = "raytron_" + re.sub(r"[^a-zA-Z0-9_]", "_", tag)
        kind = "counter" if name.endswith("_total") else "gauge"
        shown = repr(float(value)).replace("nan", "NaN").replace("inf", "Inf")
        return f"# TYPE {name} {kind}\n{name}{self._label} {shown}\n"

    def close(self) -> None:
        """Stops serving; the file stays."""
        if self._server:
            self._server.shutdown()
            self._server.server_close()


class WandbSink:
    """Scalars to Weights & Biases (`pip install 'raytron[wandb]'`); `settings` go to `wandb.init` (mode, entity, tags).

    The run's name is its id too, so a resumed run continues its own curves.

    Raises:
        ValueError: the package is not installed; says what to install.
    """

    def __init__(
        self, project: str, *, run: str, directory: str | Path, config: Mapping[str, Any] | None = None, **settings: Any
    ):
        try:
            import wandb
        except ImportError as error:
            raise ValueError(_missing("Weights & Biases", "wandb")) from error
        Path(directory).mkdir(parents=True, exist_ok=True)
        identity = re.sub(r"[^\w-]", "-", run)
        self._run = wandb.init(
            project=project,
            name=run,
            id=identity,
            resume="allow",
            dir=str(directory),
            config=dict(config or {}),
            **settings,
        )

    def write(self, record: Record) -> None:
        """Logs the scalars at the record's step; an evaluation joins the training record of its step."""
        self._run.log(record.scalars(), step=record.step)

    def close(self) -> None:
        """Uploads what is left and ends the run."""
        self._run.finish()


class MlflowSink:
    """Scalars to MLflow (`pip install 'raytron[mlflow]'`), through a client of its own rather than MLflow's global run.

    Args:
        experiment: name of the experiment; made where it does not exist.
        run: name of the run.
        tracking_uri: the server; None means what `MLFLOW_TRACKING_URI` says.
        config: parameters to log once, nested mappings flattened to dotted names.

    Raises:
        ValueError: the package is not installed; says what to install.
    """

    def __init__(
        self, experiment: str, *, run: str, tracking_uri: str | None = None, config: Mapping[str, Any] | None = None
    ):
        try:
            from mlflow.entities import Metric, Param
            from mlflow.tracking import MlflowClient
        except ImportError as error:
            raise ValueError(_missing("MLflow", "mlflow")) from error
        self._metric, self._client = Metric, MlflowClient(tracking_uri)
        known = self._client.get_experiment_by_name(experiment)
        experiment_id = known.experiment_id if known else self._client.create_experiment(experiment)
        self._run_id = self._client.create_run(experiment_id, run_name=run).info.run_id
        params = [Param(name, str(value)) for name, value in _flatten(config or {})]
        for start in range(0, len(params), 100):  # the server takes 100 parameters a request
            self._client.log_batch(self._run_id, params=params[start : start + 100])

    def write(self, record: Record) -> None:
        """Logs all scalars of the record in one request."""
        now_ms = int(time.time() * 1000)
        metrics = [self._metric(tag, float(value), now_ms, record.step) for tag, value in record.scalars().items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self) -> None:
        """Marks the run finished."""
        self._client.set_terminated(self._run_id)


def _missing(what: str, extra: str) -> str:
    return f"metrics are to go to {what}, but its package is not installed: pip install 'raytron[{extra}]'"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
