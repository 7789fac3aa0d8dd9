"""What goes into an engine and what comes out: the one protocol of generation, RL rollouts and serving. No torch.

    add(Request) ...  ->  step() -> [Output, Output, ...] -> step() -> ...      until nothing is unfinished
    start_weight_update -> update_weights (any number of chunks) -> finish_weight_update(version), requests in flight
    sleep -> (another computes here; updates may come) -> wake

An `Output` is what one sequence of one request gained in one step; `Collector` puts a request's outputs together. Every
token carries the log-probability the model gave it and the version of the weights that did.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from raytron.config import Typed

if TYPE_CHECKING:
    from raytron.parallel.device_memory import Offer

__all__ = [
    "Collector",
    "Completion",
    "Engine",
    "Generation",
    "Output",
    "PauseMode",
    "Pushed",
    "Request",
    "SamplingParams",
    "Stats",
    "WeightUpdateError",
]

PauseMode = Literal["keep", "wait", "abort"]
FinishReason = Literal["stop", "length", "abort", "error"]
MOST_SEQUENCES, MOST_STOPS, MOST_LOGPROBS = 128, 64, 20


class WeightUpdateError(RuntimeError):
    """A weight update failed and the engine's weights may be half new: it answers no request until one succeeds."""


@dataclass(frozen=True)
class SamplingParams(Typed):
    """How to choose tokens. Raises ValueError naming the field for a value out of range."""

    n: int = 1
    """Sequences for one prompt, seeded seed, seed + 1, ..."""
    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Only the likeliest so many; 0 (or -1) is all of them."""
    top_p: float = 1.0
    """Only the likeliest that together have this share of what top_k and min_p leave."""
    min_p: float = 0.0
    """Only those at least this probable, as a share of the likeliest."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of the prompt or output (Keskar et al. 2019)."""
    presence_penalty: float = 0.0
    """Subtracted from the logits of tokens in the output."""
    frequency_penalty: float = 0.0
    """The same, times how often."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Token id -> added to its logit."""
    seed: int | None = None
    """The same seed gives the same tokens, whatever the request is batched with."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the output, besides the model's own end; their text is not part of it."""
    ignore_eos: bool = False
    """Go on past the model's end token."""
    max_tokens: int | None = 16
    """None goes on to the end of the context."""
    min_tokens: int = 0
    """End tokens are forbidden before so many."""
    logprobs: int | None = None
    """Alternatives to report for each token."""
    prompt_logprobs: int | None = None
    """Log-probabilities of the prompt's tokens, with so many alternatives."""
    json_schema: str | None = None
    """The output is JSON that fits this schema (JSON text; "{}" is any JSON)."""
    regex: str | None = None
    """The output matches this regular expression."""

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            if isinstance(getattr(self, name), str | int):
                object.__setattr__(self, name, (getattr(self, name),))
        if isinstance(self.json_schema, Mapping):
            object.__setattr__(self, "json_schema", json.dumps(self.json_schema))
        super().__post_init__()
        within = {
            "n": (1, MOST_SEQUENCES),
            "temperature": (0.0, 100.0),
            "top_k": (-1, None),
            "top_p": (1e-9, 1.0),
            "min_p": (0.0, 1.0),
            "repetition_penalty": (1e-3, 100.0),
            "presence_penalty": (-2.0, 2.0),
            "frequency_penalty": (-2.0, 2.0),
            "max_tokens": (0, None),
            "min_tokens": (0, None),
            "logprobs": (0, MOST_LOGPROBS),
            "prompt_logprobs": (0, MOST_LOGPROBS),
        }
        for name, (low, high) in within.items():
            value = getattr(self, name)
            if value is not None and not (low <= value and (high is None or value <= high)):  # NaN fails too
                span = f"at least {low}" if high is None else f"between {low} and {high}"
                raise ValueError(f"{name} is {value}; it must be {span}")
        if not all(math.isfinite(bias) and -100 <= bias <= 100 for bias in self.logit_bias.values()):
            raise ValueError("logit_bias must lie between -100 and 100")
        if len(self.stop) > MOST_STOPS or not all(self.stop):
            raise ValueError(f"stop must be at most {MOST_STOPS} texts, none of them empty; it has {len(self.stop)}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens is {self.min_tokens}; it must not exceed max_tokens {self.max_tokens}")
        if self.json_schema is not None and self.regex is not None:
            raise ValueError("json_schema and regex exclude each other; set one of them")

    @property
    def greedy(self) -> bool:
        """Whether no chance is involved."""
        return self.temperature == 0.0


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it.

    id: the caller's name for it, unique among unfinished ones. client: whose it is; waiting requests of different
    clients are admitted in turns, so that nobody's flood keeps others out.
    """

    id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    client: str = ""


@dataclass(frozen=True)
class Pushed:
    """New weights in the shared directory of a node (`raytron.parallel.shared`), and proof that they are the trainer's.

    path: of the directory. turn: number of the push that wrote it last. checksums: canonical name -> what the tensor
    must sum to (`raytron.parallel.checksum`); None while the push is being written: the writers leave theirs there.
    offers: instead of a directory, the memory of ranks on the engine's own GPU (`raytron.parallel.device_memory`).
    """

    path: str
    turn: int
    checksums: Mapping[str, int] | None
    offers: Sequence[Offer] = ()


@dataclass(frozen=True, slots=True)
class Output:
    """What one sequence gained in one step.

    index: which of the request's n sequences. token_ids, logprobs, versions: of the new tokens, all of one length;
    log-probabilities are natural logs of the model's own distribution, before temperature and the like, or with
    `EngineConfig.logprobs` "processed" of the one after them. text: what may be shown of them now; the start of a stop
    text, or of a character, is held back. top_logprobs: token id -> log-probability of the likeliest alternatives, for
    each new token, if asked for. prompt_logprobs, prompt_top_logprobs: of the prompt's tokens from the second on (the
    model's own), once, with the sequence's first output, if asked for.
    finish_reason: None while it goes on; stop_reason: the stop text or token id that ended it, if one did.
    """

    request_id: str
    index: int = 0
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()
    text: str = ""
    top_logprobs: tuple[Mapping[int, float], ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top_logprobs: tuple[Mapping[int, float], ...] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Stats:
    """An engine at one moment. Counters grow for its whole life; kv_usage is a share of the cache's blocks.

    health: "ready", or why no request is answered ("stale: ...").
    """

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    kv_blocks: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    preemptions: int = 0
    finished: int = 0
    version: int = 0
    paused: bool = False
    health: str = "ready"


@runtime_checkable
class Engine(Protocol):
    """What answers requests: `NativeEngine` and `VLLMEngine`. One thread calls it.

    Attributes:
        max_model_len: tokens of prompt and output together.
        version: of the weights, 0 until an update names another.
        confirmed: `checksum.fold` of the weights that the last update brought, if that was a push, else None.
    """

    max_model_len: int
    version: int
    confirmed: int | None

    def add(self, request: Request) -> None:
        """Take a request in. Raises ValueError for one that can never be answered, and loses nothing by it."""

    def step(self) -> list[Output]:
        """Compute one batch; what every sequence in it gained. Empty when paused or nothing is unfinished."""

    def has_unfinished(self) -> bool:
        """Whether some request has not got its last output."""

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """End requests now and free what they hold; their last outputs ("abort"). Unknown ids are passed over."""

    def pause(self, mode: PauseMode = "keep") -> list[Output]:
        """Stop stepping: keep requests as they are, wait until those running are done, or abort all.

        What finishing or aborting gave is returned. Adding goes on and waits for `resume`.
        """

    def resume(self) -> None:
        """Go on after `pause`."""

    def sleep(self, weights: bool = False) -> list[Output]:
        """Pause as `pause()`, and give the memory of the cache back: somebody else computes on this device for a while.

        Requests are kept, and recomputed later. With `weights` that of the weights goes too: an update must then bring
        all of them. Updates may come while it sleeps. Returns as `pause`. Raises ValueError where this cannot be had.
        """

    def wake(self) -> None:
        """After `sleep`: take the memory anew and go on; without weights, once an update has brought them."""

    def start_weight_update(self, mode: PauseMode = "keep") -> list[Output]:
        """Pause as `pause(mode)` and make ready for new weights; returns the same. One under way is given up for it."""

    def update_weights(self, weights: Mapping[str, Any] | str | Pushed) -> None:
        """New values: canonical name -> whole tensor, any part of them a call; or the path of a Hugging Face directory.

        A push is taken from the node's shared memory, and its checksums are held against what the engine has then.
        Raises WeightUpdateError for an unknown name, another shape, or another checksum, naming the tensor.
        Raises WriterGone for a push that its writers did not finish; the update stays under way then, and the engine
        waits, paused, for the next one.
        """

    def finish_weight_update(self, version: int) -> None:
        """Put the new weights in force: what is cached of the old ones is dropped, kept requests are recomputed.

        The engine goes on with them as `version`, as it was (paused or not) before the start.
        """

    def stats(self) -> Stats:
        """Numbers for routing and monitoring."""

    def close(self) -> None:
        """Give back memory, processes and threads. Doing it again does nothing."""


@dataclass
class Completion:
    """One finished (or growing) sequence; fields as in `Output`, put together."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    top_logprobs: list[Mapping[int, float]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    error: str | None = None


@dataclass
class Generation:
    """A request's whole answer: the prompt and n completions."""

    request_id: str
    prompt: str | None
    prompt_token_ids: Sequence[int]
    outputs: list[Completion]
    prompt_logprobs: Sequence[float] | None = None
    prompt_top_logprobs: Sequence[Mapping[int, float]] | None = None
    cached_tokens: int = 0

    @property
    def finished(self) -> bool:
        """Whether every sequence has ended."""
        return all(output.finish_reason is not None for output in self.outputs)


class Collector:
    """Puts the outputs of many requests together."""

    def __init__(self) -> None:
        self.generations: dict[str, Generation] = {}

    def expect(self, request: Request, prompt: str | None = None) -> None:
        """A request whose outputs will come."""
        outputs = [Completion(i) for i in range(request.params.n)]
        self.generations[request.id] = Generation(request.id, prompt, request.prompt_token_ids, outputs)

    def put(self, output: Output) -> Generation:
        """Add one output; the generation it belongs to."""
        generation = self.generations[output.request_id]
        into = generation.outputs[output.index]
        into.text += output.text
        into.token_ids += output.token_ids
        into.logprobs += output.logprobs
        into.versions += output.versions
        into.top_logprobs += output.top_logprobs or ()
        into.finish_reason, into.stop_reason, into.error = output.finish_reason, output.stop_reason, output.error
        if output.prompt_logprobs is not None:
            generation.prompt_logprobs = output.prompt_logprobs
            generation.prompt_top_logprobs = output.prompt_top_logprobs
        generation.cached_tokens = max(generation.cached_tokens, output.cached_tokens)
        return generation
