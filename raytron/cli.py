"""The `raytron` command: what one does to data, models and live runs. Runs themselves are recipes.

Every command is a light dataclass, its fields the command line and `run` the work, so that parsing needs tyro alone and
`--help` is instant; torch, numpy and ray are imported by the work. Click and argparse would say every option twice,
once for the command line and once for the function behind it.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro
from tyro.conf import FlagCreatePairsOff, Positional, PositionalMetavarFromFieldName

from raytron.config import DataConfig, EngineConfig, ReplicaConfig, ServeConfig, report_error

if TYPE_CHECKING:
    from raytron.data import BlendedDataset, GPTDataset, MicroBatch, Tokenizer
    from raytron.models.base import ShardedModel

__all__ = [
    "Bench",
    "Chaos",
    "Chat",
    "Convert",
    "Eval",
    "Generate",
    "Models",
    "Preprocess",
    "Reshape",
    "Scale",
    "Serve",
    "Status",
    "main",
    "parse",
]


@dataclass(frozen=True)
class Preprocess:
    """Turn text into token files, PREFIX.bin and PREFIX.idx in Megatron's format, on all cores."""

    inputs: Positional[tuple[str, ...]]
    """.txt, .md, .jsonl or .parquet files, or folders of them."""
    output: str
    """PREFIX of the files to write; the tokenizer is kept beside them, in PREFIX-tokenizer."""
    tokenizer: str
    """byte | null:VOCAB | bpe:VOCAB (trained on the text) | a Hugging Face directory or tokenizer.json."""
    json_key: str = "text"
    """Key of a JSONL line, or column of a Parquet file, that holds the text."""
    text_documents: Literal["file", "paragraph", "line"] = "file"
    """What is one document in a text file."""
    no_eod: bool = False
    """Don't append the end-of-document token to documents."""
    workers: int | None = None
    """Tokenising processes; by default one per core, fewer for little text."""
    quiet: bool = False
    """Show no progress bar."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ValueError("no INPUTS; name text, JSONL or Parquet files, or folders of them")

    def run(self) -> None:
        """Write the files and say what is in them."""
        from raytron.data import preprocess

        tokenizer = self._tokenizer()
        summary = preprocess(
            self.inputs,
            self.output,
            tokenizer,
            json_key=self.json_key,
            workers=self.workers,
            append_eod=not self.no_eod,
            progress=not self.quiet,
            text_documents=self.text_documents,
        )
        tokenizer.save(f"{self.output}-tokenizer")
        skipped = f" ({summary.empty_documents:,} empty ones skipped)" if summary.empty_documents else ""
        print(
            f"{summary.documents:,} documents{skipped}, {summary.tokens:,} tokens of a vocabulary of "
            f"{summary.vocab_size:,}, from {summary.bytes_read / 1e6:,.1f} MB in {summary.seconds:.1f} s\n"
            f"use with: --data.path {self.output} --data.tokenizer {self.output}-tokenizer"
        )

    def _tokenizer(self) -> Tokenizer:
        from raytron.data import load_tokenizer
        from raytron.data.build import train_tokenizer
        from raytron.data.corpus import find_files
        from raytron.data.tokenizer import vocabulary_of

        if not self.tokenizer.startswith("bpe:"):
            return load_tokenizer(self.tokenizer)
        return train_tokenizer(find_files(self.inputs), vocabulary_of(self.tokenizer), self.json_key)


@dataclass(frozen=True)
class Models:
    """List the presets that `--model.preset` takes, with what is in them."""

    json: bool = False
    """Print JSON, one list, instead of a table."""

    def run(self) -> None:
        """Print the presets."""
        from raytron.models import PRESETS

        rows = [_preset(name, arch) for name, arch in PRESETS.items()]
        print(json.dumps(rows, indent=2)) if self.json else _print_table(rows)


@dataclass(frozen=True)
class Convert:
    """Copy a Hugging Face model with another dtype or other file sizes, streaming; everything else stays as it is."""

    source: Positional[str]
    """Hugging Face directory, checkpoint (.../step_00000100) or run (runs/NAME: its newest checkpoint)."""
    target: Positional[str]
    """Directory to write; appears when it is whole."""
    dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Of the stored weights; by default as they are."""
    shard_mb: float = 5000.0
    """Largest size of one file, in MB."""

    def run(self) -> None:
        """Write the target and say what it weighs."""
        from raytron.checkpoint import Storage, convert

        dtype = None if self.dtype is None else _torch_dtype(self.dtype)
        convert(model_directory(self.source), self.target, dtype=dtype, shard_mb=self.shard_mb)
        sizes = [n for path, n in Storage.open(self.target).files().items() if path.endswith(".safetensors")]
        print(f"{self.target}: {sum(sizes) / 1e6:,.1f} MB in {len(sizes)} weight file{'s' * (len(sizes) != 1)}")


@dataclass(frozen=True)
class Eval:
    """Measure a model's loss on text it was not trained on: nats per token, and perplexity. One process."""

    model: Positional[str]
    """Hugging Face directory, checkpoint (.../step_00000100) or run (runs/NAME: its newest checkpoint)."""
    data: Positional[str]
    """Text, JSONL, Parquet, a folder of them, or the prefix of a .bin/.idx pair."""
    tokenizer: str | None = None
    """byte | null:VOCAB | a Hugging Face directory or tokenizer.json; by default the model's own."""
    split: str = "0,1,0"
    """Weights of the train, validation and test parts; the validation part is evaluated, by default everything."""
    samples: int | None = None
    """How many samples to evaluate, by default each one once. With the split, sequence length and seed of a run, and
    its evaluation.batches x global_batch_size samples, the result is the run's own held-out loss."""
    sequence_length: int | None = None
    """Tokens of a sample; by default 1024, or as many as the model can take."""
    batch_size: int = 4
    """Samples to run at a time."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """To compute in."""
    seed: int = 1234
    """Of the order of the samples."""
    json_key: str = "text"
    """Key of a JSONL line, or column of a Parquet file, that holds the text."""
    document_mask: bool = False
    """Attention does not cross documents."""
    cache_path: str | None = None
    """Where tokenised text is kept for the next time; by default RAYTRON_CACHE, or nowhere."""
    json: bool = False
    """Print JSON."""

    def __post_init__(self) -> None:
        for name in ("samples", "sequence_length", "batch_size"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    def run(self) -> None:
        """Print loss, perplexity and the number of tokens."""
        from raytron.models import from_pretrained, read_arch
        from raytron.parallel.collectives import World

        directory = model_directory(self.model)
        arch = read_arch(directory)
        length = self.sequence_length or min(1024, arch.max_position_embeddings)
        arch.check_sequence(length)
        with self._dataset(directory, length, arch.vocab_size) as dataset:
            model = from_pretrained(directory, World.single(_device()), _torch_dtype(self.dtype))
            samples = min(self.samples or len(dataset), len(dataset))
            loss, tokens = _loss(model, _batches(dataset, samples, self.batch_size))
        found = {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}
        if self.json:
            print(json.dumps({"model": directory, "data": self.data, **found}))
        else:
            print(f"loss {loss:.4f} nats per token, perplexity {found['perplexity']:,.2f}, {tokens:,} tokens")

    @contextmanager
    def _dataset(self, directory: str, length: int, vocab_size: int) -> Iterator[GPTDataset | BlendedDataset]:
        from raytron.data import build_datasets, load_tokenizer, prepare

        config = DataConfig(
            path=self.data,
            tokenizer=self.tokenizer or directory,
            sequence_length=length,
            split=self.split,
            seed=self.seed,
            json_key=self.json_key,
            document_mask=self.document_mask,
        )
        entries = load_tokenizer(config.tokenizer).vocab_size
        if entries > vocab_size:
            raise ValueError(
                f"tokenizer {config.tokenizer} has {entries} entries and the model's vocab_size is {vocab_size}; name "
                "the one that the model was trained with"
            )
        with tempfile.TemporaryDirectory() as nowhere:
            cache = self.cache_path or os.environ.get("RAYTRON_CACHE") or nowhere
            yield build_datasets(config, prepare(config, cache, progress=not self.json), 0, self.samples)[1]


@dataclass(frozen=True)
class Generate:
    """Answer a file of prompts with a model; started again, it goes on where it was cut off."""

    model: Positional[str]
    """Hugging Face directory, checkpoint (.../step_00000100) or run (runs/NAME: its newest checkpoint)."""
    prompts: Positional[str]
    """Text with a prompt a line, or .jsonl: "prompt", "prompt_token_ids" or "messages", and sampling parameters."""
    output: str
    """JSON lines to write: index, prompt, outputs (text, token_ids, logprobs, finish_reason)."""
    engine: Literal["native", "vllm"] = "native"
    tp: int = 1
    """Tensor parallel size, on this machine."""
    pp: int = 1
    """Pipeline stages, on this machine."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is what the model's config.json says."""
    max_tokens: int = 128
    """Longest output, where a prompt says nothing else; so with all that follow."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    """Outputs for each prompt."""
    seed: int | None = None
    stop: tuple[str, ...] = ()
    """Texts that end an output."""
    max_num_seqs: int = 64
    """Sequences computed together."""
    kv_cache_mb: float = 512.0
    """Memory for keys and values, on each rank."""
    quiet: bool = False
    """Show no progress bar."""

    def run(self) -> None:
        """Write the output and say how much was generated."""
        from raytron.data.chat import ChatTemplate
        from raytron.inference import LLM, SamplingParams
        from raytron.inference.batch import generate_file, read_prompts

        chosen = ("max_tokens", "temperature", "top_p", "top_k", "n", "seed", "stop")
        params = SamplingParams(**{name: getattr(self, name) for name in chosen})
        source, directory = Path(self.prompts), model_directory(self.model)
        template = ChatTemplate(directory)
        total = sum(
            line.params.n for line in read_prompts(source, params, template.render)
        )  # a bad line before the model
        options = {"max_num_seqs": self.max_num_seqs, "kv_cache_mb": self.kv_cache_mb}
        with LLM(directory, self.engine, self.tp, self.pp, self.dtype, **options) as llm, self._progress(total) as done:
            start = time.perf_counter()
            made = generate_file(llm, source, Path(self.output), params, render=template.render, on_done=done)
            seconds = time.perf_counter() - start
        kept = f", {made.kept} kept from before" if made.kept else ""
        print(
            f"{self.output}: {made.prompts} prompts answered{kept}; {made.tokens:,} tokens in {seconds:.1f} s, "
            f"{made.tokens / max(seconds, 1e-9):,.0f} tokens/s"
        )

    @contextmanager
    def _progress(self, total: int) -> Iterator[Callable[[Any], None]]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = ("generate", BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
        with Progress(*columns, TimeRemainingColumn(), disable=self.quiet) as bar:
            task, tokens, start = bar.add_task("generate", total=total, rate=""), 0, time.perf_counter()

            def done(generation: Any) -> None:
                nonlocal tokens
                tokens += sum(len(o.token_ids) for o in generation.outputs)
                rate = f"{tokens / (time.perf_counter() - start):,.0f} tok/s"
                bar.update(task, advance=len(generation.outputs), rate=rate)

            yield done


@dataclass(frozen=True)
class Chat:
    """Talk with a model in the terminal, over any server with OpenAI's API. A pipe's lines are answered one by one."""

    url: str | None = None
    """Of the API; by default OPENAI_BASE_URL, or http://127.0.0.1:8000/v1."""
    key: str | None = None
    """API key; by default OPENAI_API_KEY."""
    model: str = ""
    """By default the first the server names."""
    system: str | None = None
    """System prompt."""
    temperature: float | None = None
    """By default the server's, as with all that follow."""
    top_p: float | None = None
    max_tokens: int | None = None
    """Longest answer."""
    seed: int | None = None

    def run(self) -> None:
        """Until /quit, Ctrl-D or the end of the pipe."""
        from raytron.serving.chat import Chat as Conversation
        from raytron.serving.chat import talk

        chosen = ("temperature", "top_p", "max_tokens", "seed")
        options = {name: value for name in chosen if (value := getattr(self, name)) is not None}
        chat = Conversation(_api_url(self.url), _api_key(self.key), self.model, self.system, options)
        try:
            talk(chat)
        finally:
            chat.close()


@dataclass(frozen=True)
class Bench:
    """Measure a server with OpenAI's API under load: TTFT, TPOT, ITL in tokens, E2E, rates and goodput."""

    what: Positional[Literal["serve"]]
    """What to measure."""
    url: str | None = None
    """Of the API; by default OPENAI_BASE_URL, or http://127.0.0.1:8000/v1."""
    key: str | None = None
    """API key; by default OPENAI_API_KEY."""
    model: str = ""
    """By default the first the server names."""
    endpoint: Literal["completions", "chat"] = "completions"
    requests: int = 200
    rate: float = math.inf
    """Requests a second, at the times of a Poisson process; inf sends all at once."""
    concurrency: int | None = None
    """Most requests under way; by default any number. With it, requests may be sent later than due."""
    input_tokens: int = 128
    """Words of a prompt, or tokens of it with `vocabulary`."""
    output_tokens: int = 64
    """Longest answer."""
    shared_tokens: int = 0
    """Words or tokens at the beginning that all prompts share."""
    vocabulary: int | None = None
    """Send prompts of random token ids below this, instead of words."""
    ignore_eos: bool = True
    """Have answers go on to their longest; a field of vLLM's and ours that other servers may refuse."""
    temperature: float = 0.0
    warmup: int = 2
    """Requests before the measurement."""
    seed: int = 0
    goodput_ttft_ms: float | None = None
    """A request that keeps to these limits counts as goodput."""
    goodput_tpot_ms: float | None = None
    output: str | None = None
    """JSON file to write the figures to."""
    json: bool = False
    """Print JSON instead of a table."""

    def __post_init__(self) -> None:
        for name in ("requests", "input_tokens", "output_tokens", "rate", "concurrency", "vocabulary"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} is {value}; it must be positive")
        if self.shared_tokens > self.input_tokens:
            raise ValueError(f"shared_tokens {self.shared_tokens} must not exceed input_tokens {self.input_tokens}")

    def run(self) -> None:
        """Send the load and print the figures."""
        import asyncio
        from dataclasses import fields

        from raytron.serving.bench import Load, measure, summary

        names = {field.name for field in fields(Load)} - {"url", "key", "options"}
        chosen = {name: getattr(self, name) for name in names}
        options = {"temperature": self.temperature}
        load = Load(url=_api_url(self.url), key=_api_key(self.key), options=options, **chosen)
        found = summary(load, asyncio.run(measure(load)), self.goodput_ttft_ms, self.goodput_tpot_ms)
        if self.output is not None:
            Path(self.output).write_text(json.dumps(found, indent=2) + "\n")
        print(json.dumps(found)) if self.json else self._show(found)
        if found["failed"]:
            raise ValueError(f"{found['failed']} of {found['requests']} requests failed: {'; '.join(found['errors'])}")

    @staticmethod
    def _show(found: dict[str, Any]) -> None:
        from rich.console import Console

        from raytron.serving.bench import headline, table

        Console().print(table(found))
        print(headline(found))


def _api_url(url: str | None) -> str:
    return (url or os.environ.get("OPENAI_BASE_URL") or "http://127.0.0.1:8000/v1").rstrip("/")


def _api_key(key: str | None) -> str | None:
    return key or os.environ.get("OPENAI_API_KEY")


@dataclass(frozen=True)
class Serve:
    """Serve models over HTTP: OpenAI's API, a chat page, metrics. On a local Ray, or the cluster at RAY_ADDRESS."""

    models: Positional[tuple[str, ...]]
    """Hugging Face directories, checkpoints or runs, each as PATH or NAME=PATH; requests name them by NAME."""
    engine: Literal["native", "vllm"] = "native"
    tp: int = 1
    """Tensor parallel size of an engine."""
    pp: int = 1
    """Pipeline stages of an engine."""
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    """auto is what the model's config.json says."""
    max_model_len: int | None = None
    """Tokens of prompt and output together; by default the model's max_position_embeddings."""
    max_num_seqs: int = 64
    """Sequences computed together by an engine; others wait."""
    kv_cache_mb: float = 512.0
    """Memory for keys and values, on each rank."""
    threads: int | None = None
    """CPU threads, and CPU slots, of a rank; by default 1."""
    use_gpu: bool = False
    """Give every rank a GPU."""
    replicas: int = 1
    """Engines of each model, at most."""
    min_replicas: int | None = None
    """At least so many, and more as requests queue up; 0 starts the first when somebody asks. By default all."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every interface of the machine, and then wants keys."""
    port: int = 8000
    """0 takes a free one."""
    api_key: tuple[str, ...] = ()
    """Keys that may ask; the variable RAYTRON_API_KEYS (separated by commas) keeps them off the command line."""
    admin_key: str | None = None
    """The key of /admin, where weights are changed; or the variable RAYTRON_ADMIN_KEY."""
    requests_per_minute: float | None = None
    """Of one key, or of one address where there are no keys."""
    max_queue: int = 256
    """Requests that may wait at one engine; more are refused with 429."""

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("no MODELS; name a model's directory or a run, as PATH or NAME=PATH")

    def run(self) -> None:
        """Serve until Ctrl-C or SIGTERM, then finish what is running."""
        from raytron.serving.app import ServedModel, serve_until_stopped

        named = [_named(model) for model in self.models]
        models = [ServedModel(name, self._engine(path), self._replicas()) for name, path in named]
        serve_until_stopped(models, self._http())

    def _engine(self, path: str) -> EngineConfig:
        same = ("engine", "tp", "pp", "dtype", "max_model_len", "max_num_seqs", "kv_cache_mb", "threads")
        directory = os.path.abspath(model_directory(path))
        return EngineConfig(path=directory, **{name: getattr(self, name) for name in same})

    def _replicas(self) -> ReplicaConfig:
        least = self.replicas if self.min_replicas is None else self.min_replicas
        return ReplicaConfig(min_replicas=least, max_replicas=self.replicas, use_gpu=self.use_gpu)

    def _http(self) -> ServeConfig:
        keys = self.api_key or tuple(filter(None, os.environ.get("RAYTRON_API_KEYS", "").split(",")))
        admin = self.admin_key or os.environ.get("RAYTRON_ADMIN_KEY")
        same = ("host", "port", "requests_per_minute", "max_queue")
        return ServeConfig(api_keys=keys, admin_key=admin, **{name: getattr(self, name) for name in same})


def _named(model: str) -> tuple[str, str]:
    """Name and path of NAME=PATH or PATH, whose name is its last folder's."""
    name, equals, path = model.partition("=")
    if equals and name and "/" not in name:
        return name, path
    return Path(model).absolute().name, model


@dataclass(frozen=True)
class Status:
    """Show how a run is doing: its ranks and where they are, its goodput, and what happened to it."""

    target: Positional[str]
    """Folder of the run (runs/NAME), or its name in the cluster of RAY_ADDRESS."""
    json: bool = False
    """Print JSON."""
    page: str | None = None
    """Write a page to look at, an HTML file; a run leaves one itself, in its folder, when it is over."""
    follow: bool = False
    """Again every few seconds, until the run is over; a browser then keeps up with the page."""

    def run(self) -> None:
        """Print it; of a run that is not alive, the end of its journal."""
        from raytron.actors import live

        try:
            with live.talking_to(self.target) as mailbox:
                for state in live.following(mailbox, FOLLOW_S) if self.follow else [live.status(mailbox)]:
                    self._tell(state)
        except ValueError as error:
            print(f"{error}\n{live.last_words(self.target)}")
            self._tell(None)
        else:
            if self.follow:
                self._tell(None)

    def _tell(self, state: dict[str, Any] | None) -> None:
        """A status; None where the run is not alive."""
        from raytron.actors import live

        if state is not None:
            clear = "\x1b[H\x1b[J" if self.follow and not self.json and sys.stdout.isatty() else ""
            print(json.dumps(state) if self.json else clear + live.describe(state), flush=True)
        if self.page is not None:
            live.write_page(self.target, self.page, state, FOLLOW_S if self.follow and state else None)


@dataclass(frozen=True)
class Scale:
    """Ask a live run for another number of ranks, within its scaling.num_workers, or an RL run for another number of
    engines, within its rollout.engines. Nothing is restarted."""

    target: Positional[str]
    """Folder of the run (runs/NAME), or its name in the cluster of RAY_ADDRESS."""
    num_workers: int | None = None
    """Ranks."""
    engines: int | None = None
    """Rollout engines."""

    def __post_init__(self) -> None:
        if (self.num_workers is None) == (self.engines is None):
            raise ValueError("name one of --num-workers and --engines")

    def run(self) -> None:
        """Ask, and print the answer."""
        key = "num_workers" if self.engines is None else "engines"
        _ask(self.target, {key: getattr(self, key)})


@dataclass(frozen=True)
class Reshape:
    """Ask a live run for another tensor or pipeline parallel size. Nothing is restarted."""

    target: Positional[str]
    """Folder of the run (runs/NAME), or its name in the cluster of RAY_ADDRESS."""
    tp: int | None = None
    """Tensor parallel size; by default the run's parallel.tp."""
    pp: int | None = None
    """Pipeline stages; by default the run's parallel.pp."""
    num_workers: int | None = None
    """Ranks; by default as many as there may be."""

    def __post_init__(self) -> None:
        if self.tp is None and self.pp is None:
            raise ValueError("neither --tp nor --pp; name at least one of them")

    def run(self) -> None:
        """Ask, and print the answer."""
        _ask(self.target, {"tp": self.tp, "pp": self.pp, "num_workers": self.num_workers})


def _ask(run: str, request: dict[str, int | None]) -> None:
    from raytron.actors import live

    with live.talking_to(run) as mailbox:
        print(live.ask(mailbox, request))


@dataclass(frozen=True)
class Chaos:
    """Kill random ranks and rollout engines of a live run, to see for yourself that it goes on. Its
    failure_config.max_failures and rollout.max_restarts count."""

    target: Positional[str]
    """Folder of the run (runs/NAME), or its name in the cluster of RAY_ADDRESS."""
    kill_every: str = "30s"
    """Time between two: seconds, or 30s, 2m, 1h."""
    how: Literal["kill", "stop"] = "kill"
    """SIGKILL, or SIGSTOP: a process that is there and does nothing."""
    most: int | None = None
    """End after so many; by default with the run, or with Ctrl-C."""
    seed: int | None = None
    """Of the choice."""

    def __post_init__(self) -> None:
        _seconds(self.kill_every)

    def run(self) -> None:
        """Until the run is over."""
        from raytron.actors import live

        with live.talking_to(self.target) as mailbox:
            count = live.chaos(mailbox, _seconds(self.kill_every), self.how, self.seed, print, self.most)
        print(f"{count} in all")


def _seconds(text: str) -> float:
    """30, 30s, 2m or 1h in seconds."""
    number, unit = (text[:-1], text[-1]) if text[-1:] in ("s", "m", "h") else (text, "s")
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600}[unit]
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise ValueError(f"{text!r} is no time; write 30, 30s, 2m or 1h")
    return seconds


FOLLOW_S = 5  # between two looks at a run that is followed

COMMANDS = {
    "preprocess": Preprocess,
    "models": Models,
    "convert": Convert,
    "eval": Eval,
    "generate": Generate,
    "chat": Chat,
    "bench": Bench,
    "serve": Serve,
    "status": Status,
    "scale": Scale,
    "reshape": Reshape,
    "chaos": Chaos,
}


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line `args`, by default the process's own, on which errors are one line (see `report_error`)."""
    if args is None:
        sys.excepthook = report_error
    if (sys.argv[1:] if args is None else args) == ["--version"]:
        print(f"raytron {version('raytron')}")
    else:
        parse(args).run()


def parse(args: Sequence[str] | None = None) -> Any:
    """The command that a command line asks for. Ends the process after `--help`, and after a slip it points out."""
    return tyro.extras.subcommand_cli_from_dict(
        COMMANDS,
        prog="raytron",
        description="Data and models around a run. (To train, run a recipe: python recipes/quickstart.py --help.)\n"
        "raytron COMMAND --help says more; RAYTRON_DEBUG=1 shows where an error came from; raytron --version.",
        args=args,
        config=(PositionalMetavarFromFieldName, FlagCreatePairsOff),
    )


def model_directory(path: str) -> str:
    """The Hugging Face directory that is meant: `path`, a checkpoint's model, or that of a run's newest checkpoint.

    Raises ValueError if there is none, or a file of a checkpoint's model is not what was saved; names the file.
    """
    from raytron.checkpoint import CheckpointManager

    if "://" in path:
        return path
    runs = (CheckpointManager(folder).latest() for folder in (path, f"{path}/checkpoints"))
    for folder in (path, f"{path}/model", *(f"{latest}/model" for latest in runs if latest)):
        if any(Path(folder, f"model.safetensors{end}").is_file() for end in ("", ".index.json")):
            _verify(Path(folder).absolute())
            return folder
    raise ValueError(f"{path}: no model; give a Hugging Face directory, a checkpoint, or a run that has saved one")


def _verify(model: Path) -> None:
    """Raise DamagedFile where a checkpoint's model is not what its manifest says. Other directories have none."""
    from raytron.checkpoint import Storage
    from raytron.checkpoint.manifest import MANIFEST, Manifest
    from raytron.checkpoint.reading import read

    checkpoint = model.parent
    if model.name == "model" and (checkpoint / MANIFEST).is_file():
        files = Manifest.read(Storage.open(checkpoint.parent), checkpoint.name).files
        read(Storage.open(checkpoint), {}, {path: entry for path, entry in files.items() if path.startswith("model/")})


def _preset(name: str, arch: Any) -> dict[str, Any]:
    from raytron.models import build

    return {
        "preset": name,
        "parameters": build(arch, device="meta").num_parameters(),
        "layers": arch.num_hidden_layers,
        "hidden": arch.hidden_size,
        "ffn": arch.intermediate_size,
        "heads": arch.num_attention_heads,
        "kv_heads": arch.num_key_value_heads,
        "vocabulary": arch.vocab_size,
        "context": arch.max_position_embeddings,
    }


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    titles = ("preset", "parameters", "layers", "hidden", "heads / KV", "vocabulary", "context")
    table = Table(*titles, box=None, header_style="bold")
    for column in table.columns:
        column.justify, column.no_wrap = "left" if column.header == "preset" else "right", True
    for row in rows:
        heads, size = f"{row['heads']} / {row['kv_heads']}", row["parameters"]
        parameters = f"{size / 1e9:.2f} B" if size >= 1e9 else f"{size / 1e6:.3g} M"
        sizes = (row["layers"], row["hidden"], heads, f"{row['vocabulary']:,}", f"{row['context']:,}")
        table.add_row(row["preset"], parameters, *map(str, sizes))
    Console().print(table)


def _torch_dtype(name: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _batches(dataset: GPTDataset | BlendedDataset, samples: int, size: int) -> Iterator[MicroBatch]:
    """The first `samples` samples, `size` at a time and the rest."""
    from raytron.data import GlobalBatches

    for first in range(0, samples, size):
        part = min(size, samples - first)
        yield from GlobalBatches(dataset, part, part, dataset.sequence_length).read(first)


def _loss(model: ShardedModel, batches: Iterator[MicroBatch]) -> tuple[float, int]:
    """Mean loss in nats per token, and the number of tokens it is the mean of."""
    import torch

    from raytron.training.losses import next_token_loss

    total, tokens, tp = 0.0, 0, model.world.axis("tp")
    with torch.no_grad():
        for batch in batches:
            given = vars(batch.map(lambda tensor: tensor.to(model.weights.device)))
            labels_T, mask_T = given["labels_BS"].flatten(), given["loss_mask_BS"].flatten()
            logits_BSV = model(given["tokens_BS"], given.get("position_ids_BS"), given.get("document_ids_BS"))
            total += next_token_loss(logits_BSV.flatten(0, 1), labels_T, mask_T, 0, tp).item()
            tokens += int(mask_T.sum())
    return total / tokens, tokens


if __name__ == "__main__":
    main()
