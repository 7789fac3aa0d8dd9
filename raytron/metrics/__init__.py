"""One record per step, written to every sink the user asked for.

The engine measures, the driver builds one frozen `StepRecord` a step (`EvalRecord` a held-out evaluation) and hands it
to a `MetricsWriter`, which passes it to its sinks. A sink is two methods, `write(record)` and `close()`; the JSONL file
is the run's own memory: `loss_curve_png` draws it, and a resumed run is compared with an uninterrupted one by it.

The package imports neither torch nor ray, so drivers, `torchrun` loops and plain scripts all use it.
"""

from raytron.metrics.accounting import Goodput, goodput
from raytron.metrics.progress import ProgressSink
from raytron.metrics.records import EvalRecord, Record, StepRecord, read_records
from raytron.metrics.report import loss_curve_png, summary_table
from raytron.metrics.sinks import (
    JsonlSink,
    MetricsWriter,
    MlflowSink,
    PrometheusSink,
    Sink,
    TensorBoardSink,
    WandbSink,
)
from raytron.metrics.status_page import status_page
from raytron.metrics.timeline import Span, Timeline, read_lanes, read_timeline, shares
from raytron.metrics.timeline_page import timeline_page, timeline_png

__all__ = [
    "EvalRecord",
    "Goodput",
    "JsonlSink",
    "MetricsWriter",
    "MlflowSink",
    "ProgressSink",
    "PrometheusSink",
    "Record",
    "Sink",
    "Span",
    "StepRecord",
    "TensorBoardSink",
    "Timeline",
    "WandbSink",
    "goodput",
    "loss_curve_png",
    "read_lanes",
    "read_records",
    "read_timeline",
    "shares",
    "status_page",
    "summary_table",
    "timeline_page",
    "timeline_png",
]
