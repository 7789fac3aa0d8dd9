"""How fast a trainer's weights reach the engines of its node, against a plain copy of the same bytes.

One trainer rank in an actor, one engine in another, as in a run on one node: the trainer writes into shared memory, the
engine copies out of it, both sum every tensor up, and the engine's sums are held against the trainer's. *full*: every
weight has changed. *delta*: a hundredth has, the rest is left as it is. The peer is torch's copy of as many bytes from
one buffer to another, with all cores. For vLLM the peer is its own reload of the same directory, without
pushing anything; it writes its weights into packed matrices, which is nearly all of the time.

Floor of a full push: four passes over the bytes (the trainer reads and writes, past the cache, and so does the engine),
where a copy makes three (it reads what it overwrites): 0.75 of a copy's rate on shared cores. Of a delta, three: 1.0.
A core of an EPYC (Zen 4) copies and sums up 103 MB in 6 ms at best, 17 GB/s: a full push of 25M in fp32 is 12 ms of one
core, 6 ms of two; two calls of Ray under way at once add 2 to 3 ms, whatever the size.

    python benchmarks/weight_sync.py [--quick]
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import Samples, emit, interleave, parse, write_results

BENCHMARK = "weight_sync"
ARCHS: dict[str, dict[str, Any]] = {
    "toy": {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "25M": {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    "200M": {"vocab_size": 16384, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 14}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
}
SHARED = {"rope_theta": 1e4, "max_position_embeddings": 512}


class Rank:
    """The trainer's one rank: a model, and what a push asks of it."""

    def __init__(self, world: Any, path: str, dtype: str) -> None:
        import torch

        from raytron.checkpoint.publisher import Publisher
        from raytron.models import build, read_arch

        self.model = build(read_arch(path), world, dtype=getattr(torch, dtype)).initialize(0)
        self._publisher = Publisher(self.model)

    def change(self, sparse: bool) -> None:
        """Other weights, all of them or those of few tensors."""
        weights = self.model.weights
        (weights[: len(weights) // 100] if sparse else weights).mul_(-1)

    def connect_publisher(self, *args: Any) -> Any:
        return self._publisher.connect(*args)

    def publish(self, *args: Any) -> Any:
        return self._publisher.publish(*args)

    def outgoing(self, *args: Any) -> Any:
        return self._publisher.outgoing(*args)


def make_model(name: str, folder: str) -> str:
    from raytron.checkpoint import save_pretrained
    from raytron.models import build
    from raytron.models.arch import DecoderConfig

    path = f"{folder}/{name}"
    save_pretrained(build(DecoderConfig(**SHARED, **ARCHS[name]), seed=0), path)
    return path


def copies(nbytes: int, threads: int) -> Callable[[], float]:
    """A measurement: seconds of torch's own copy of as many bytes, between buffers that lie there already."""
    import torch

    source, to = torch.ones(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def measure() -> float:
        torch.set_num_threads(threads)
        start = time.perf_counter()
        to.copy_(source)
        return time.perf_counter() - start

    measure()
    return measure


class Bench:
    """A trainer, a rollout group of one engine, and a loop to push on."""

    def __init__(self, path: str, dtype: str, engine: str, cores: int) -> None:
        from raytron.actors import ActorGroup
        from raytron.config import EngineConfig
        from raytron.parallel import Mesh

        self._loop = asyncio.new_event_loop()
        self._trainer = ActorGroup(Mesh(), {"CPU": 1}, threads=cores)
        self._trainer.create(Rank, path, {"fp32": "float32", "bf16": "bfloat16"}[dtype])
        awaits = "await" if engine == "native" else "read"
        config = EngineConfig(path=path, dtype=dtype, engine=engine, kv_cache_mb=16, threads=cores, weights=awaits)
        self._run(self._start(config))
        self.version, self.nbytes = 0, 0

    async def _start(self, config: Any) -> None:
        from raytron.actors import RolloutGroup, WeightSync

        self._group = await RolloutGroup([config], {"CPU": 1}).start()
        self._sync = WeightSync(self._group, self._trainer)

    def _run(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    def push(self, sparse: bool, delta: bool) -> float:
        """Seconds of a push of weights that have changed before."""
        self._trainer.call("change", sparse)
        self.version += 1
        report = self._run(self._sync.push(self.version, delta=delta))
        self.nbytes, self.parts = report.nbytes, report.seconds
        return report.seconds["total"]

    def reload(self, path: str) -> float:
        """Seconds in which the engine takes a directory in by itself."""
        start = time.perf_counter()
        self.version += 1
        self._run(self._group.call(0, "update", path, "keep", self.version))
        return time.perf_counter() - start

    def close(self) -> None:
        self._run(self._sync.close())
        self._run(self._group.close())
        self._trainer.shutdown()


def native(name: str, path: str, dtype: str, arguments: Any, cores: int) -> list[dict[str, Any]]:
    """Full and delta pushes to a native engine."""
    bench = Bench(path, dtype, "native", cores)
    try:
        bench.push(False, False)  # plans, and shares memory
        bench.push(False, False)
        parts: dict[str, Mapping[str, float]] = {}

        def pushing(case: str, *how: bool) -> Callable[[], float]:
            def measure() -> float:
                taken = bench.push(*how)
                parts[case] = bench.parts
                return taken

            return measure

        cases = {"full": pushing("full", False, False), "delta": pushing("delta", True, True)}
        cases |= {f"copy-{n}": copies(bench.nbytes, n) for n in {1, cores}}
        taken = interleave(cases, 1 if arguments.size == "toy" else 5 if arguments.quick else 15)
        peer = min((case for case in taken if case.startswith("copy")), key=lambda case: taken[case].median)
        return [
            rate_row(f"{name}-{dtype}-{case}", bench.nbytes, taken[case], taken[peer], parts[case], arguments)
            for case in ("full", "delta")
        ]
    finally:
        bench.close()


def rate_row(
    case: str, nbytes: int, ours: Samples, copy: Samples, parts: Mapping[str, float], arguments: Any
) -> dict[str, Any]:
    details = {"target": 0.5, "MB": round(nbytes / 1e6), "ms": round(1e3 * ours.median, 1)}
    details |= {part: f"{1e3 * parts[part]:.1f} ms" for part in ("publish", "update")}
    details |= {"spread": f"{ours.spread:.1%} / {copy.spread:.1%}", "others cpu": round(arguments.others_cpu, 2)}
    gb = nbytes / 1e9
    return emit(BENCHMARK, case, gb / ours.median, gb / copy.median, "torch's copy", unit="GB/s", details=details)


def vllm(name: str, path: str, dtype: str, arguments: Any, cores: int) -> dict[str, Any]:
    """A push to vLLM, against its reload of a directory that is there already."""
    bench = Bench(path, dtype, "vllm", cores)
    try:
        bench.push(False, False)
        cases = {"push": lambda: bench.push(False, False), "reload": lambda: bench.reload(path)}
        taken = interleave(cases, 1 if arguments.size == "toy" else 3 if arguments.quick else 7)
    finally:
        bench.close()
    mine, theirs = taken["push"], taken["reload"]
    details = {"target": 0.8, "MB": round(bench.nbytes / 1e6), "spread": f"{mine.spread:.1%} / {theirs.spread:.1%}"}
    return emit(
        BENCHMARK,
        f"{name}-{dtype}-vllm",
        mine.median,
        theirs.median,
        "vLLM's reload alone",
        unit="s",
        higher_is_better=False,
        details=details | {"others cpu": round(arguments.others_cpu, 2)},
    )


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], size="full")
    os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    from raytron.actors import Session

    sizes = ["toy"] if arguments.size == "toy" else ["25M"] if arguments.quick else ["25M", "200M"]
    cores, rows = os.cpu_count() or 1, []
    with tempfile.TemporaryDirectory(prefix="raytron-weight-sync-") as folder, Session(4):
        for name in sizes:
            path = make_model(name, folder)
            for dtype in ("fp32", "bf16"):
                rows += native(name, path, dtype, arguments, cores)
        if find_spec("vllm") is not None and arguments.size != "toy":
            rows.append(vllm(sizes[0], f"{folder}/{sizes[0]}", "fp32", arguments, cores))
    if arguments.output or not (arguments.quick or arguments.size == "toy"):
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()
