"""What an RL run leaves to look at: a record a step, the reward curve, the summary table."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytron.metrics import (
    EvalRecord,
    StepRecord,
    Timeline,
    read_lanes,
    read_records,
    read_timeline,
    shares,
    timeline_page,
    timeline_png,
)
from raytron.rl.statistics import effective_share, statistics
from raytron.rl.types import Batch, Group

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["TIMELINE", "Phases", "draw_timeline", "reward_curve_png", "step_record", "summary"]


LANES = {"score": "trainer", "train": "trainer", "sync": "push"}
TIMELINE = "timeline.json"  # in the run's folder


class Phases:
    """Wall seconds of a step by phase: what the driver waited for, in turn. Those with a lane are on the timeline."""

    def __init__(self, timeline: Timeline, step: int) -> None:
        self.seconds: dict[str, float] = {}
        self._timeline, self._step, self._start = timeline, step, time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, lane = time.perf_counter(), LANES.get(name)
        with self._timeline.span(lane, name, step=self._step) if lane else nullcontext():
            yield
        self.seconds[name] = time.perf_counter() - start

    @property
    def total(self) -> float:
        """Since the step began."""
        return time.perf_counter() - self._start


def step_record(
    step: int,
    groups: Sequence[Group],
    batch: Batch,
    metrics: Mapping[str, float],
    phases: Phases,
    more: Mapping[str, float],
    passed_over: Sequence[Group] = (),
) -> StepRecord:
    """One RL step.

    Args:
        step: RL steps trained, this one included. groups, batch: what it was trained on. passed_over: groups before
            the last of those that were not worth it.
        metrics: the trainer's (`Trainers.train`). more: further numbers by name, "rejected" and the like.
    """
    metrics, seconds = dict(metrics), phases.total
    rho, squared = metrics.pop("rho"), metrics.pop("rho_squared")
    own = ("loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens", "skipped", "train_s")
    extra = {f"rollout/{name}": value for name, value in statistics(groups, batch, step - 1, passed_over).items()}
    extra |= {f"rollout/{name}": float(value) for name, value in more.items()}
    extra |= {name if "/" in name else f"policy/{name}": v for name, v in metrics.items() if name not in own}
    extra["policy/effective_share"] = effective_share(rho, squared)
    skipped = metrics["skipped"] > 0
    return StepRecord(
        step=step,
        consumed_samples=int(metrics["consumed_samples"]),
        consumed_tokens=int(metrics["consumed_tokens"]),
        loss=metrics["loss"],
        grad_norm=metrics["grad_norm"],
        learning_rate=metrics["learning_rate"],
        step_time_s=seconds,
        tokens_per_s=len(batch.tokens) / seconds,
        skipped=skipped,
        skipped_total=int(skipped),
        notice=f"step {step}: an update was skipped, its numbers were not finite" if skipped else "",
        phases_s=dict(phases.seconds),
        extra=extra,
        headline=["rollout/reward_mean", "rollout/response_length_mean"],
    )


def reward_curve_png(jsonl_path: Path, png_path: Path, title: str = "") -> None:
    """Draws a run's rewards: the mean of every step, and evaluations. The picture is replaced atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    records = read_records(jsonl_path)
    steps = [record for record in records if isinstance(record, StepRecord)]
    evals = [record for record in records if isinstance(record, EvalRecord) and "reward" in record.extra]
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    rewards = [record.extra["rollout/reward_mean"] for record in steps]
    axes.plot([record.step for record in steps], rewards, color="#4c78a8", linewidth=1.6, label="rollouts, mean")
    if evals:
        points = [record.step for record in evals], [record.extra["reward"] for record in evals]
        axes.plot(*points, color="#e4572e", marker="o", markersize=5, clip_on=False, label="evaluation")
    axes.set(xlabel="step", ylabel="reward", xlim=(0, max([record.step for record in steps], default=2)))
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, loc="best")
    partial = png_path.with_name(f".{png_path.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, png_path)


def draw_timeline(folder: Path, title: str) -> dict[str, dict[str, float]]:
    """Draw a run's timeline as a page and a picture; the share of the time that each lane spent on what."""
    spans = read_timeline(folder / TIMELINE)
    timeline_page(spans, folder / "timeline.html", title, read_lanes(folder / TIMELINE))
    timeline_png(spans, folder / "timeline.png", title)
    return shares(spans)


def summary(
    name: str,
    first: StepRecord,
    last: StepRecord,
    evaluated: EvalRecord | None,
    wall_s: float,
    busy: Mapping[str, Mapping[str, float]],
    files: Mapping[str, Any],
) -> Table:
    """The table printed at the end of a run; `busy` is `metrics.shares`, `files` maps what ("model") to where."""
    from rich.table import Table

    from raytron.metrics.progress import short_time

    table = Table(title=f"run {name}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="ignore", no_wrap=True)  # a path cut or folded could not be copied
    reward = [record.extra["rollout/reward_mean"] for record in (first, last)]
    table.add_row("steps", f"{last.step:,} ({last.consumed_samples:,} answers, {last.consumed_tokens:,} chosen tokens)")
    table.add_row("reward", f"{reward[0]:.3f} at first, {reward[1]:.3f} at last")
    if evaluated is not None:
        table.add_row("evaluation", ", ".join(f"{key} {value:.3f}" for key, value in evaluated.extra.items()))
    phases = ", ".join(f"{phase} {seconds:.2f} s" for phase, seconds in last.phases_s.items())
    table.add_row("last step", f"{last.step_time_s:.2f} s: {phases}")
    table.add_row("trainer's bits", f"{last.extra['policy/bit_equal']:.1%} of the engines' log-probabilities")
    table.add_row("busy", _busy(busy))
    table.add_row("wall time", short_time(wall_s))
    table.add_section()
    for what, where in files.items():
        table.add_row(what, str(where))
    return table


def _busy(shares: Mapping[str, Mapping[str, float]]) -> str:
    """The share of the time in which each lane was at work, in a line; of engines, and reward models, the mean."""
    totals = {lane: sum(of.values()) for lane, of in shares.items()}
    told = {"engines": 0.0}
    for kind in ("engine", "reward model"):
        if mine := [totals.pop(lane) for lane in list(totals) if lane.startswith(f"{kind} ")]:
            told[f"{kind}s"] = sum(mine) / len(mine)
    return ", ".join(f"{lane} {share:.0%}" for lane, share in (told | totals).items())
