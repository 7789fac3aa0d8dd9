"""The records a run leaves behind, and their JSONL form.

A record is a frozen dataclass of plain Python numbers, one per training step and one per held-out evaluation. On disk a
record is one line of strict JSON (`repr` of a float round-trips bit for bit; NaN and infinity, which JSON cannot say,
are null), so a run's losses can be compared to the last bit and read by anything. Rejected: one dict per step with
whatever keys the moment brought, which every reader then has to guess.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

UNKNOWN = math.nan


@dataclass(frozen=True)
class StepRecord:
    """What one training step did. A NaN means "not known"; in `loss`, that the step was not finite."""

    step: int  # committed steps so far, the first step is 1
    consumed_samples: int
    consumed_tokens: int
    loss: float  # nats per token of the global batch, before the update
    grad_norm: float = UNKNOWN  # global, before clipping
    learning_rate: float = UNKNOWN
    step_time_s: float = UNKNOWN
    tokens_per_s: float = UNKNOWN  # of the whole run, all ranks together
    tflops_per_rank: float = UNKNOWN  # model FLOPs, recompute not counted
    mfu: float = UNKNOWN  # tflops_per_rank over the peak measured at start, 0..1
    memory_bytes: int = 0  # largest over the ranks
    skipped: bool = False  # the update was not applied
    skipped_total: int = 0
    nan_total: int = 0
    notice: str = ""  # what the user should hear: why the update was skipped, why a save failed
    verdict: Mapping[str, Any] = field(default_factory=dict)  # on numbers that were doubted (training/guard.py)
    phases_s: Mapping[str, float] = field(default_factory=dict)  # seconds per phase of the step
    extra: Mapping[str, float] = field(default_factory=dict)  # anything else worth a curve, e.g. {"moe/load": 1.02}
    headline: Sequence[str] = field(default_factory=list)  # names of `extra` that the progress line shows

    def scalars(self) -> dict[str, float]:
        """Flat `{"group/name": value}` for sinks that draw curves."""
        train = ("loss", "grad_norm", "learning_rate", "consumed_samples", "consumed_tokens")
        speed = ("step_time_s", "tokens_per_s", "tflops_per_rank", "mfu", "memory_bytes")
        return (
            {f"train/{name}": getattr(self, name) for name in (*train, "skipped_total", "nan_total")}
            | {f"speed/{name}": getattr(self, name) for name in speed}
            | {f"phase/{name}_s": seconds for name, seconds in self.phases_s.items()}
            | dict(self.extra)
        )


@dataclass(frozen=True)
class EvalRecord:
    """A held-out evaluation after `step` committed steps over `tokens` tokens; loss in nats per token, NaN where what
    was evaluated is in `extra`."""

    step: int
    loss: float
    perplexity: float
    tokens: int
    extra: Mapping[str, float] = field(default_factory=dict)  # for instance {"reward": 0.9}

    def scalars(self) -> dict[str, float]:
        """Flat `{"eval/name": value}` for sinks that draw curves."""
        known = {name: getattr(self, name) for name in ("loss", "perplexity", "tokens")}
        return {f"eval/{name}": value for name, value in (known | dict(self.extra)).items()}


Record = StepRecord | EvalRecord
_KINDS: dict[str, type[StepRecord] | type[EvalRecord]] = {"train": StepRecord, "eval": EvalRecord}


def to_line(record: Record) -> str:
    """The record as one line of JSON, without its newline."""
    kind = "eval" if isinstance(record, EvalRecord) else "train"
    return json.dumps({"kind": kind, **_without_nan(asdict(record))}, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nan(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _from_line(line: str) -> Record:
    values = json.loads(line)
    kind = _KINDS[values.pop("kind")]
    known = {item.name for item in fields(kind)}  # a file of a newer version may say more
    return kind(**{name: _with_nan(value) for name, value in values.items() if name in known})


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_nan(inner) for key, inner in value.items()}
    return UNKNOWN if value is None else value


def read_records(path: str | Path) -> list[Record]:
    """All records of a metrics file, in the order they were written.

    A last line cut short by a killed process is left out.

    Raises:
        ValueError: some other line is not a record; names the file and the line.
    """
    return [record for record, _ in parse_lines(Path(path))]


def parse_lines(path: Path) -> Iterator[tuple[Record, str]]:
    """Records with their lines as written, newline included."""
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        if not line.endswith("\n"):
            return  # torn by a kill: the line was never finished, so its step was never reported
        try:
            record = _from_line(line)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{number} is not a metrics record ({error}); move the file away to start a new one"
            ) from error
        yield record, line


def write_atomically(path: Path, text: str, *, durable: bool = False) -> None:
    """Readers see the old file or the new one, never a part; `durable` holds that through a power cut too."""
    partial = path.with_name(f".{path.name}.tmp")
    with partial.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    os.replace(partial, path)
