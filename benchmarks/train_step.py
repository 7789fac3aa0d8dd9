"""Training speed of one process: our step against the same model in `transformers`, same optimizer and batch.

Both do a whole step: forward, loss, backward, clipping of the global norm, fused AdamW. Theirs is measured every way a
user could run it (sdpa and plain attention, eager and compiled; in bf16 both autocast and bf16 weights) and the best
counts; ours eager and compiled, the best counts. All variants of a case take turns, a step a round. A precision whose
plain step (eager, sdpa) takes them over 20 times our best is left at that one step: no compiler makes that up, and on a
processor without bf16 instructions a bf16 step of theirs takes minutes.

Floor: 6 FLOPs per weight in a matrix product and token, plus causal attention, at the rate of a large matrix product
measured in the same run (`share of peak` says how near we are); AdamW reads and writes 28 bytes a parameter.

    python benchmarks/train_step.py [--quick] [--threads 2] [--case "25M bf16"]
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from _common import Samples, emit, interleave, parse, seconds, write_results

from raytron.config import OptimizerConfig, ScheduleConfig, TrainConfig
from raytron.data.loader import MicroBatch
from raytron.models import build
from raytron.models.arch import DecoderConfig
from raytron.precision import linear
from raytron.training import DTYPES, TrainEngine
from raytron.training.memory import flops_per_token

BENCHMARK = "train_step"
Step = Callable[[], object]
_SHARED = {"vocab_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024}
SHAPES = {  # name -> architecture, sequence length, batch
    "6L-h256": (
        DecoderConfig(hidden_size=256, num_hidden_layers=6, intermediate_size=704, rope_theta=1e4, **_SHARED),
        256,
        8,
    ),
    "25M": (
        DecoderConfig(hidden_size=512, num_hidden_layers=8, intermediate_size=1408, rope_theta=1e4, **_SHARED),
        512,
        4,
    ),
}


def ours(arch: DecoderConfig, batch: MicroBatch, precision: str, compiled: bool) -> Step:
    size = batch.tokens_BS.shape[0]
    config = TrainConfig(
        precision=precision,
        global_batch_size=size,
        micro_batch_size=size,
        compile=compiled,
        optimizer=OptimizerConfig(lr=1e-4, min_lr=0.0, beta2=0.999, weight_decay=0.01, clip_grad=1.0),
        schedule=ScheduleConfig(kind="constant"),
    )
    engine = TrainEngine(build(arch, dtype=DTYPES[precision], seed=0), config)
    return lambda: engine.step([batch])


def theirs(arch: DecoderConfig, batch: MicroBatch, precision: str, attention: str, compiled: bool) -> Step:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = arch.to_hf()
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01, fused=True)
    run = torch.compile(model, dynamic=False) if compiled else model

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-amp"):
            loss = run(input_ids=batch.tokens_BS, labels=batch.tokens_BS, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def variants(arch: DecoderConfig, batch: MicroBatch, family: str, quick: bool) -> dict[str, Callable[[], Step]]:
    """Everything to measure for "fp32" or "bf16", ours first; a quick run compiles nothing of theirs but fp32 sdpa."""
    precisions = ("fp32",) if family == "fp32" else ("bf16", "bf16-amp")
    makers: dict[str, Callable[[], Step]] = {}
    for precision, compiled in itertools.product(precisions, (False, True)):
        if not (compiled and precision == "bf16-amp"):  # its products become the compiler's, emulated without bf16
            makers[f"ours {precision} {_how(compiled)}"] = partial(ours, arch, batch, precision, compiled)
    for precision, compiled, attention in itertools.product(precisions, (False, True), ("sdpa", "eager")):
        if not (quick and compiled and (attention == "eager" or family == "bf16")):
            name = f"transformers {precision} {_how(compiled)} {attention} attention"
            makers[name] = partial(theirs, arch, batch, precision, attention, compiled)
    return makers


def _how(compiled: bool) -> str:
    return "compiled" if compiled else "eager"


def warmed(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, Samples]]:
    """The steps, warm, and those that were given up after one, with what it took."""
    steps: dict[str, Step] = {}
    slow: dict[str, Samples] = {}
    best = math.inf
    for name, make in makers.items():
        who, precision, how, *_ = name.split()
        if any(other.split()[:2] == [who, precision] for other in slow):
            continue
        step = make()
        first = seconds(step)()
        if how == "eager" and first > 20 * best:  # a compiled one's first step is the compiler's
            slow[name] = Samples((first,))
            continue
        steps[name] = step
        again = seconds(step)()
        best = min(best, again) if who == "ours" else best
    return steps, slow


def peak(family: str) -> float:
    """FLOP/s of a 1,024-square product as the layers compute it."""
    a = torch.randn(1024, 1024).to(torch.bfloat16 if family == "bf16" else torch.float32)
    linear(a, a)
    return 2 * 1024**3 / min(seconds(lambda: linear(a, a))() for _ in range(20))


def measure(shape: str, family: str, quick: bool, others_cpu: float) -> dict:
    arch, length, size = SHAPES[shape]
    torch.manual_seed(0)
    tokens = torch.randint(0, arch.vocab_size, (size, length + 1))
    batch = MicroBatch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), torch.ones(size, length))
    start = time.perf_counter()
    steps, slow = warmed(variants(arch, batch, family, quick))
    warm_up = time.perf_counter() - start
    taken = slow | interleave({name: seconds(step) for name, step in steps.items()}, 5 if quick else 7)
    mine, best = _best(taken, "ours"), _best(taken, "transformers")
    rate = size * length / taken[mine].median
    return emit(
        BENCHMARK,
        f"{shape} {family}",
        rate,
        size * length / taken[best].median,
        best,
        unit="tokens/s",
        details={
            "variant": mine,
            "spread": round(taken[mine].spread, 3),
            "share of peak": round(rate * flops_per_token(arch, length) / peak(family), 3),
            "threads": torch.get_num_threads(),
            "warm-up s": round(warm_up),
            "others cpu": round(others_cpu, 2),
            **{name: round(size * length / samples.median, 1) for name, samples in taken.items()},
        },
    )


def _best(taken: dict[str, Samples], who: str) -> str:
    return min((name for name in taken if name.startswith(who)), key=lambda name: taken[name].median)


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], threads=2, case="")
    torch.set_num_threads(arguments.threads)
    shapes = ["6L-h256"] if arguments.quick else list(SHAPES)
    cases = [(shape, family) for shape in shapes for family in ("fp32", "bf16")]
    chosen = [(shape, family) for shape, family in cases if arguments.case in f"{shape} {family}"]
    rows = [measure(shape, family, arguments.quick, arguments.others_cpu) for shape, family in chosen]
    if arguments.output or not (arguments.quick or arguments.case):
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()
