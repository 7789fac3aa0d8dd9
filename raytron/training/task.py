"""A pretraining run as one rank sees it: data by index, engine, checkpoints. Hosted by an actor or a torchrun process.

Each rank reads its own samples; whoever drives the run sees only metrics.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from raytron.config import PretrainConfig
from raytron.data.build import Prepared, build_datasets
from raytron.data.loader import GlobalBatches
from raytron.metrics import EvalRecord, StepRecord
from raytron.models.base import ShardedModel
from raytron.models.loading import begin
from raytron.parallel.collectives import World
from raytron.training.engine import DTYPES, StepResult, TrainEngine
from raytron.training.memory import flops_per_token
from raytron.training.reshape import Reshaping
from raytron.training.saves import Saves
from raytron.training.seating import config_at

__all__ = ["PretrainTask", "measure_peak_flops", "sample_counts"]


RECENT = 256  # records kept for a driver that lost messages: more than it sends steps ahead


class PretrainTask(Reshaping):
    """One rank of a pretraining run.

    Args:
        world: this rank's seat; its mesh is what `config.parallel` asks for.
        config: the run's configuration.
        arch: the model's architecture.
        prepared: what `raytron.data.prepare` made, once, before ranks started.
        checkpoints: folder or URI of the run's checkpoints.
        fresh: nothing is built or read but the data: this rank joins a run and gets all it is to hold by its first
            `reshape`, until when it has no `engine` (and `world` may be None).

    Methods are collective over the world, but for those of `Reshaping` and `since`. Metrics come from rank 0, other
    ranks return None.
    """

    def __init__(
        self,
        world: World | None,
        config: PretrainConfig,
        arch: Any,
        prepared: Prepared,
        checkpoints: str,
        fresh: bool = False,
    ) -> None:
        self.world, self.config, self.arch, self.prepared = world, config, arch, prepared
        self._make_data()
        policy = config.run.checkpoint_config
        self.saves = Saves(None, checkpoints, policy, prepared.tokenizer_directory)
        self._flops = flops_per_token(arch, config.data.sequence_length)
        self._reader = None
        self._recent: deque[StepRecord] = deque(maxlen=RECENT)
        self.engine, self.peak_flops, self._end = None, 0.0, time.perf_counter()
        if not fresh:
            self._begin(world)

    def _begin(self, world: World) -> None:
        """Build what a run starts from."""
        self.world, config = world, config_at(self.config, world.mesh)
        how = {"parallel": config.parallel, "dtype": DTYPES[config.precision]}
        model = begin(self.config.model, self.arch, world, seed=config.seed, **how)
        self.engine = self._engine_of(model, config)
        self._adopted({"peak_flops": measure_peak_flops(world)})

    def _make_data(self) -> None:
        config, size, length = self.config, self.config.global_batch_size, self.config.data.sequence_length
        train, valid, _ = build_datasets(config.data, self.prepared, *sample_counts(config))
        self._train = GlobalBatches(train, size, config.micro_batch_size, length)
        self._valid = GlobalBatches(valid, size, config.micro_batch_size, length) if valid is not None else None
        self._held_out_batches = config.evaluation.batches

    def _tokens(self) -> int:
        """Of the step just done, over all ranks: what its speed is a share of."""
        return self.config.global_batch_size * self.config.data.sequence_length

    def load(self) -> tuple[int, list[str]]:
        """Continue from the newest good checkpoint, at whatever layout it was saved.

        Returns its step, 0 where there is none, and what was wrong with newer ones that were passed over.
        """
        damaged = self.saves.load()
        if damaged is not None:
            self._close_reader()
            self._recent.clear()
        return self.engine.counters.step, damaged or []

    def restart(self, world: World) -> tuple[int, list[str]]:
        """Begin again on a new seat without leaving the process, from the newest checkpoint if there is one: where too
        much was lost for `reshape`. Collective over `world`; newcomers too. Returns as `load` does."""
        self._next, self.engine = None, None
        self.saves.serve(None)  # free what was before
        self._close_reader()
        self._recent.clear()
        self._begin(world)
        return self.load()

    def train_step(self) -> StepRecord | None:
        """One step of the run; TrainingStopped after too many skipped ones in a row."""
        if self._reader is None:
            dp = self.world.axis("dp")
            self._reader = self._train.prefetch(self.engine.counters.consumed_samples, dp.index, dp.size)
        record = self._note(self.engine.step(next(self._reader)))
        return record if self.world.rank == 0 else None

    def since(self, step: int) -> list[StepRecord]:
        """The records of the steps after `step` that were done here, the newest `RECENT` of them at most. Any rank
        that was there knows them; for a driver that lost messages."""
        return [record for record in self._recent if record.step > step]

    def _note(self, result: StepResult) -> StepRecord:
        now = time.perf_counter()
        elapsed, self._end = now - self._end, now
        self._recent.append(self._record(result, elapsed))
        return self._recent[-1]

    def evaluate(self) -> EvalRecord | None:
        """Held-out loss over the same first global batches of the validation split every time."""
        if self._valid is None:
            return None
        dp, size = self.world.axis("dp"), self.config.global_batch_size
        counts = torch.zeros(2, dtype=torch.float64)
        for batch in range(self._held_out_batches):
            counts += self.engine.evaluate(self._valid.read(batch * size, dp.index, dp.size))
        self._end = time.perf_counter()
        if self.world.rank:
            return None
        loss = (counts[0] / counts[1]).item()
        return EvalRecord(self.engine.counters.step, loss, torch.tensor(loss).exp().item(), int(counts[1]))

    def save(self, wait: bool = False) -> str | None:
        """See `Saves.save`. A save in the background is heard of by the notice of a step after it, or here."""
        return self.saves.save(wait)

    def latest(self) -> str | None:
        """See `Saves.latest`."""
        return self.saves.latest()

    def close(self) -> None:
        """Finish saving and stop reading."""
        self.saves.close()
        self._close_reader()

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # See `Reshaping`

    def _engine_of(self, model: ShardedModel, config: Any) -> TrainEngine:
        model.origin = model.origin or self.config.model.path
        return TrainEngine(model, config)

    def _concluded(self, result: StepResult | None) -> None:
        self._close_reader()  # it has handed out the batch that is to be done again
        if result is not None:
            self._note(result)

    def _tell(self) -> dict[str, Any]:
        return super()._tell() | {"peak_flops": self.peak_flops}

    def _adopted(self, told: Mapping[str, Any]) -> None:
        self._close_reader()
        self.saves.serve(self.engine)
        self.peak_flops = told["peak_flops"]
        self._end = time.perf_counter()

    def _record(self, result: StepResult, elapsed: float) -> StepRecord:
        counters, tokens = self.engine.counters, self._tokens()
        flops = tokens * self._flops / elapsed / self.world.mesh.size
        return StepRecord(
            step=result.step,
            consumed_samples=counters.consumed_samples,
            consumed_tokens=counters.consumed_tokens,
            loss=result.loss,
            grad_norm=result.grad_norm,
            learning_rate=result.learning_rate,
            step_time_s=elapsed,
            tokens_per_s=tokens / elapsed,
            tflops_per_rank=flops / 1e12,
            mfu=flops / self.peak_flops,
            memory_bytes=peak_memory(self.world.device),
            skipped=result.skipped is not None,
            skipped_total=counters.skipped,
            nan_total=counters.nan_steps,
            notice=self._notice(result),
            verdict=result.verdict.told() if result.verdict else {},
            phases_s=dict(self.engine.phases_s),
        )

    def _notice(self, result: StepResult) -> str:
        skipped = f"step {result.step} was skipped: {result.skipped}" if result.skipped else None
        if skipped and result.culprit:
            skipped += f", first the {result.culprit}"
        doubted = f"step {result.step}: {result.verdict}" if result.verdict else None
        return "; ".join(filter(None, (skipped, doubted, self.saves.failed())))


def sample_counts(config: PretrainConfig) -> tuple[int, int]:
    """(training, held-out) samples of a run. Their order depends on their number, so everybody asks for the same."""
    return max(config.steps, 1) * config.global_batch_size, config.evaluation.batches * config.global_batch_size


def peak_memory(device: torch.device) -> int:
    """Most memory this rank has held so far, in bytes: the device's, or the process's on a CPU (0 where unknown)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")  # getrusage's maximum is inherited from whatever process started this one
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def measure_peak_flops(world: World, size: int | None = None, seconds: float = 0.2) -> float:
    """FLOP/s of a square matrix product in bf16 on a GPU, fp32 on a CPU, all ranks at once: what MFU is a share of."""
    device = world.device
    dtype, size = (torch.bfloat16, size or 8192) if device.type == "cuda" else (torch.float32, size or 512)
    a = torch.randn(size, size, device=device).to(dtype)
    a @ a
    _synchronize(device)
    world.axis("world").barrier()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ a
        _synchronize(device)
        count += 1
    return 2.0 * size**3 * count / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
