"""What a run shows when it is over: the loss curve and the summary table.

The curve is drawn from the metrics file and not from memory, so that it can be drawn again, and covers the whole of a
run that was resumed. Rejected: pyplot, which keeps every figure in a global list and looks for a display.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raytron.metrics.progress import short_number, short_time
from raytron.metrics.records import UNKNOWN, EvalRecord, StepRecord, read_records

if TYPE_CHECKING:
    from rich.table import Table


def loss_curve_png(
    jsonl_path: str | Path, png_path: str | Path, *, unigram: float | None = None, title: str = ""
) -> None:
    """Draws a run's metrics file: training loss raw and smoothed, held-out points, steps below and tokens above.

    Args:
        jsonl_path: what `JsonlSink` wrote.
        png_path: the picture, replaced atomically.
        unigram: entropy in nats of the text's token frequencies, drawn as a line: the loss of a model that knows how
            often each token occurs and nothing of order. Below it, the model has learned from context.
        title: set above the picture.

    Raises:
        ValueError: the file holds no training step.
    """
    records = read_records(jsonl_path)
    steps = [record for record in records if isinstance(record, StepRecord)]
    if not steps:
        raise ValueError(f"{jsonl_path} holds no training step yet, so there is no loss curve to draw")
    figure, axes = _loss_axes(steps, title)
    _draw_losses(axes, steps, [record for record in records if isinstance(record, EvalRecord)], unigram)
    png_path = Path(png_path)
    png_path.parent.mkdir(parents=True, exist_ok=True)
    partial = png_path.with_name(f".{png_path.name}.tmp")
    figure.savefig(partial, format="png")
    os.replace(partial, png_path)


def _loss_axes(steps: list[StepRecord], title: str) -> tuple[Any, Any]:
    # Figure and canvas without pyplot: pyplot keeps every figure in a global list.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    axes.set(xlabel="step", ylabel="loss (nats per token)", xlim=(0, max(steps[-1].step, 2)))
    axes.spines[["right", "top"]].set_visible(False)
    axes.grid(color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    per_step = max(steps[-1].consumed_tokens / steps[-1].step, 1e-9)
    tokens = axes.secondary_xaxis("top", functions=(lambda step: step * per_step, lambda count: count / per_step))
    tokens.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    tokens.set_xlabel("tokens", color="#777777")
    tokens.tick_params(colors="#777777")
    tokens.spines["top"].set_color("#bbbbbb")
    return figure, axes


def _draw_losses(axes: Any, steps: list[StepRecord], evals: list[EvalRecord], unigram: float | None) -> None:
    x, losses = [record.step for record in steps], [record.loss for record in steps]
    axes.plot(x, losses, color="#4c78a8", alpha=0.4, linewidth=1)
    smooth = _smoothed(losses)
    axes.plot(x, smooth, color="#2f5d91", linewidth=2, label=f"training, smoothed: {smooth[-1]:.3f} at the end")
    if evals:
        x_eval, y_eval = [record.step for record in evals], [record.loss for record in evals]
        label = f"held-out: {y_eval[-1]:.3f} at the end"
        axes.plot(
            x_eval,
            y_eval,
            color="#e4572e",
            marker="o",
            markersize=5,
            linewidth=1.2,
            clip_on=False,
            zorder=3,
            label=label,
        )
    if unigram is not None:
        axes.axhline(
            unigram, color="#555555", linewidth=1.2, linestyle=(0, (5, 3)), label=f"unigram entropy: {unigram:.3f}"
        )
    skipped = [record.step for record in steps if record.skipped]
    if skipped:
        at_bottom = axes.get_xaxis_transform()
        label = f"skipped steps: {len(skipped)}"
        axes.plot(skipped, [0.015] * len(skipped), "|", color="#d62728", markersize=9, transform=at_bottom, label=label)
    axes.legend(frameon=False, loc="upper right")


def _smoothed(losses: list[float]) -> list[float]:
    """Centred mean over a twentieth of the run, narrower while the loss still falls fast; skipped steps are left out.

    A running mean of the past would lie visibly above the points it is to summarise.
    """
    sums, counts = [0.0], [0]  # running totals: a window costs two subtractions however long the run is
    for loss in losses:
        finite = math.isfinite(loss)
        sums.append(sums[-1] + (loss if finite else 0.0))
        counts.append(counts[-1] + finite)
    out = []
    for index in range(len(losses)):
        half = min(len(losses) // 40, index // 5)
        low, high = max(0, index - half), min(len(losses), index + half + 1)
        count = counts[high] - counts[low]
        out.append((sums[high] - sums[low]) / count if count else UNKNOWN)
    return out


def _against(gain: float) -> str:
    return f"; on held-out text the model is {abs(gain):.2f} nats {'better' if gain >= 0 else 'worse'}"


def summary_table(
    *,
    name: str,
    tokens: int,
    first_loss: float,
    last_loss: float,
    tokens_per_s: float,
    wall_s: float,
    files: Mapping[str, str | Path],
    held_out_loss: float | None = None,
    unigram: float | None = None,
) -> "Table":
    """The table printed at the end of a run: `rich.console.Console().print(summary_table(...))`.

    Losses and `unigram` in nats per token, `wall_s` in seconds, `files` maps what ("weights") to where.
    """
    from rich.table import Table

    table = Table(title=f"run {name}", title_justify="left", title_style="bold", show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="ignore", no_wrap=True)  # a path cut or folded could not be copied
    table.add_row("tokens seen", f"{tokens:,}")
    table.add_row("training loss", f"{first_loss:.3f} at first, {last_loss:.3f} at last")
    if held_out_loss is not None:
        table.add_row("held-out loss", f"{held_out_loss:.3f} (perplexity {math.exp(min(held_out_loss, 700)):.4g})")
    if unigram is not None:
        gain = "" if held_out_loss is None else _against(unigram - held_out_loss)
        table.add_row("unigram entropy", f"{unigram:.3f}{gain}")
    table.add_row("speed", f"{tokens_per_s:,.0f} tokens/s")
    table.add_row("wall time", short_time(wall_s))
    table.add_section()
    for what, where in files.items():
        table.add_row(what, str(where))
    return table
