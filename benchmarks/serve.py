"""Serving over HTTP: our application against vLLM's own OpenAI server, and what HTTP and Ray cost over the engine.

A random Llama, one thread an engine, the same cache, batch and step budget; prompts of random words, answers that go on
past any end. Each server is a process (ours: several) and up all the time; a round sends the same load to each in turn,
first all at once (requests a second at saturation), then as a Poisson stream at a third of what the slowest can do
(TTFT, TPOT). The load comes from this process, and counts tokens, not chunks (raytron/serving/bench.py).

    raytron   `raytron serve`: HTTP ingress, Ray, engine replica
    vLLM      python -m vllm.entrypoints.openai.api_server, eager
    http      our HTTP over an engine in the same process
    direct    the engine in its loop, the load made in the same process

http above direct is what HTTP costs, raytron above http what Ray does.

    python benchmarks/serve.py [--quick] [--models 1M,25M] [--dtype bf16]     (quick: 1M alone)
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from _common import ROOT, emit, interleave, parse, write_results

BENCHMARK = "serve"
KV_MB, STEP_TOKENS, MOST, CONTEXT = 256, 1024, 32, 512  # the same budget for all
START_S = 300.0
REQUESTS = {"1M": 96, "25M": 48}  # of a round; those of the larger model take seconds each
SIZES: dict[str, dict[str, int]] = {
    "toy": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    | {"num_attention_heads": 1, "num_key_value_heads": 1},
    "1M": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4}
    | {"num_attention_heads": 4, "num_key_value_heads": 2},
    "25M": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
}


def make_model(name: str, folder: str) -> str:
    """A Hugging Face directory: random weights, and a tokenizer trained on our own source."""
    from raytron.checkpoint import save_pretrained
    from raytron.data.tokenizer import train_bpe
    from raytron.models import build
    from raytron.models.arch import DecoderConfig

    tokenizer = train_bpe((path.read_text() for path in sorted(ROOT.glob("raytron/**/*.py"))), 4096)
    arch = DecoderConfig(
        vocab_size=tokenizer.vocab_size, max_position_embeddings=CONTEXT, rope_theta=1e4, **SIZES[name]
    )
    path = f"{folder}/{name}"
    save_pretrained(build(arch, seed=0), path, tokenizer=tokenizer)
    return path


# -------------------------------------------------------------------------------------------------------------- servers


def ours(path: str, dtype: str, port: int) -> list[str]:
    """The command of our application."""
    options = {"--port": port, "--dtype": dtype, "--threads": 1, "--max-queue": 10_000, "--max-model-len": CONTEXT}
    options |= {"--max-num-seqs": MOST, "--kv-cache-mb": KV_MB}
    flags = [str(part) for pair in options.items() for part in pair]
    return [sys.executable, "-m", "raytron.cli", "serve", f"m={path}", *flags]


def http_alone(path: str, dtype: str, port: int) -> list[str]:
    """The command of our HTTP application over an engine in its own process."""
    return [sys.executable, __file__, "--as", "http", path, dtype, str(port)]


def vllm(path: str, dtype: str, port: int) -> list[str]:
    """The command of vLLM's own server."""
    options = {
        "--model": path,
        "--served-model-name": "m",
        "--host": "127.0.0.1",
        "--port": port,
        "--dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "--max-model-len": CONTEXT,
        "--max-num-seqs": MOST,
        "--max-num-batched-tokens": STEP_TOKENS,
        "--kv-cache-memory-bytes": KV_MB << 20,
    }
    flags = [str(part) for pair in options.items() for part in pair]
    flags += ["--enforce-eager", "--disable-uvicorn-access-log", "--disable-log-stats"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]


def engine_loop(path: str, dtype: str) -> Any:
    from raytron.config import EngineConfig
    from raytron.inference import EngineLoop, make_engine

    config = EngineConfig(
        path=path,
        dtype=dtype,
        max_model_len=CONTEXT,
        max_num_seqs=MOST,
        max_batched_tokens=STEP_TOKENS,
        kv_cache_mb=KV_MB,
        threads=1,
    )
    return EngineLoop(make_engine(config), max_queue=10_000)


def serve_http(path: str, dtype: str, port: int) -> None:
    """Our server's life."""
    from raytron.config import ServeConfig
    from raytron.serving import LocalBackend, create_app, run

    config = ServeConfig(port=port)
    run(create_app(LocalBackend({"m": (engine_loop(path, dtype), path)}), config), config)


def serve_direct(path: str, dtype: str) -> None:
    """The engine without HTTP: for every load that comes on standard input, the requests' times on standard output."""
    import json

    from raytron.serving.bench import Load
    from raytron.serving.text import Text

    loop, text = engine_loop(path, dtype), Text(path)
    print("ready", flush=True)
    for line in sys.stdin:
        fields = json.loads(line)
        load = Load(**{**fields, "rate": fields["rate"] or float("inf")})
        print(json.dumps(asyncio.run(direct(loop, text, load))), flush=True)
    loop.close()


async def direct(loop: Any, text: Any, load: Any) -> list[dict[str, Any]]:
    from raytron.inference import Request, SamplingParams
    from raytron.serving.bench import Measured, arrivals, bodies

    params = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True)
    begun = time.perf_counter()

    async def ask(number: int, body: dict[str, Any], due: float) -> Measured:
        await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
        found, tokens = Measured(due=due, sent=time.perf_counter() - begun), 0
        request = Request(str(number), tuple(await text.encode(body["prompt"])), params)
        found.prompt_tokens = len(request.prompt_token_ids)
        async for outputs in loop.generate(request):
            tokens += sum(len(output.token_ids) for output in outputs)
            found.arrivals.append((time.perf_counter() - begun, tokens))
        return found

    due = arrivals(load)
    sent = (ask(number, body, at) for number, (body, at) in enumerate(zip(bodies(load), due, strict=False)))
    return [vars(one) for one in await asyncio.gather(*sent)]


class Server:
    """A server in a process of its own, which ends with its `with`."""

    def __init__(self, command: Callable[[str, str, int], list[str]], path: str, dtype: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.url, self._log = f"http://127.0.0.1:{port}", tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as it
        arguments = command(path, dtype, port)
        self._process = subprocess.Popen(arguments, env=environment(), stdout=self._log, stderr=self._log)

    def __enter__(self) -> Server:
        deadline = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._log.seek(0)
                raise RuntimeError(f"{self.url} did not come up:\n{self._log.read().decode()[-3000:]}")
            time.sleep(0.2)
        return self

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.url}/health", timeout=5).status == 200
        except (urllib.error.URLError, OSError):
            return False

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def send(self, load: Any) -> list[Any]:
        """The load's requests, measured."""
        from raytron.serving.bench import measure

        return asyncio.run(measure(replace(load, url=f"{self.url}/v1", model="m")))


class Direct:
    """The engine without HTTP, in a process of its own."""

    def __init__(self, path: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--as", "direct", path, dtype, "0"]
        self._process = subprocess.Popen(
            command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> Direct:
        assert self._process.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)

    def send(self, load: Any) -> list[Any]:
        """The load's requests, measured."""
        import json

        from raytron.serving.bench import Measured

        fields = {**vars(load), "rate": None if load.rate == float("inf") else load.rate}
        self._process.stdin.write(json.dumps(fields) + "\n")
        self._process.stdin.flush()
        return [Measured(**one) for one in json.loads(self._process.stdout.readline())]


def environment() -> dict[str, str]:
    """What all servers find in theirs."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


# --------------------------------------------------------------------------------------------------------- measurements


def figures(server: Any, load: Any) -> dict[str, float]:
    """TTFT p50 and p99 and TPOT p50 in ms, and requests a second, of one run of the load."""
    from raytron.serving.bench import summary

    found = summary(load, server.send(load))
    if found["failed"]:
        raise RuntimeError(f"{found['failed']} requests failed: {found['errors']}")
    ttft, tpot = found["ttft_ms"], found["tpot_ms"]
    return {"ttft-p50": ttft["p50"], "ttft-p99": ttft["p99"], "tpot": tpot["p50"], "rate": found["requests_per_s"]}


def run_rounds(servers: dict[str, Any], load: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """figure -> server -> its values, one a round; every round has other prompts, the same for all."""
    taken: dict[str, dict[str, list[float]]] = {}

    def once(name: str) -> Callable[[], float]:
        count = iter(range(10_000))

        def measure() -> float:
            for figure, value in figures(servers[name], replace(load, seed=next(count))).items():
                taken.setdefault(figure, {}).setdefault(name, []).append(value)
            return 0.0

        return measure

    interleave({name: once(name) for name in servers}, rounds)
    return taken


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def measure(name: str, dtype: str, path: str, arguments: Any) -> Iterator[dict[str, Any]]:
    """Rows of one model."""
    from raytron.serving.bench import Load

    toy = name == "toy"
    rounds, requests = (1, 4) if toy else (2, 24) if arguments.quick else (3, REQUESTS[name])
    load = Load(requests=requests, input_tokens=60, output_tokens=8 if toy else 48, options={"temperature": 0.0})
    with ExitStack() as stack:
        servers: dict[str, Any] = {"raytron": Server(ours, path, dtype)}
        if find_spec("vllm") is not None and not toy:
            servers["vLLM"] = Server(vllm, path, dtype)
        servers["http"] = Server(http_alone, path, dtype)
        servers["direct"] = Direct(path, dtype)
        for server in servers.values():
            stack.enter_context(server)
        for server in servers.values():  # warm up
            server.send(replace(load, requests=4, seed=99))
        full = run_rounds({n: s for n, s in servers.items() if n in ("raytron", "vLLM")}, load, rounds)
        rate = min(median(values) for values in full["rate"].values()) / 3
        calm = run_rounds(servers, replace(load, rate=rate), rounds)
    yield from rows_of(f"{name}-{dtype}", calm, full, rate, arguments)


def rows_of(case: str, calm: dict, full: dict, rate: float, arguments: Any) -> Iterator[dict[str, Any]]:
    details = {"others cpu": round(arguments.others_cpu, 2)}
    sent = details | {"requests/s sent": round(rate, 2)}
    for figure, runs, unit in (
        ("ttft-p50", calm, "ms"),
        ("ttft-p99", calm, "ms"),
        ("tpot", calm, "ms"),
        ("rate", full, "requests/s"),
    ):
        values = {name: median(taken) for name, taken in runs[figure].items()}
        yield emit(
            BENCHMARK,
            f"{case}-{'saturation' if figure == 'rate' else figure}",
            values["raytron"],
            values.get("vLLM"),
            "vLLM's server" if "vLLM" in values else None,
            unit=unit,
            higher_is_better=figure == "rate",
            details=(details if figure == "rate" else sent) | {"rounds": len(runs[figure]["raytron"])},
        )
    for what, ours, peer in (("http", "http", "direct"), ("ray", "raytron", "http")):
        for figure, target in (("ttft-p50", "under 5 ms"), ("tpot", "under 5 %")):
            mine, bare = median(calm[figure][ours]), median(calm[figure][peer])
            added = {"added ms": round(mine - bare, 3), "added": f"{mine / bare - 1:.1%}", "target, both": target}
            yield emit(
                BENCHMARK,
                f"{case}-{what}-{figure}",
                mine,
                bare,
                peer,
                unit="ms",
                higher_is_better=False,
                for_information=True,
                details=sent | added,
            )


def main() -> None:
    if sys.argv[1:2] == ["--as"]:
        _, kind, path, dtype, port = sys.argv[1:]
        serve_http(path, dtype, int(port)) if kind == "http" else serve_direct(path, dtype)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the servers end too
    arguments = parse(__doc__.splitlines()[0], models="", dtype="bf16")
    arguments.models = arguments.models or ("1M" if arguments.quick else "1M,25M")
    rows = []
    with tempfile.TemporaryDirectory(prefix="raytron-serve-") as folder:
        for name in arguments.models.split(","):
            rows += measure(name, arguments.dtype, make_model(name, folder), arguments)
    if arguments.output or not (arguments.quick or arguments.models == "toy"):
        write_results(arguments.output or Path(__file__).parent / "results" / f"{BENCHMARK}.md", rows)


if __name__ == "__main__":
    main()
