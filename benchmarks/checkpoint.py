"""What a checkpoint costs a training run: the time it blocks a step, and the time to load one.

Blocked. A training step with an asynchronous save under way is blocked by the call itself and by the barrier before its
update, which waits for what is left of the copy; the manager counts both. The peer is a twentieth of a synchronous save
of the same state in the same run, so a ratio of 1 means "blocked at most a twentieth". The writing that follows shares
the machine with the steps; how much longer they take meanwhile is a row of its own, for information, since on two cores
it says more about the cores than about the design.

Load. `CheckpointManager.load` of the whole state, and `load_weights` of the Hugging Face directory in it, into buffers
that exist, against reading the same files front to back into one buffer that exists: same bytes, same page cache,
4 MiB at a time, no parsing, no checksum, no placing. The ratio is raw time over load time; 0.6 is the target.

Floors for P parameters: state of 12 P (fp32: weights and two moments) or 14 P bytes (bf16: weights, masters, moments).
A save copies them once and writes them once, a load reads them once. 28M parameters: 0.33 / 0.39 GB, 16 / 19 ms at the
20 GB/s of one core's memcpy, against a forward and backward of 6 P T FLOP (T = 512 tokens, 86 GFLOP, 0.4 s in fp32).
Loading weights alone is a row for information: planning takes some 0.2 ms a tensor whatever its size, which is nothing
for 16 GB in 291 tensors and half of the time for 56 MB in 75. Rejected: dropping the page cache, which needs root and
would measure the disk.

    python benchmarks/checkpoint.py [--quick] [--size toy]
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from _common import ROOT, Samples, emit, interleave, parse, seconds, write_results

from raytron.checkpoint import CheckpointManager
from raytron.config import TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build, load_weights
from raytron.models.arch import DecoderConfig
from raytron.training import DTYPES, TrainEngine

BENCHMARK = "checkpoint"
CHUNK = 4 << 20  # bytes to a raw read
SHARE = 20  # a step may be blocked this fraction of a synchronous save


@dataclass(frozen=True)
class Case:
    """A model, and the tokens of the step a save overlaps."""

    name: str
    arch: DecoderConfig
    batch: int
    length: int


def _llama(layers: int, hidden: int, ffn: int, vocabulary: int) -> DecoderConfig:
    return DecoderConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
    )


TOY = Case("toy", _llama(2, 128, 256, 512), 1, 32)
SMALL = Case("28M", _llama(8, 512, 1408, 4096), 1, 512)
LARGE = Case("103M", _llama(12, 768, 2048, 16384), 1, 512)


def engine_of(case: Case, precision: str) -> tuple[TrainEngine, list[MicroBatch]]:
    """An engine on this process alone, and the batch it trains on over and over."""
    model = build(case.arch, dtype=DTYPES[precision], seed=1)
    config = TrainConfig(precision=precision, global_batch_size=case.batch, micro_batch_size=case.batch, steps=10**6)
    tokens = torch.randint(0, case.arch.vocab_size, (case.batch, case.length + 1))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(case.batch, case.length))
    return TrainEngine(model, config), [batch]


def nbytes(engine: TrainEngine) -> int:
    """Bytes of weights and optimizer state."""
    return sum(t.nbytes for t in (engine.model.weights, *engine.optimizer.values()))


# ------------------------------------------------------------------------------------------------------------- blocked


class Saves:
    """Synchronous and asynchronous saves of one engine, each in a folder of its own."""

    def __init__(self, engine: TrainEngine, batches: list[MicroBatch], folder: Path) -> None:
        self._engine, self._batches = engine, batches
        self._sync = CheckpointManager(folder / "sync", keep=1, asynchronous=False)
        self._async = CheckpointManager(folder / "async", keep=1)
        self.during: list[float] = []  # seconds of the steps that a save overlapped

    def plain(self) -> float:
        """Seconds of a step without a save."""
        return seconds(lambda: self._engine.step(self._batches))()

    def synchronous(self) -> float:
        """Seconds of a whole save; a step before it makes it another version."""
        self._engine.step(self._batches)
        return seconds(lambda: self._saved(self._sync))()

    def _saved(self, manager: CheckpointManager) -> None:
        saved = manager.save(self._engine).result()
        assert saved.ok, saved.error

    def blocked(self) -> float:
        """Seconds that an asynchronous save kept the training waiting; the save has ended when this returns."""
        self._engine.step(self._batches)
        before = self._async.blocked_s
        future = self._async.save(self._engine)
        self.during.append(self.plain())  # the copy, and the barrier before the update
        blocked = self._async.blocked_s - before
        saved = future.result()
        assert saved.ok, saved.error
        return blocked


def blocking(case: Case, precision: str, rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows: blocked against a twentieth of the synchronous save; the step meanwhile."""
    engine, batches = engine_of(case, precision)
    saves = Saves(engine, batches, folder)
    cases = {"plain": saves.plain, "sync": saves.synchronous, "blocked": saves.blocked}
    interleave(cases, 1)  # first touches of every buffer
    saves.during.clear()
    found = interleave(cases, rounds)
    size = {"state MB": round(nbytes(engine) / 1e6), "rounds": rounds}
    sync, blocked = found["sync"], found["blocked"]
    yield emit(
        BENCHMARK,
        f"blocked by an asynchronous save, {case.name} {precision}",
        blocked.median,
        sync.median / SHARE,
        f"synchronous save / {SHARE}",
        unit="s",
        higher_is_better=False,
        details={
            "target": 1.0,
            "synchronous save s": round(sync.median, 4),
            "longest blocked s": round(max(blocked.values), 5),
            "spread": f"{blocked.spread:.1%} / {sync.spread:.1%}",
            **size,
        },
    )
    yield emit(
        BENCHMARK,
        f"step while a save is copied and written, {case.name} {precision}",
        Samples(tuple(saves.during)).median,
        found["plain"].median,
        "the same step without a save",
        unit="s",
        higher_is_better=False,
        for_information=True,
        details=size,
    )


# ---------------------------------------------------------------------------------------------------------------- load


def raw_read(files: Sequence[Path]) -> Callable[[], None]:
    """Read all of `files` into memory that was touched before, aligned: elsewhere a read takes three times as long."""
    room = torch.empty(sum(file.stat().st_size for file in files), dtype=torch.uint8)

    def read() -> None:
        view = memoryview(room.numpy())
        for file in files:
            descriptor = os.open(file, os.O_RDONLY)
            while n := os.readv(descriptor, [view[:CHUNK]]):
                view = view[n:]
            os.close(descriptor)
        assert not view, "a file became shorter"

    read()
    return read


def loading(case: Case, precision: str, rounds: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Rows: the whole state, and the weights alone, each against a raw read of its files."""
    engine, batches = engine_of(case, precision)
    engine.step(batches)
    manager = CheckpointManager(folder / "load", asynchronous=False)
    assert manager.save(engine).result().ok
    root = Path(manager.latest())
    everything = sorted(path for path in root.rglob("*") if path.is_file())
    weights = sorted((root / "model").glob("*.safetensors"))
    jobs = {
        "load of the whole state": (lambda: manager.load(engine), everything, 0.6),
        "load of the weights": (lambda: load_weights(engine.model, root / "model"), weights, None),
    }
    for name, (load, files, target) in jobs.items():
        raw, size = seconds(raw_read(files)), sum(file.stat().st_size for file in files)
        load()
        found = interleave({"raw": raw, "load": seconds(load)}, rounds)
        yield emit(
            BENCHMARK,
            f"warm {name}, {case.name} {precision}",
            found["load"].median,
            found["raw"].median,
            "raw read of the same files",
            unit="s",
            higher_is_better=False,
            for_information=target is None,
            details={
                **({"target": target} if target else {}),
                "MB": round(size / 1e6),
                "GB/s": round(size / found["load"].median / 1e9, 2),
                "raw GB/s": round(size / found["raw"].median / 1e9, 2),
                "spread": f"{found['load'].spread:.1%} / {found['raw'].spread:.1%}",
                "rounds": rounds,
            },
        )


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse("Time a checkpoint blocks training, and warm load against a raw read.", argv, size="full")
    toy = arguments.size == "toy"
    cases = [TOY] if toy else [SMALL] if arguments.quick else [SMALL, LARGE]
    saves, loads = (2, 3) if toy else (7, 15)
    runs, rows = ROOT / "runs", []
    runs.mkdir(exist_ok=True)
    for case in cases:
        for precision in ("fp32", "bf16"):
            with tempfile.TemporaryDirectory(prefix="benchmark-", dir=runs) as folder:  # a disk: /tmp may be memory
                rows += blocking(case, precision, saves, Path(folder))
                rows += loading(case, precision, loads, Path(folder))
    if arguments.output:
        write_results(arguments.output, rows)


if __name__ == "__main__":
    main()
