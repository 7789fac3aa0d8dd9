"""The line one watches: rich's live display on a terminal, plain lines in a log.

The same text in both, so that what is seen on a laptop is what is found in a cluster's log. Rejected: a live display
everywhere (a log file full of cursor movements) and a line per step (a log file full of lines).
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from raytron.metrics.records import UNKNOWN, EvalRecord, Record, StepRecord

if TYPE_CHECKING:
    from rich.console import Console


class ProgressSink:
    """A live progress line on a terminal; elsewhere (a log, a pipe, a Ray job) one plain line now and then.

    Args:
        total_steps: steps of the whole run, for the bar and the time left.
        console: a rich console; the process's standard output by default.
        every_s: seconds between plain lines. The first step, the last and every evaluation are always printed.
        clock: seconds, monotonic; a parameter so that tests need not wait.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: "Console | None" = None,
        every_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        from rich.console import Console

        self.total_steps = total_steps
        self.console = console or Console()
        self._every_s, self._clock = every_s, clock
        self._last_print = -math.inf
        self._recent_s: deque[float] = deque(maxlen=32)
        self._held_out: float | None = None
        self._progress = self._start() if self.console.is_terminal else None

    def _start(self) -> Any:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        # On a narrow terminal the line wraps: cut off, it would lose the time left first.
        text = TextColumn("{task.fields[line]}", markup=False, table_column=Column(no_wrap=False))
        columns = [BarColumn(bar_width=24), text] if self.console.width >= 120 else [text]
        progress = Progress(*columns, console=self.console)
        self._task = progress.add_task("train", total=self.total_steps, line="waiting for the first step")
        progress.start()
        return progress

    def write(self, record: Record) -> None:
        """Shows the record; an evaluation joins the live line, or gets a plain line of its own."""
        if isinstance(record, EvalRecord):
            self._held_out = record.loss if math.isfinite(record.loss) else None
            if not self._progress:
                self._print(f"step {record.step}/{self.total_steps} | {self._evaluated(record)}")
            return
        if math.isfinite(record.step_time_s):
            self._recent_s.append(record.step_time_s)
        if self._progress:
            self._progress.update(self._task, completed=record.step, line=self.line(record))
        elif record.step >= self.total_steps or self._clock() - self._last_print >= self._every_s:
            self._last_print = self._clock()
            self._print(self.line(record))

    @staticmethod
    def _evaluated(record: EvalRecord) -> str:
        if record.extra:
            return "evaluation: " + ", ".join(f"{name} {value:.4g}" for name, value in record.extra.items())
        return f"held-out loss {record.loss:.4f} | perplexity {record.perplexity:.4g}"

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def line(self, record: StepRecord) -> str:
        """Loss, speed, memory and the time left (by the median of recent steps); what is unknown is left out."""
        left_s = statistics.median(self._recent_s) * (self.total_steps - record.step) if self._recent_s else UNKNOWN
        share = f" ({record.mfu:.0%} MFU)" if math.isfinite(record.mfu) else ""
        parts = [
            f"step {record.step}/{self.total_steps}",
            *(f"{name.rpartition('/')[2]} {record.extra[name]:.3f}" for name in record.headline),
            f"loss {record.loss:.4f}" + (f" (held-out {self._held_out:.4f})" if self._held_out is not None else ""),
            f"{short_number(record.tokens_per_s)} tok/s" if math.isfinite(record.tokens_per_s) else None,
            f"{record.tflops_per_rank:.3g} TFLOP/s/rank{share}" if math.isfinite(record.tflops_per_rank) else None,
            short_bytes(record.memory_bytes) if record.memory_bytes else None,
            f"{record.skipped_total} skipped" if record.skipped_total else None,
            f"ETA {short_time(left_s)}" if math.isfinite(left_s) else None,
        ]
        return " | ".join(part for part in parts if part)

    def close(self) -> None:
        """Leaves the last line standing and gives the terminal back."""
        if self._progress:
            self._progress.stop()


def short_number(value: float) -> str:
    """12345.6 as "12.3k"."""
    for scale, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= scale:
            scaled = value / scale
            return f"{scaled:.0f}{suffix}" if scaled >= 100 or scaled.is_integer() else f"{scaled:.1f}{suffix}"
    return f"{value:.3g}"


def short_bytes(value: float) -> str:
    """Bytes in GiB, or in MiB below one."""
    return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


def short_time(seconds: float) -> str:
    """Seconds as h:mm:ss, or m:ss below an hour."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
