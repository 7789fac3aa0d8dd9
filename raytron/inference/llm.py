"""Offline generation: prompts in, generations out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

from raytron.config import EngineConfig
from raytron.data.tokenizer import load_tokenizer
from raytron.inference.launch import make_engine
from raytron.inference.types import Collector, Generation, Request, SamplingParams

__all__ = ["LLM"]

Prompt = str | Sequence[int]


class LLM:
    """A model to generate with, in this process (and with tp or pp above 1, in further ones on this machine).

    Args:
        path: Hugging Face directory of the model.
        engine: "native" or "vllm".
        tp, pp: tensor parallel size, pipeline stages.
        dtype: "fp32", "bf16", or "auto" for what the model's config.json says.
        options: further fields of `EngineConfig`.

    Use it as a context manager, or `close` it, where it has further processes.

    Raises:
        ValueError: no such model, options that do not fit it, or vLLM asked for and not installed.
    """

    def __init__(
        self, path: str, engine: str = "native", tp: int = 1, pp: int = 1, dtype: str = "auto", **options: Any
    ) -> None:
        self._start(EngineConfig(path=str(path), engine=engine, tp=tp, pp=pp, dtype=dtype, **options))

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """The same from a whole configuration."""
        made = cls.__new__(cls)
        made._start(config)
        return made

    def _start(self, config: EngineConfig) -> None:
        self.config = config
        self.engine = make_engine(config)
        self._tokenizer: Any = None
        self._ids = itertools.count()

    @property
    def tokenizer(self) -> Any:
        """The model's own; ValueError where its directory has none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.path)
        return self._tokenizer

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Generation]:
        """Continue each prompt (a text, or token ids); answers come in the order of the prompts.

        Args:
            params: for all of them, or one for each; by default 16 tokens at temperature 1.

        Raises:
            ValueError: a prompt or parameter the engine cannot serve; nothing of the call is left in it.
        """
        single = isinstance(prompts, str) or (bool(prompts) and isinstance(prompts[0], int))
        prompts = [prompts] if single else list(prompts)
        each = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(each)} params for {len(prompts)} prompts; give one for all, or one for each")
        done = {g.request_id: g for g in self.stream(zip(prompts, each, strict=True))}
        return [done[name] for name in sorted(done, key=int)]

    def stream(
        self, prompts: Iterable[tuple[Prompt, SamplingParams]], window: int | None = None
    ) -> Iterator[Generation]:
        """Generations as they are finished, in whatever order that is; `request_id` is the prompt's number.

        Args:
            prompts: taken one by one, no more than `window` of them under way (None: all at once).
        """
        collector, numbered = Collector(), enumerate(prompts)
        batch = next(self._ids)
        more = True
        try:
            while True:
                while more and (window is None or len(collector.generations) < window):
                    more = self._take(numbered, batch, collector)
                if not collector.generations:
                    return
                for output in self.engine.step():
                    generation = collector.put(output)
                    if output.finish_reason is not None and generation.finished:
                        del collector.generations[output.request_id]
                        generation.request_id = output.request_id.partition("-")[2]
                        yield generation
        finally:
            self.engine.abort(list(collector.generations))

    def _take(self, numbered: Iterator[tuple[int, Any]], batch: int, collector: Collector) -> bool:
        """Add the next prompt; False if there is none."""
        number, (prompt, params) = next(numbered, (-1, (None, None)))
        if prompt is None:
            return False
        ids = self.encode(prompt) if isinstance(prompt, str) else tuple(prompt)
        request = Request(f"{batch}-{number}", ids, params)
        self.engine.add(request)
        collector.expect(request, prompt if isinstance(prompt, str) else None)
        return True

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a prompt, with the special tokens (a beginning-of-text) the tokenizer's own template puts there."""
        tokenizer = self.tokenizer
        backend = getattr(tokenizer, "backend", None)
        return tuple(backend.encode(text).ids if backend is not None else tokenizer.encode(text))

    def update_weights(self, weights: Mapping[str, Any] | str, version: int | None = None) -> None:
        """New weights: canonical name -> tensor, or a Hugging Face directory; see `Engine.update_weights`."""
        self.engine.start_weight_update()
        self.engine.update_weights(weights)
        self.engine.finish_weight_update(self.engine.version + 1 if version is None else version)

    def close(self) -> None:
        """End what was started."""
        self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()
