"""The native engine: the training model, its cache in blocks, and a batch that changes with every step.

    add -> scheduler's queue
    step: schedule (which tokens) -> runner (logits) -> sampler (tokens) -> finished? text? -> outputs

Everything between two steps is consistent: that is where requests come, end, and get new weights. In *fast* mode each
product is computed by whatever is fastest for its number of rows; in *reproducible* mode by kernels that give a row the
same bits in any company, so the trainer's forward over the finished sequence has the very log-probabilities reported.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raytron.config import EngineConfig, ParallelConfig
from raytron.inference.blocks import BlockPool
from raytron.inference.confirm import confirm
from raytron.inference.constraints import Grammars, allowed
from raytron.inference.detokenize import TextStream
from raytron.inference.runner import Runner, Step
from raytron.inference.sampler import Draw, History, pick, top_logprobs
from raytron.inference.scheduler import Scheduler, Work
from raytron.inference.scheduler import Sequence as Running
from raytron.inference.types import Output, PauseMode, Pushed, Request, Stats, WeightUpdateError
from raytron.models import build, load_adapter, load_weights, read_arch
from raytron.models.adapters import resolve_lora
from raytron.models.base import ShardedModel
from raytron.models.kernels import KEYS
from raytron.parallel.collectives import World
from raytron.parallel.device_memory import identity
from raytron.parallel.layout import Spec
from raytron.parallel.progress import WriterGone

__all__ = ["NativeEngine", "end_tokens", "engine_arch", "engine_parallel", "load_model", "model_dtype"]


@dataclass(slots=True)
class _State:
    """What the engine keeps with a sequence: its seed, longest output, text, constraint, and the prompt's scores."""

    seed: int
    limit: int
    text: TextStream | None
    matcher: Any
    penalties: bool
    prompt_logprobs: list[float] = field(default_factory=list)
    prompt_top: list[Mapping[int, float]] = field(default_factory=list)
    told: bool = False


def model_dtype(config: EngineConfig) -> torch.dtype:
    """The dtype a config asks for, or the one the model's config.json names (anything else is computed in fp32)."""
    if config.dtype != "auto":
        return {"fp32": torch.float32, "bf16": torch.bfloat16}[config.dtype]
    stored = json.loads((Path(config.path) / "config.json").read_text())
    name = stored.get("dtype") or stored.get("torch_dtype")
    return torch.bfloat16 if name in ("bfloat16", "float16") else torch.float32


def engine_parallel(config: EngineConfig) -> ParallelConfig:
    """How an engine cuts its layers: a decode step has too few tokens to share out by sequence."""
    return ParallelConfig(tp=config.tp, pp=config.pp, sequence_parallel=False)


def engine_arch(config: EngineConfig) -> Any:
    """The architecture in the engine's directory, with the adapters it is to have. Raises as `read_arch`."""
    arch = read_arch(config.path)
    return arch.replace(lora=resolve_lora(config.lora))


def load_model(config: EngineConfig, world: World | None) -> ShardedModel:
    """This rank's part of the model, ready for inference."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    arch = engine_arch(config)  # its errors come before any other
    model = build(arch, world, dtype=model_dtype(config), parallel=engine_parallel(config))
    if config.weights == "read":
        load_weights(model, config.path)
        if config.lora.path is not None:
            load_adapter(model, config.lora.path)
    return model.requires_grad_(False).eval().use_kernels(config.reproducible)


def end_tokens(path: str, arch: Any) -> tuple[int, ...]:
    """Ids that end an output: generation_config.json's, else the architecture's."""
    file = Path(path) / "generation_config.json"
    ids = json.loads(file.read_text()).get("eos_token_id") if file.is_file() else None
    ids = arch.eos_token_id if ids is None else ids
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)


class NativeEngine:
    """An `Engine` over raytron's own models.

    Args:
        config: which model, on which layout. With tp x pp above 1 `world` is this rank's seat: rank 0 is used as an
            engine, the others call `follow`. (`raytron.inference.make_engine` starts them on this machine.)
        world: this rank's seat; None is a world of one.
        model: instead of reading one from `config.path`; it is then shared, not copied.

    Raises:
        ValueError: no such model, a layout it cannot be cut to, or a cache too small for one sequence.
    """

    def __init__(self, config: EngineConfig, world: World | None = None, model: ShardedModel | None = None) -> None:
        if config.block_size % KEYS:
            raise ValueError(f"engine.block_size {config.block_size} must be a multiple of {KEYS}")
        self.config, self._borrowed = config, model is not None
        self.model = model or load_model(config, world)
        arch = self.model.arch
        longest = config.max_model_len or arch.max_position_embeddings
        if longest > arch.max_position_embeddings:
            raise ValueError(
                f"engine.max_model_len {longest} exceeds the model's max_position_embeddings "
                f"{arch.max_position_embeddings}; lower it"
            )
        self.runner = Runner(self.model, config, longest)
        self.max_model_len = min(longest, self.runner.blocks * config.block_size)
        if config.max_model_len and self.max_model_len < longest:
            raise ValueError(
                f"engine.kv_cache_mb {config.kv_cache_mb} holds {self.max_model_len} tokens, less than "
                f"engine.max_model_len {longest}; raise it, or lower the length"
            )
        if self.max_model_len < 1:
            raise ValueError(f"engine.kv_cache_mb {config.kv_cache_mb} does not hold one block; raise it")
        self.version, self.confirmed = 0, None
        self._scheduler = Scheduler(
            BlockPool(self.runner.blocks),
            config.block_size,
            max_seqs=config.max_num_seqs,
            max_tokens=config.max_batched_tokens,
            max_len=self.max_model_len,
            prefix_caching=config.prefix_caching,
        )
        self._ends = end_tokens(config.path, arch) if config.path else ()
        file = Path(config.path) / "tokenizer.json"
        self._backend, text = _tokenizer(file) if config.path and file.is_file() else (None, None)
        self._grammars = Grammars(text, arch.vocab_size, self._ends)
        self._history = History(config.max_num_seqs, arch.vocab_size, self.model.weights.device)
        self._requests: dict[str, list[Running]] = {}
        self._seeds = itertools.count(config.seed << 32)
        waits = config.weights == "await" and model is None
        self._paused, self._updating, self._resume_after = waits, False, waits
        self._asleep = False
        self._stale: str | None = "it has had no weights yet" if waits else None
        self._touched: set[str] = set()
        self._counters = dict.fromkeys(("prompt_tokens", "cached_tokens", "generated_tokens", "finished"), 0)
        self._closed = False

    def follow(self) -> None:
        """Serve rank 0 until it closes; for every other rank."""
        self.runner.follow()

    # Requests

    def add(self, request: Request) -> None:
        """See `Engine.add`."""
        if self._stale:
            raise ValueError(f"this engine is stale ({self._stale}); give it whole new weights first")
        params, prompt = request.params, request.prompt_token_ids
        if request.id in self._requests:
            raise ValueError(f"request id {request.id!r} is already under way; choose another")
        self._check_prompt(prompt, params.max_tokens)
        if params.stop and self._backend is None:
            raise ValueError("stop texts need a tokenizer, and the model's directory has none; use stop_token_ids")
        outside = [i for i in (*params.logit_bias, *params.stop_token_ids) if not 0 <= i < self.model.arch.vocab_size]
        if outside:
            raise ValueError(f"token id {outside[0]} is outside the vocabulary of {self.model.arch.vocab_size}")
        limit = self.max_model_len - len(prompt) if params.max_tokens is None else params.max_tokens
        seed = next(self._seeds) if params.seed is None else params.seed
        sequences = []
        for i in range(params.n):
            text = TextStream(self._backend, prompt, params.stop) if self._backend else None
            matcher = self._grammars.matcher(params)
            state = _State(seed + i, limit, text, matcher, History.needed(params))
            sequences.append(Running(request, i, list(prompt), len(prompt), state=state))
        self._requests[request.id] = sequences
        for sequence in sequences:
            self._scheduler.add(sequence)

    def _check_prompt(self, prompt: Sequence[int], max_tokens: int | None) -> None:
        if not prompt:
            raise ValueError("the prompt is empty; give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < self.model.arch.vocab_size:
            raise ValueError(f"the prompt has token ids outside the vocabulary of {self.model.arch.vocab_size}")
        wanted = len(prompt) + (1 if max_tokens is None else max_tokens)
        if wanted > self.max_model_len:
            asked = "" if max_tokens is None else f" and max_tokens {max_tokens}"
            raise ValueError(
                f"a prompt of {len(prompt)} tokens{asked} exceeds the context of {self.max_model_len} tokens; shorten "
                "the prompt or lower max_tokens"
            )

    def has_unfinished(self) -> bool:
        """See `Engine.has_unfinished`."""
        return bool(self._requests)

    def abort(self, request_ids: Iterable[str]) -> list[Output]:
        """See `Engine.abort`."""
        outputs = []
        for name in request_ids:
            for sequence in self._requests.pop(name, ()):
                if sequence.state is not None:
                    outputs.append(self._end(sequence, "abort"))
        return outputs

    def _end(self, sequence: Running, reason: str) -> Output:
        """Take an unfinished sequence out; its last output."""
        state, sequence.state = sequence.state, None
        self._scheduler.remove(sequence)
        text = state.text.flush() if state.text else ""
        return Output(sequence.request.id, sequence.index, text=text, finish_reason=reason)

    # A step

    def step(self) -> list[Output]:
        """See `Engine.step`."""
        return [] if self._paused else self._step()

    def _step(self, admit: bool = True) -> list[Output]:
        work = self._scheduler.schedule(admit)
        if not work:
            return []
        inputs, owners = self._inputs(work)
        logits = self.runner.run(inputs)
        if len(owners) == len(work) == len(inputs.wanted):
            return self._sample(work, logits)
        return self._sample(*self._score_prompts(work, owners, logits))

    def _inputs(self, work: Sequence[Work]) -> tuple[Step, list[int]]:
        """Arrays of the step, and for each wanted row the number of its work."""
        slots = np.array([w.sequence.slot for w in work], dtype=np.int32)
        rows, tables = self._tables(slots, max(w.start + w.count for w in work))
        if all(w.count == 1 and w.last for w in work):
            tokens = np.array([w.sequence.tokens[w.start] for w in work], dtype=np.int32)
            position = np.array([w.start for w in work], dtype=np.int32)
            everyone = list(range(len(work)))
            return Step(tokens, rows, position, tables, np.array(everyone, dtype=np.int32)), everyone
        parts = (w.sequence.tokens[w.start : w.start + w.count] for w in work)
        tokens = np.fromiter(itertools.chain.from_iterable(parts), np.int32)
        position = np.concatenate([np.arange(w.start, w.start + w.count, dtype=np.int32) for w in work])
        wanted, owners, at = [], [], 0
        for i, w in enumerate(work):
            first = at if w.sequence.request.params.prompt_logprobs is not None else at + w.count - w.last
            wanted += range(first, at + w.count)
            owners += [i] * (at + w.count - first)
            at += w.count
        sequence = np.repeat(rows, [w.count for w in work])
        return Step(tokens, sequence, position, tables, np.array(wanted, dtype=np.int32)), owners

    def _tables(self, slots: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
        """Row of each work in the block tables, and the tables: ours, or what other ranks must be told of them."""
        tables = self._scheduler.tables
        if self.model.world.mesh.size == 1:
            return slots, tables
        width = -(-longest // self.config.block_size)
        return np.arange(len(slots), dtype=np.int32), np.ascontiguousarray(tables[slots, :width])

    def _score_prompts(self, work: Sequence[Work], owners: list[int], logits: Tensor | None) -> tuple[list[Work], Any]:
        """Note the prompts' log-probabilities where they were asked for; what is left to sample, and its logits."""
        sampling = [i for i, w in enumerate(work) if w.last]
        last = {owner: row for row, owner in enumerate(owners)}
        for i, w in enumerate(work):
            if w.sequence.request.params.prompt_logprobs is not None and w.start < w.sequence.prompt:
                rows = [row for row, owner in enumerate(owners) if owner == i]
                self._score_prompt(w, logits[rows[0] : rows[-1] + 1])
        return [work[i] for i in sampling], logits[[last[i] for i in sampling]] if sampling else None

    def _score_prompt(self, work: Work, logits_TV: Tensor) -> None:
        """Rows of positions start.. give the log-probabilities of the prompt's tokens start + 1.."""
        sequence, state = work.sequence, work.sequence.state
        known = len(state.prompt_logprobs)  # a preempted sequence computes them again
        first, stop = max(work.start, known), min(work.start + work.count, sequence.prompt - 1)
        if first >= stop:
            return
        logs = torch.log_softmax(logits_TV[first - work.start : stop - work.start].float(), -1)
        targets = torch.tensor(sequence.tokens[first + 1 : stop + 1], device=logs.device)
        state.prompt_logprobs += logs.gather(1, targets.unsqueeze(1)).squeeze(1).tolist()
        state.prompt_top += top_logprobs(logs, sequence.request.params.prompt_logprobs)

    def _sample(self, work: Sequence[Work], logits: Tensor | None) -> list[Output]:
        """A token for each of `work`, and what it means for its sequence."""
        rows = [i for i, w in enumerate(work) if w.sequence.state.limit]
        scored = [w.sequence for w in work if not w.sequence.state.limit]  # nothing was asked for but the prompt's
        outputs = [self._finish(sequence, self._once(sequence), "length", None, "") for sequence in scored]
        if not rows:
            return outputs
        if scored:
            work, logits = [work[i] for i in rows], logits[rows]
        draws = [self._draw(w.sequence) for w in work]
        matchers = [w.sequence.state.matcher for w in work]
        permitted = allowed(matchers, self.model.arch.vocab_size)
        permitted = None if permitted is None else permitted.to(logits.device)
        picked = pick(logits, draws, self._history, permitted, self.config.logprobs == "processed")
        self._remember(work, draws, picked.tokens)
        for w, token, logprob, top in zip(work, picked.tokens, picked.logprobs, picked.top, strict=True):
            outputs.append(self._advance(w.sequence, token, logprob, top))
        return outputs

    def _draw(self, sequence: Running) -> Draw:
        params, state = sequence.request.params, sequence.state
        position = len(sequence.tokens) - sequence.prompt
        if state.penalties and not self._history.holds(sequence.slot, sequence):
            self._history.begin(
                sequence.slot, sequence, sequence.tokens[: sequence.prompt], sequence.tokens[sequence.prompt :]
            )
        ends = (*self._ends, *params.stop_token_ids) if position < params.min_tokens else ()
        return Draw(params, state.seed, sequence.slot, position, ends)

    def _remember(self, work: Sequence[Work], draws: Sequence[Draw], tokens: Sequence[int]) -> None:
        rows = [i for i, w in enumerate(work) if w.sequence.state.penalties]
        self._history.extend([draws[i].slot for i in rows], [tokens[i] for i in rows])

    def _once(self, sequence: Running) -> dict[str, Any]:
        """Fields that come once, with a sequence's first output."""
        state = sequence.state
        if state.told:
            return {}
        state.told = True
        if sequence.index == 0:
            self._counters["prompt_tokens"] += sequence.prompt
        self._counters["cached_tokens"] += sequence.cached
        once: dict[str, Any] = {"cached_tokens": sequence.cached}
        if sequence.request.params.prompt_logprobs is not None:
            once |= {"prompt_logprobs": tuple(state.prompt_logprobs), "prompt_top_logprobs": tuple(state.prompt_top)}
        return once

    def _advance(self, sequence: Running, token: int, logprob: float, top: Mapping[int, float] | None) -> Output:
        """Append a sampled token; the output it makes, the last one if it ends the sequence."""
        sequence.tokens.append(token)
        count = len(sequence.tokens) - sequence.prompt
        self._counters["generated_tokens"] += 1
        text, reason, stop = self._judge(sequence, token, count)
        fields = self._once(sequence)
        fields |= {"token_ids": (token,), "logprobs": (logprob,), "versions": (self.version,)}
        if top is not None:
            fields["top_logprobs"] = (top,)
        if reason is not None:
            return self._finish(sequence, fields, reason, stop, text)
        return Output(sequence.request.id, sequence.index, text=text, **fields)

    def _judge(self, sequence: Running, token: int, count: int) -> tuple[str, str | None, int | str | None]:
        """(text to show, why the sequence ends or None, the stop text or token that ends it) with its newest token."""
        state, params = sequence.state, sequence.request.params
        if token in params.stop_token_ids:
            return "", "stop", token
        if token in self._ends and not params.ignore_eos:
            return "", "stop", None
        text, stop = state.text.push(token, count > params.min_tokens) if state.text else ("", None)
        if stop is not None or (state.matcher is not None and self._constrained_end(state.matcher, token)):
            return text, "stop", stop
        full = count >= state.limit or len(sequence.tokens) >= self.max_model_len
        return text, "length" if full else None, None

    @staticmethod
    def _constrained_end(matcher: Any, token: int) -> bool:
        """Tell the matcher of a token; whether nothing more may come."""
        matcher.consume_token(token)
        return matcher.is_stopped()

    def _finish(self, sequence: Running, fields: dict, reason: str, stop: int | str | None, text: str) -> Output:
        if sequence.state.text and not isinstance(stop, str):
            text += sequence.state.text.flush()
        sequence.state = None
        self._scheduler.remove(sequence)
        name = sequence.request.id
        if all(other.state is None for other in self._requests[name]):
            del self._requests[name]
            self._counters["finished"] += 1
        return Output(name, sequence.index, text=text, finish_reason=reason, stop_reason=stop, **fields)

    # Pausing and new weights

    def pause(self, mode: PauseMode = "keep") -> list[Output]:
        """See `Engine.pause`."""
        outputs: list[Output] = []
        if mode == "abort":
            outputs = self.abort(list(self._requests))
        elif mode == "wait":
            while self._scheduler.running and not self._mixed:
                outputs += self._step(admit=False)
        elif mode != "keep":
            raise ValueError(f"pause mode {mode!r}; expected 'keep', 'wait' or 'abort'")
        self._paused = True
        return outputs

    def resume(self) -> None:
        """See `Engine.resume`."""
        if self._updating:
            raise RuntimeError("a weight update is under way; finish it first")
        if self._asleep:
            raise RuntimeError("the engine is asleep; wake it")
        self._paused = False

    @property
    def _mixed(self) -> bool:
        """Whether the weights are not those of one version: nothing may be computed with them."""
        return bool(self._stale or (self._updating and self._touched))

    def sleep(self, weights: bool = False) -> list[Output]:
        """See `Engine.sleep`."""
        if self._updating:
            raise RuntimeError("a weight update is under way; finish it first")
        if weights and self._borrowed:
            raise ValueError("this engine computes with somebody else's model, whose weights it cannot give back")
        outputs = self.pause()
        self._asleep = True
        self._scheduler.recompute_all()
        self.runner.hold(cache=False, weights=not weights)
        if weights:
            self._stale = "it has given its weights back"
        return outputs

    def wake(self) -> None:
        """See `Engine.wake`."""
        if self._updating:
            raise RuntimeError("a weight update is under way; finish it first")
        self.runner.hold(cache=True, weights=True)
        self._asleep, self._resume_after = False, True
        self._paused = self._stale is not None

    def start_weight_update(self, mode: PauseMode = "keep") -> list[Output]:
        """See `Engine.start_weight_update`."""
        if self._updating:
            if self._touched:  # given up half-way, for this one
                self._stale = "an update was begun anew before it was finished"
        elif not self._stale:  # else it is paused because the last update failed
            self._resume_after = not self._paused
        outputs = self.pause(mode)
        if self._asleep:
            self.runner.hold(cache=False, weights=True)
        self._updating, self.confirmed = True, None
        self._touched.clear()
        return outputs

    def update_weights(self, weights: Mapping[str, Tensor] | str | Pushed) -> None:
        """See `Engine.update_weights`. A failed call ends the update; what it had changed makes the engine stale."""
        if not self._updating:
            raise RuntimeError("no weight update is under way; call start_weight_update first")
        self.confirmed = None
        try:
            if isinstance(weights, str | Pushed):
                self._touched |= {"?"}  # one that fails half-way leaves a mixture
                if isinstance(weights, str):
                    self.runner.update_from(weights)
                else:
                    self.confirmed = self._take(weights)
                self._touched = set(self.runner.names())
            else:
                self.runner.update(weights)
                self._touched |= set(weights)
        except WriterGone:  # nothing is wrong here: requests wait, with the update under way, for the next push
            raise
        except Exception as error:  # a damaged file is as bad as a wrong shape
            self._fail(str(error))
            raise

    def _take(self, pushed: Pushed) -> int:
        """Take a push; `confirmed` of it."""
        if pushed.offers:
            return confirm(self.runner.copy(pushed.offers), pushed)
        sums = self.runner.take(pushed.path, pushed.turn)
        if pushed.checksums is None:
            pushed = replace(pushed, checksums=self.runner.written(pushed.path, pushed.turn))
        return confirm(sums, pushed)

    @property
    def device(self) -> str:
        """`device_memory.identity` of where all weights are; "" where they are on several devices, or on the CPU."""
        return identity(self.model.weights.device) if self.model.world.mesh.size == 1 else ""

    @property
    def tensors(self) -> Mapping[str, Spec]:
        """Canonical tensors of the model, as they are held."""
        return self.model.layout().tensors

    def write_weights(self, path: str) -> None:
        """Write all weights into a `SharedDirectory` of `tensors` on this node, for other engines to load.

        Raises WeightUpdateError where they are not whole, or a rank is on another node.
        """
        if self._mixed or self._asleep:
            raise WeightUpdateError("the engine's weights are not whole at the moment")
        self.runner.write(path)

    def verify(self, pushed: Pushed) -> int:
        """`confirmed` of what the engine holds now, whatever it has been told.

        Raises WeightUpdateError naming a tensor that is not as it was pushed.
        """
        return confirm(self.runner.take(pushed.path, None) if pushed.path else self.runner.sums(), pushed)

    def finish_weight_update(self, version: int) -> None:
        """See `Engine.finish_weight_update`."""
        if not self._updating:
            raise RuntimeError("no weight update is under way; call start_weight_update first")
        if self._stale and not self.runner.names() <= self._touched:
            self._fail(self._stale)
            raise WeightUpdateError(f"after a failed update ({self._stale}) all weights must come anew; some did not")
        self._stale, self._updating = None, False
        self.version = version
        self._scheduler.recompute_all()
        self._paused = self._asleep or not self._resume_after

    def _fail(self, reason: str) -> None:
        self._updating = False
        if self._touched or self._stale:
            self._stale = reason
        else:  # nothing was changed: the old weights are whole
            self._paused = self._asleep or not self._resume_after

    def stats(self) -> Stats:
        """See `Engine.stats`."""
        scheduler = self._scheduler
        stale = self._stale or ("its last push was not finished" if self._updating and "?" in self._touched else None)
        return Stats(
            running=len(scheduler.running),
            waiting=scheduler.waiting,
            kv_usage=scheduler.pool.held / scheduler.pool.size,
            kv_blocks=scheduler.pool.size,
            preemptions=scheduler.preemptions,
            version=self.version,
            paused=self._paused,
            health=f"stale: {stale}" if stale else "ready",
            **self._counters,
        )

    def close(self) -> None:
        """See `Engine.close`."""
        if not self._closed:
            self._closed = True
            self.runner.stop()
            self._requests.clear()


def _tokenizer(file: Path) -> tuple[Any, str]:
    """The tokenizers library's object in a tokenizer.json, and the file's text."""
    import tokenizers

    text = file.read_text()
    try:
        return tokenizers.Tokenizer.from_str(text), text
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{file}: can't be read ({error}); export the tokenizer again") from error
