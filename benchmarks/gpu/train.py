"""Training on one GPU: is the mathematics right, and how much of the machine does it use? No Ray, no transformers.

Parity. The real sharded layers and the real engine, at tp 1, 2 and 4, with and without sequence parallelism, against
float64 on the CPU at tp 1: loss and every canonical gradient. NCCL takes one rank per device, so the ranks of a line
are threads here that meet at a barrier (`ThreadAxis`) and share the device's stream; everything above the collectives
is what runs in production. Rejected: slicing weights and adding partial products in the benchmark itself, which tests
the benchmark. All precisions start from the same bf16-rounded weights, so that they compute the same function.

Speed. One optimizer step of global batch 8 x 8,192 tokens; bf16 weights and activations, fp32 gradients, masters and
moments. Floors for a step of T tokens, N matrix weights (embedding not counted), L layers of width D = heads x head
size, sequence S, P parameters:

    arithmetic  6 N T + 6 L S D T FLOP (causal half of attention, no recomputation) at the GEMM rate measured first
    memory      P x (2 + 4 + 16 + 12) bytes for the optimizer: gradients zeroed and read, masters and moments read and
                written, weights written; per micro-batch P x (2 + 2 + 8) for weights, and gradients added in fp32

Llama-3.2-1B: 7.4e13 FLOP a sequence, 94 ms at 790 TFLOP/s, and 42 GB an optimizer step, 10 ms at 4.3 TB/s; 8 layers of
Llama-3-8B: 1.25e14 FLOP, 158 ms, and 95 GB, 22 ms. So the share of the GEMM ceiling is the number to watch. Memory: 18
bytes a parameter, plus activations, plus logits of 8,192 x 128,256 (12 bytes each at the peak: 12.6 GB).

    python benchmarks/gpu/train.py                            # needs a GPU; writes benchmarks/results/gpu_train.md
    python benchmarks/gpu/train.py --size toy --modes eager   # everything at toy size, on a CPU if need be
"""

from __future__ import annotations

import gc
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # _common
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # raytron, where it is not installed

import torch
from _common import ROOT, emit, parse, write_results
from torch import Tensor

from raytron.config import ParallelConfig, RecomputeConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import PRESETS, build
from raytron.models.arch import DecoderConfig
from raytron.parallel.collectives import Axis, World
from raytron.parallel.mesh import Mesh
from raytron.training import DTYPES, TrainEngine
from raytron.training.memory import estimate_memory, flops_per_token

BENCHMARK = "gpu_train"

# Odd vocabulary, fewer key/value heads than four ranks, tied and untied, with and without QK norm.
PARITY = {
    "llama": DecoderConfig(
        vocab_size=1003, hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, max_position_embeddings=512,
    ),
    "qwen3": DecoderConfig(
        family="qwen3", vocab_size=509, hidden_size=192, intermediate_size=320, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
        tie_word_embeddings=True, qk_norm=True,
    ),
}  # fmt: skip
TOY = DecoderConfig(
    vocab_size=259, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256,
)  # fmt: skip
# Largest relative error (2-norm) of any gradient. bf16 keeps 8 bits, and errors add up over some ten products in a row.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


# -------------------------------------------------------------------------------------------------------------- parity


class Meeting:
    """Where the threads of a line show each other a tensor."""

    def __init__(self, size: int) -> None:
        self._barrier, self._shown = threading.Barrier(size, timeout=120.0), [None] * size

    def exchange(self, index: int, tensor: Tensor, use: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
        """`use` of everyone's tensors; afterwards they may be overwritten."""
        self._shown[index] = tensor
        self._barrier.wait()
        result = use(self._shown)
        self._barrier.wait()
        return result

    def leave(self) -> None:
        """Release the others: this thread failed."""
        self._barrier.abort()


class ThreadAxis(Axis):
    """A line whose ranks are threads of this process on one device; what models and losses use of `Axis`."""

    def __init__(self, meeting: Meeting, size: int, index: int) -> None:
        super().__init__("tp", tuple(range(size)), index, {}, None)
        self._meeting = meeting

    def all_reduce_(self, tensor: Tensor, op: str = "sum", async_op: bool = False) -> Tensor:
        assert not async_op
        reduce = {"sum": lambda ts: torch.stack(tuple(ts)).sum(0), "max": lambda ts: torch.stack(tuple(ts)).amax(0)}[op]
        return tensor.copy_(self._meeting.exchange(self.index, tensor, reduce))

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._meeting.exchange(self.index, tensor, lambda ts: torch.cat(tuple(ts)))

    def reduce_scatter(self, tensor: Tensor) -> Tensor:
        share = tensor.shape[0] // self.size
        mine = slice(self.index * share, (self.index + 1) * share)
        return self._meeting.exchange(self.index, tensor, lambda ts: torch.stack([t[mine] for t in ts]).sum(0))


class Seat(World):
    """A rank of a tensor-parallel line of threads."""

    def __init__(self, meeting: Meeting, size: int, rank: int, device: torch.device) -> None:
        self._line = ThreadAxis(meeting, size, rank)
        super().__init__(Mesh(tp=size), rank, None, device=device, connect=False)

    def axis(self, name: str) -> Axis:
        return self._line if name == "tp" and self._line.size > 1 else super().axis(name)


@dataclass(frozen=True)
class Gradients:
    """Mean loss per token, and the gradient of every canonical tensor, float64 on the CPU."""

    loss: float
    of: dict[str, Tensor]


def gradients(
    arch: DecoderConfig, batches: Sequence[MicroBatch], precision: str, device: torch.device, tp: int, sequence: bool
) -> Gradients:
    """What `tp` sharded engines compute together; the backward of each runs in its own thread."""
    meeting = Meeting(tp)

    def rank(index: int) -> tuple[Tensor, TrainEngine]:
        try:
            with torch.autograd.set_multithreading_enabled(False):
                engine = parity_engine(arch, Seat(meeting, tp, index, device), precision, sequence, len(batches))
                return engine.forward_backward(batches), engine
        except BaseException:
            meeting.leave()
            raise

    with ThreadPoolExecutor(tp) as pool:
        results = list(pool.map(rank, range(tp)))
    loss, tokens = sum(counts for counts, _ in results).tolist()
    whole: dict[str, Tensor] = {}
    for _, engine in results:
        collect(engine, whole)
    return Gradients(loss / tokens, whole)


def parity_engine(arch: DecoderConfig, world: World, precision: str, sequence: bool, micros: int) -> TrainEngine:
    """An engine whose weights are the bf16 rounding of the same random numbers at any layout and precision."""
    parallel = ParallelConfig(tp=world.mesh.tp, sequence_parallel=sequence)
    model = build(arch, world, parallel=parallel, dtype=DTYPES[precision], seed=1)
    model.weights.copy_(model.weights.bfloat16())
    return TrainEngine(model, TrainConfig(parallel=parallel, precision=precision, global_batch_size=micros))


def collect(engine: TrainEngine, whole: dict[str, Tensor]) -> None:
    """Put this rank's gradients where they belong in the canonical tensors."""
    for slot in engine.model.slots:
        local = engine.grads[slot.offset : slot.offset + slot.numel].double().cpu().view(slot.param.shape)
        for part in slot.param.parts:
            tensor = whole.setdefault(part.name, torch.full(part.shape, torch.nan, dtype=torch.float64))
            tensor[tuple(slice(*bounds) for bounds in part.box)] = part.view(local)


def worst(found: Gradients, reference: Gradients) -> tuple[float, str]:
    """The largest relative error and whose it is."""
    errors = {name: float((found.of[name] - g).norm() / g.norm()) for name, g in reference.of.items()}
    errors["loss"] = abs(found.loss / reference.loss - 1)
    name = max(errors, key=lambda n: (errors[n] != errors[n], errors[n]))  # NaN first
    return errors[name], name


def parity(device: torch.device, length: int) -> Iterator[dict[str, Any]]:
    """One row per architecture, precision and layout; ours is the worst relative error."""
    for name, arch in PARITY.items():
        batches = [random_batch(arch.vocab_size, 1, length, "cpu", seed) for seed in range(2)]
        reference = gradients(arch, batches, "fp64", torch.device("cpu"), 1, False)
        for precision, tolerance in TOLERANCE.items():
            for tp, sequence in ((1, False), (2, False), (2, True), (4, False), (4, True)):
                found = gradients(arch, batches, precision, device, tp, sequence)
                error, where = worst(found, reference)
                layout = f"tp{tp}" + (" sequence parallel" if sequence else "")
                yield emit(
                    BENCHMARK,
                    f"parity {name} {precision} {layout}",
                    error,
                    unit="worst relative error against CPU float64",
                    details={"of": where, "tolerance": tolerance, "passes": error <= tolerance, "device": device.type},
                )


def random_batch(vocabulary: int, size: int, length: int, device: str | torch.device, seed: int) -> MicroBatch:
    """Uniform tokens, every one of which counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, vocabulary, (size, length + 1), generator=generator).to(device)
    return MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length, device=device))


# --------------------------------------------------------------------------------------------------------------- speed


@dataclass(frozen=True)
class Job:
    """What is timed: `sequences` of `length` tokens a step, one sequence a micro-batch."""

    arch: DecoderConfig
    length: int
    sequences: int
    steps: int


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def gemm_flops(device: torch.device, size: int, rounds: int = 15) -> float:
    """FLOP/s of a square bf16 matrix product of random numbers, median of `rounds`."""
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    times = []
    for _ in range(rounds + 3):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(4):
            a @ b
        synchronize(device)
        times.append((time.perf_counter() - start) / 4)
    return 2.0 * size**3 / statistics.median(times[3:])


def step_seconds(job: Job, config: TrainConfig, device: torch.device) -> tuple[list[float], float]:
    """Seconds of each timed step, and the seconds until the first was done (compilation included)."""
    model = build(job.arch, World.single(device), dtype=DTYPES[config.precision])
    model.weights[: model.decay_end].normal_(0.0, job.arch.initializer_range)  # `initialize` draws on the CPU
    model.weights[model.decay_end :].fill_(1.0)
    start = time.perf_counter()
    engine = TrainEngine(model, config)
    batches = [random_batch(job.arch.vocab_size, 1, job.length, device, seed) for seed in range(job.sequences)]
    times = []
    for step in range(job.steps + 2):
        before = time.perf_counter()
        result = engine.step(batches)
        synchronize(device)
        times.append(time.perf_counter() - before)
        if step == 0:
            first = time.perf_counter() - start
        assert result.skipped is None, f"step {step} was skipped: {result.skipped}"
    return times[2:], first


def train(name: str, job: Job, compiled: bool, device: torch.device, ceiling: float) -> dict[str, Any] | None:
    """The row of one model, with as little recomputation as its memory allows; None if it never fits."""
    for recompute in ("none", "full"):
        config = TrainConfig(
            precision="bf16",
            global_batch_size=job.sequences,
            recompute=RecomputeConfig(mode=recompute),
            compile=compiled,
            steps=1000,
        )
        release(device, compiled)
        try:
            times, first = step_seconds(job, config, device)
        except torch.OutOfMemoryError:
            continue
        return speed_row(name, job, config, times, first, device, ceiling)
    print(f"{name}: out of memory even with full recomputation", file=sys.stderr)
    return None


def release(device: torch.device, compiled: bool) -> None:
    """Forget what earlier cases left on the device, and in the compiler where it is to be used."""
    if compiled:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def speed_row(
    name: str, job: Job, config: TrainConfig, times: list[float], first: float, device: torch.device, ceiling: float
) -> dict[str, Any]:
    seconds = statistics.median(times)
    tokens = job.sequences * job.length / seconds
    rate = tokens * flops_per_token(job.arch, job.length)
    estimate = estimate_memory(job.arch, Mesh(), config, job.length).total / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return emit(
        BENCHMARK,
        f"{name}, sequence {job.length}, bf16 {'compiled' if config.compile else 'eager'}",
        rate / 1e12,
        ceiling / 1e12,
        "bf16 GEMM ceiling",
        unit="TFLOP/s",
        for_information=True,
        details={
            "tokens/s": round(tokens),
            "share of ceiling": f"{rate / ceiling:.1%}",
            "peak GiB": round(peak, 1) if peak == peak else "not known",
            "estimated GiB": round(estimate, 1),
            "step s": round(seconds, 4),
            "slowest s": round(max(times), 4),
            "tokens a step": job.sequences * job.length,
            "recompute": config.recompute.mode,
            "first step s": round(first, 1),
        },
    )


def jobs(size: str) -> dict[str, Job]:
    """The models to time, by name."""
    if size == "toy":
        return {"toy": Job(TOY, 64, 2, 2)}
    eighth = PRESETS["llama3-8b"].replace(num_hidden_layers=8)
    return {
        "Llama-3.2-1B": Job(PRESETS["llama3.2-1b"], 8192, 8, 5),
        "8 layers of Llama-3-8B": Job(eighth, 8192, 8, 5),
    }


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(
        "Parity of the sharded layers on the device, then training speed and memory of real models on one GPU.",
        argv,
        size="full",
        modes="eager,compiled",
    )
    toy = arguments.size == "toy"
    if not toy and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here; `--size toy` runs everything at toy size on the CPU")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(parity(device, 32 if toy else 256))
    ceiling = gemm_flops(device, 256 if toy else 8192)
    for name, job in jobs(arguments.size).items():
        for mode in filter(None, arguments.modes.split(",")):
            row = train(name, job, mode == "compiled", device, ceiling)
            rows += [row] if row else []
    if arguments.output or not toy:
        write_results(arguments.output or ROOT / "benchmarks" / "results" / "gpu_train.md", rows)
    failed = [row["case"] for row in rows if row["details"].get("passes") is False]
    if failed:
        raise SystemExit(f"off by more than the tolerance: {', '.join(failed)}")


if __name__ == "__main__":
    main()
