"""Generation speed on one thread: our engine against vLLM, with `transformers` and our reproducible mode beside them.

Random Llamas of 1M and 25M parameters; 32 random prompt tokens, 128 new ones (a quick run: 32), greedy, past any end:
tokens in, tokens out, no text. Each engine lives in a process of its own, so that thread settings and allocators stay
apart, and all of a model and dtype are up at once; a round goes through them in turn, one computing while the others
wait at a pipe. Every round has other prompts, the same for all. vLLM is measured eager and compiled (a quick run:
eager) without log-probabilities, as is fastest for it, and the best counts; ours reports them, as always.

Floor: a decode step reads every weight once, so weights in bytes over the memory's rate bounds it from below at small
batches; at batch 32 the products' arithmetic does.

    python benchmarks/generate.py [--quick] [--threads 1] [--models 1M,25M]
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from _common import Samples, emit, interleave, parse, write_results

BENCHMARK = "generate"
KV_MB, STEP_TOKENS = 256, 2048  # the same budget for all
QUICK_NEW = 32
Generate = Callable[[list[list[int]], int], object]  # prompts, new tokens


@dataclass(frozen=True)
class Size:
    """A model and what is generated with it; targets: batch -> least ratio, 1 where none is named."""

    name: str
    arch: dict[str, Any]
    batches: tuple[int, ...] = (1, 8, 32)
    prompt: int = 32
    new: int = 128

    def target(self, dtype: str, batch: int) -> float:
        """The ratio the project wants."""
        if self.name == "1M" and batch <= 8:
            return 1.5
        return 0.95 if (self.name, dtype) == ("25M", "fp32") else 1.0


_SHARED = {"rope_theta": 1e4, "max_position_embeddings": 512}
SIZES = (
    Size(
        "1M",
        _SHARED
        | {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
        | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    Size(
        "25M",
        _SHARED
        | {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
        | {"num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
)
TOY = Size(
    "toy",
    _SHARED
    | {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    batches=(1, 3),
    prompt=4,
    new=5,
)


# ------------------------------------------------------------------------------------------- engines, each in a process


def native(path: str, dtype: str, threads: int, batch: int, *, reproducible: bool = False) -> Generate:
    from raytron.config import EngineConfig
    from raytron.inference import Request, SamplingParams
    from raytron.inference.engine import NativeEngine

    config = EngineConfig(
        path=path,
        dtype=dtype,
        max_num_seqs=batch,
        max_batched_tokens=STEP_TOKENS,
        kv_cache_mb=KV_MB,
        threads=threads,
        reproducible=reproducible,
    )
    engine = NativeEngine(config)

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
        for i, prompt in enumerate(prompts):
            engine.add(Request(str(i), tuple(prompt), params))
        made = 0
        while engine.has_unfinished():
            made += sum(len(output.token_ids) for output in engine.step())
        assert made == len(prompts) * new

    return generate


def vllm(path: str, dtype: str, threads: int, batch: int, *, eager: bool = True) -> Generate:
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        skip_tokenizer_init=True,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[dtype],
        max_num_seqs=batch,
        max_num_batched_tokens=STEP_TOKENS,
        max_model_len=512,
        kv_cache_memory_bytes=KV_MB << 20,
        enforce_eager=eager,
        disable_log_stats=True,
    )

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert all(len(output.outputs[0].token_ids) == new for output in outputs)

    return generate


def transformers(path: str, dtype: str, threads: int, batch: int) -> Generate:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=kind, attn_implementation="sdpa").eval()

    def generate(prompts: list[list[int]], new: int) -> None:
        inputs = torch.tensor(prompts)
        with torch.inference_mode():
            made = model.generate(
                inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=new, min_new_tokens=new, do_sample=False
            )
        assert made.shape[1] == inputs.shape[1] + new

    return generate


ENGINES: dict[str, tuple[Callable[..., Generate], dict[str, bool]]] = {
    "native": (native, {}),
    "native reproducible": (native, {"reproducible": True}),
    "vLLM eager": (vllm, {"eager": True}),
    "vLLM compiled": (vllm, {"eager": False}),
    "transformers": (transformers, {}),
}


def serve(pipe: Connection, name: str, path: str, dtype: str, threads: int, batch: int) -> None:
    """A process's life: build the engine, then for each (prompts, new) that comes send the seconds it takes."""
    make, options = ENGINES[name]
    generate = make(path, dtype, threads, batch, **options)
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        start = time.perf_counter()
        generate(*order)
        pipe.send(time.perf_counter() - start)
    pipe.close()
    os._exit(0)  # some engines' threads outlive a normal exit


class Worker:
    """An engine in a process of its own, alive until the end of its `with`."""

    def __init__(self, name: str, path: str, dtype: str, threads: int, batch: int) -> None:
        self.name = name
        self._pipe, theirs = multiprocessing.get_context("spawn").Pipe()
        arguments = (theirs, name, path, dtype, threads, batch)
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        self._receive()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_alive():
            self._pipe.send(None)
        self._process.join()

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError:
            raise RuntimeError(f"the process of {self.name} ended; its output above says why") from None

    def measure(self, prompts: list[list[int]], new: int) -> float:
        """Seconds it takes to continue all prompts by `new` tokens."""
        self._pipe.send((prompts, new))
        return self._receive()


# --------------------------------------------------------------------------------------------------------- measurements


@contextmanager
def environment(threads: int) -> Iterator[None]:
    """What the engines' processes find in their environment."""
    kept = dict(os.environ)
    os.environ |= {
        "OMP_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONWARNINGS": "ignore",
        "HF_HUB_OFFLINE": "1",
    }
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= kept


def make_model(size: Size, folder: str) -> str:
    from raytron.checkpoint import save_pretrained
    from raytron.models import build
    from raytron.models.arch import DecoderConfig

    path = f"{folder}/{size.name}"
    save_pretrained(build(DecoderConfig(**size.arch), seed=0), path)
    return path


def prompts_of(size: Size, batch: int) -> Iterator[list[list[int]]]:
    """Batches of random prompts, the same sequence of them whenever it is asked for."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    while True:
        shape = (batch, size.prompt)
        yield torch.randint(1, size.arch["vocab_size"], shape, generator=generator).tolist()


def timer(worker: Worker, size: Size, batch: int) -> Callable[[], float]:
    """A measurement of one engine: seconds for the next batch of prompts."""
    prompts = prompts_of(size, batch)
    worker.measure(next(prompts), min(size.new, 24))  # warm up at this batch
    return lambda: worker.measure(next(prompts), size.new)


def engines(arguments: Any) -> list[str]:
    found = list(ENGINES)
    if find_spec("vllm") is None:
        print("vLLM is not installed: rows have no ratio", file=sys.stderr)
        found = [name for name in found if not name.startswith("vLLM")]
    if arguments.size == "toy" or arguments.quick:
        found = [name for name in found if name != "vLLM compiled"]
    return found


def measure(size: Size, dtype: str, path: str, arguments: Any) -> Iterator[dict[str, Any]]:
    """Rows of one model and dtype: against vLLM, and for information against transformers and our other mode."""
    most = max(size.batches)
    with environment(arguments.threads), ExitStack() as stack:
        made = [Worker(name, path, dtype, arguments.threads, most) for name in engines(arguments)]
        workers = [stack.enter_context(worker) for worker in made]
        for batch in size.batches:
            main = {w.name: timer(w, size, batch) for w in workers if w.name == "native" or w.name.startswith("vLLM")}
            rounds = 1 if arguments.size == "toy" else 2 if arguments.quick else 7
            if rounds == 7 and sum(time_once() for time_once in main.values()) > 20:  # theirs, emulating bf16
                rounds = 3
            taken = interleave(main, rounds)
            yield from rows_of(size, dtype, batch, taken, arguments)
            if (
                batch == size.batches[1]
            ):  # theirs takes minutes a round in bf16 where the processor has no such instructions
                beside = {w.name: timer(w, size, batch) for w in workers if not w.name.startswith("vLLM")}
                yield from information(size, dtype, batch, interleave(beside, 1 if arguments.quick else 3))


def rows_of(size: Size, dtype: str, batch: int, taken: dict[str, Samples], arguments: Any) -> Iterator[dict[str, Any]]:
    rates = {name: batch * size.new / samples.median for name, samples in taken.items()}
    best = max((name for name in rates if name != "native"), key=rates.__getitem__, default=None)
    yield emit(
        BENCHMARK,
        f"{size.name}-{dtype}-b{batch}",
        rates["native"],
        rates.get(best),
        best,
        unit="tokens/s",
        details={
            "target": size.target(dtype, batch),
            "spread": " / ".join(f"{taken[name].spread:.1%}" for name in ("native", best) if name),
            "rounds": len(taken["native"].values),
            "new tokens": size.new,
            "threads": arguments.threads,
            "others cpu": round(arguments.others_cpu, 2),
            **{name: round(rate) for name, rate in rates.items()},
        },
    )


def information(size: Size, dtype: str, batch: int, taken: dict[str, Samples]) -> Iterator[dict[str, Any]]:
    """Rows without a target: our fast mode against `transformers.generate`, and reproducible mode against fast."""
    rates = {name: batch * size.new / samples.median for name, samples in taken.items()}
    case = f"{size.name}-{dtype}-b{batch}"
    pairs = (("transformers", "native", "transformers"), ("reproducible", "native reproducible", "native"))
    for what, mine, peer in pairs:
        details = {"times": round(rates[mine] / rates[peer], 2)}
        yield emit(
            BENCHMARK,
            f"{case}-{what}",
            rates[mine],
            rates[peer],
            peer,
            unit="tokens/s",
            for_information=True,
            details=details,
        )


def sizes_of(arguments: Any) -> list[Size]:
    """The models to measure; a quick run makes fewer new tokens."""
    if arguments.size == "toy":
        return [TOY]
    sizes = [size for size in SIZES if size.name in arguments.models.split(",")]
    return [replace(size, new=QUICK_NEW) for size in sizes] if arguments.quick else sizes


def main() -> None:
    arguments = parse(__doc__.splitlines()[0], threads=1, size="full", models="1M,25M")
    rows = []
    with tempfile.TemporaryDirectory(prefix="raytron-generate-") as folder:
        for size in sizes_of(arguments):
            path = make_model(size, folder)
            for dtype in ("fp32", "bf16"):
                rows += measure(size, dtype, path, arguments)
    if arguments.output or not (arguments.quick or arguments.size == "toy"):
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()
