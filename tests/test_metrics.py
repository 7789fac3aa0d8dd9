"""Properties of the record stream: nothing is lost or written twice over a resume, no sink can stop a run."""

import io
import json
import logging
import math
import struct
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from rich.console import Console

from raytron.metrics import (
    EvalRecord,
    JsonlSink,
    MetricsWriter,
    MlflowSink,
    ProgressSink,
    PrometheusSink,
    StepRecord,
    TensorBoardSink,
    WandbSink,
    loss_curve_png,
    read_records,
    summary_table,
)


def step_record(step: int, **changes) -> StepRecord:
    record = StepRecord(
        step=step,
        consumed_samples=8 * step,
        consumed_tokens=8 * 128 * step,
        loss=7.0 / step + 0.1,
        grad_norm=1.0 / 3.0,
        learning_rate=1e-3,
        step_time_s=0.5,
        tokens_per_s=2048.0,
        tflops_per_rank=0.125,
        memory_bytes=3 << 30,
        phases_s={"reduce": 0.01},
        extra={"moe/load": 1.25},
    )
    return replace(record, **changes)


def run_steps(path, first: int, last: int, *, resume_step: int | None = None) -> None:
    """A training loop's writes: an evaluation every fourth step."""
    sink = JsonlSink(path, resume_step=resume_step)
    for step in range(first, last + 1):
        sink.write(step_record(step))
        if step % 4 == 0:
            sink.write(EvalRecord(step, loss=3.0 / step, perplexity=math.exp(3.0 / step), tokens=1024))
    sink.close()


# ------------------------------------------------------------------------------------------------------------- JSONL


def test_records_come_back_to_the_last_bit(tmp_path):
    records = [step_record(1, loss=0.1 + 0.2), EvalRecord(1, math.pi, math.exp(math.pi), 77)]
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for record in records:
        sink.write(record)
    sink.close()
    back = read_records(tmp_path / "metrics.jsonl")
    assert [struct.pack("d", record.loss) for record in back] == [struct.pack("d", record.loss) for record in records]
    assert replace(back[0], mfu=0.0) == replace(records[0], mfu=0.0)  # mfu is NaN, which equals nothing
    assert back[1] == records[1]


def test_a_line_is_strict_json_whatever_the_numbers(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1, loss=math.nan, grad_norm=math.inf, extra={"a": math.nan}))
    sink.close()

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    values = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert values["loss"] is None
    (record,) = read_records(tmp_path / "metrics.jsonl")
    assert math.isnan(record.loss)
    assert math.isnan(record.extra["a"])


@pytest.mark.parametrize("saved_at", [0, 3, 4, 9])
@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st'])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path, saved_at, torn):
    run_steps(tmp_path / "whole.jsonl", 1, 12)
    killed = tmp_path / "killed.jsonl"
    run_steps(killed, 1, 9)  # nine steps ran, the newest checkpoint is of step `saved_at`
    killed.write_text(killed.read_text() + torn)
    run_steps(killed, saved_at + 1, 12, resume_step=saved_at)
    assert killed.read_text() == (tmp_path / "whole.jsonl").read_text()
    assert [path.name for path in tmp_path.glob(".*")] == []


def test_a_new_run_starts_the_file_anew(tmp_path):
    run_steps(tmp_path / "metrics.jsonl", 1, 5)
    run_steps(tmp_path / "metrics.jsonl", 1, 2)
    assert [record.step for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_written_line_is_readable_before_the_sink_is_closed(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    sink.write(step_record(1))
    assert len(read_records(tmp_path / "metrics.jsonl")) == 1
    sink.close()


def test_a_foreign_line_is_named(tmp_path):
    run_steps(tmp_path / "metrics.jsonl", 1, 2)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write("hello\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl:3 is not a metrics record"):
        JsonlSink(tmp_path / "metrics.jsonl", resume_step=2)


def test_fields_of_a_newer_version_are_passed_over(tmp_path):
    run_steps(tmp_path / "metrics.jsonl", 1, 1)
    line = json.loads((tmp_path / "metrics.jsonl").read_text()) | {"invented_later": 3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert read_records(tmp_path / "metrics.jsonl")[0].step == 1


# ----------------------------------------------------------------------------------------------------------- fan-out


class Broken:
    """A sink whose disk is full from some step on."""

    def __init__(self, from_step: int):
        self.from_step, self.seen, self.closed = from_step, [], False

    def write(self, record):
        if record.step >= self.from_step:
            raise OSError(28, "No space left on device")
        self.seen.append(record.step)

    def close(self):
        self.closed = True
        raise OSError(28, "No space left on device")


def test_a_failing_sink_is_reported_once_and_dropped(tmp_path, caplog):
    broken, healthy = Broken(from_step=2), JsonlSink(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.ERROR), MetricsWriter([broken, healthy]) as writer:
        for step in (1, 2, 3):
            writer.write(step_record(step))
    assert broken.seen == [1]
    assert [record.step for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert len(caplog.messages) == 1
    assert "Broken failed at step 2 and is dropped; training goes on. OSError: [Errno 28] No space" in caplog.text


def test_closing_reaches_every_sink_and_may_be_repeated(tmp_path, caplog):
    broken, healthy = Broken(from_step=9), JsonlSink(tmp_path / "metrics.jsonl")
    writer = MetricsWriter([broken, healthy])
    writer.close()
    writer.close()
    assert broken.closed
    assert healthy._file.closed
    assert len(caplog.messages) == 1


# -------------------------------------------------------------------------------------------------------- TensorBoard


def test_tensorboard_reads_back_one_unfolded_curve(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resume_step in ((1, 9, None), (6, 12, 5)):
        sink = TensorBoardSink(tmp_path, resume_step=resume_step)
        for step in range(first, last + 1):
            sink.write(step_record(step))
        sink.close()
    events = EventAccumulator(str(tmp_path), purge_orphaned_data=True).Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == list(range(1, 13))
    assert events.Scalars("train/loss")[2].value == pytest.approx(step_record(3).loss)
    assert {"phase/reduce_s", "speed/tokens_per_s", "moe/load"} <= set(events.Tags()["scalars"])


# ----------------------------------------------------------------------------------------------------------- progress


def test_plain_lines_are_spaced_by_time_and_show_first_last_and_evaluations():
    now = [0.0]
    output = io.StringIO()
    sink = ProgressSink(10, console=Console(file=output, width=40), every_s=3.0, clock=lambda: now[0])
    for step in range(1, 11):
        sink.write(step_record(step, mfu=0.5))
        if step == 5:
            sink.write(EvalRecord(5, 2.5, 12.18, 100))
        now[0] += 1.0
    sink.close()
    lines = output.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/10", "4/10", "5/10", "7/10", "10/10"]
    first = "step 1/10 | loss 7.1000 | 2.0k tok/s | 0.125 TFLOP/s/rank (50% MFU) | 3.0 GiB | ETA 0:04"
    assert lines[0] == first
    assert lines[2] == "step 5/10 | held-out loss 2.5000 | perplexity 12.18"
    assert "(held-out 2.5000)" in lines[3]


def test_a_terminal_gets_one_live_line():
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=140, _environ={"TERM": "xterm"})
    sink = ProgressSink(2, console=console)
    sink.write(step_record(1))
    sink.write(EvalRecord(1, 2.5, 12.18, 100))
    sink.write(step_record(2))
    sink.close()
    assert "step 2/2 | loss 3.6000 (held-out 2.5000)" in output.getvalue()
    assert "perplexity" not in output.getvalue()


def test_time_left_is_by_recent_steps_and_unknowns_are_left_out():
    sink = ProgressSink(7201, console=Console(file=io.StringIO()))
    bare = StepRecord(step=1, consumed_samples=8, consumed_tokens=1024, loss=2.0)
    assert sink.line(bare) == "step 1/7201 | loss 2.0000"
    for seconds in (90.0, 1.0, 1.0, 1.0):  # the first step compiles
        sink.write(replace(bare, step_time_s=seconds))
    assert sink.line(bare).endswith("ETA 2:00:00")


# --------------------------------------------------------------------------------------------------------- Prometheus


def test_prometheus_file_holds_the_newest_values(tmp_path):
    sink = PrometheusSink(tmp_path / "out" / "raytron.prom", run='a "b"\\c')
    sink.write(step_record(1))
    sink.write(EvalRecord(1, 2.5, 12.18, 100))
    sink.write(step_record(2, loss=math.nan, skipped_total=1))
    sink.close()
    text = (tmp_path / "out" / "raytron.prom").read_text()
    label = r'{run="a \"b\"\\c"}'
    assert f"# TYPE raytron_train_loss gauge\nraytron_train_loss{label} NaN\n" in text
    assert f"# TYPE raytron_train_skipped_total counter\nraytron_train_skipped_total{label} 1.0\n" in text
    assert f"raytron_eval_loss{label} 2.5\n" in text
    assert f"raytron_moe_load{label} 1.25\n" in text
    assert f"raytron_step{label} 2.0\n" in text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["raytron.prom"]


def test_prometheus_is_served_over_http():
    sink = PrometheusSink(None, run="r", port=0)
    sink.write(step_record(1))
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://127.0.0.1:{sink.port}/metrics", timeout=30) as reply:
        assert reply.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert reply.read().decode() == sink.text
    with pytest.raises(urllib.error.HTTPError, match="404"):
        opener.open(f"http://127.0.0.1:{sink.port}/other", timeout=30)
    sink.close()


def test_prometheus_needs_somewhere_to_write():
    with pytest.raises(ValueError, match="a path, a port or both"):
        PrometheusSink(None)


# ----------------------------------------------------------------------------------------------------------- trackers


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("wandb", lambda folder: WandbSink("p", run="r", directory=folder)),
        ("mlflow", lambda folder: MlflowSink("e", run="r")),
    ],
)
def test_a_missing_tracker_says_what_to_install(tmp_path, monkeypatch, package, make):
    monkeypatch.setitem(sys.modules, package, None)  # what the import system keeps for a package that is not there
    monkeypatch.setitem(sys.modules, f"{package}.entities", None)
    with pytest.raises(ValueError, match=rf"pip install 'raytron\[{package}\]'"):
        make(tmp_path)


def test_wandb_takes_a_run_offline(tmp_path):
    pytest.importorskip("wandb")
    sink = WandbSink("p", run="a run/1", directory=tmp_path, config={"a": {"b": 1}}, mode="offline")
    sink.write(step_record(1))
    sink.write(EvalRecord(1, 2.5, 12.18, 100))
    sink.close()
    assert list(tmp_path.rglob("*.wandb"))


def test_mlflow_keeps_metrics_and_parameters(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder in place of a server
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "mlruns").as_uri()
    sink = MlflowSink("e", run="r", tracking_uri=uri, config={"optimizer": {"lr": 0.1}})
    for step in (1, 2):
        sink.write(step_record(step))
    sink.close()
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("e").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.1"}
    assert [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]


# ------------------------------------------------------------------------------------------------------------ reports


def test_loss_curve_is_drawn_from_the_file_skipped_steps_included(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    for step in range(1, 60):
        sink.write(step_record(step, **({"loss": math.nan, "skipped": True} if step in (1, 30) else {})))
    sink.write(EvalRecord(59, 2.5, 12.18, 100))
    sink.close()
    loss_curve_png(tmp_path / "metrics.jsonl", tmp_path / "plots" / "loss.png", unigram=5.5, title="r")
    picture = (tmp_path / "plots" / "loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", picture[16:24])
    assert (width, height) == (1350, 750)
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["loss.png"]


def test_one_step_is_a_curve_and_none_is_refused(tmp_path):
    run_steps(tmp_path / "metrics.jsonl", 1, 1)
    loss_curve_png(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no training step"):
        loss_curve_png(tmp_path / "empty.jsonl", tmp_path / "loss.png")


def test_summary_says_what_the_run_did():
    console = Console(file=io.StringIO(), width=100)
    table = summary_table(
        name="quickstart",
        tokens=1_234_567,
        first_loss=8.3,
        last_loss=3.2,
        tokens_per_s=10_234.4,
        wall_s=143.2,
        held_out_loss=3.3,
        unigram=5.9,
        files={"weights": "runs/quickstart/model"},
    )
    console.print(table)
    text = console.file.getvalue()
    for part in ("1,234,567", "8.300", "3.200", "2.60 nats", "10,234 tokens/s", "2:23", "runs/quickstart/model"):
        assert part in text


# ------------------------------------------------------------------------------------------------------------ imports


def test_metrics_import_is_light():
    heavy = ("torch", "ray", "numpy", "matplotlib", "tensorboard", "rich")
    code = f"import sys, raytron.metrics; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
