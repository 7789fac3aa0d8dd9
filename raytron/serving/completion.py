"""POST /v1/completions: prompts in, their continuations out, whole or streamed."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from raytron.inference import Collector, Completion, Generation, Output, Request
from raytron.serving.answers import Answer, Numbered
from raytron.serving.backend import ModelCard
from raytron.serving.protocol import CompletionRequest, Refused, parse, prompts_of
from raytron.serving.rendering import Chunks, completion_logprobs, joined, version_spans
from raytron.serving.service import Service, created, usage
from raytron.serving.text import Text

__all__ = ["complete"]


async def complete(service: Service, http: HTTPRequest) -> Response:
    """Answer one request."""
    asked = await parse(CompletionRequest, await http.body())
    card, params = service.card(asked.model), asked.params()
    text = await service.text(card)
    prompts = prompts_of(asked.prompt)
    if len(prompts) > service.config.max_prompts:
        most = service.config.max_prompts
        raise Refused(f"there are {len(prompts)} prompts; at most {most} are taken", param="prompt")
    special = asked.add_special_tokens is not False
    ids = await asyncio.gather(*(_ids(text, prompt, special) for prompt in prompts))
    caller = http.state.caller
    requests = [service.request(card, one, params, caller, "cmpl") for one in ids]
    answer = service.open(http, card, requests, asked.stream)
    rendering = _Rendering(asked, card, text, requests, answer)
    if asked.stream:
        return await service.streamed(http, answer, rendering.events, rendering.end)
    return await service.whole(http, answer, rendering.body)


async def _ids(text: Text, prompt: str | list[int], special: bool) -> list[int]:
    return await text.encode(prompt, special=special) if isinstance(prompt, str) else prompt


class _Rendering:
    """Outputs of one HTTP request, as OpenAI writes them."""

    def __init__(
        self, asked: CompletionRequest, card: ModelCard, text: Text, requests: list[Request], answer: Answer
    ) -> None:
        self.asked, self.text, self.requests, self.timer = asked, text, requests, answer.timer
        self.n = asked.n or 1
        self.common = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": created(),
            "model": card.id,
        }
        self.chunks = Chunks(self.common, '"text":', "")
        self._begun: set[tuple[int, int]] = set()
        self._offsets: dict[tuple[int, int], int] = {}
        asks = (asked.logprobs is not None, asked.echo, asked.return_token_ids, asked.return_weight_versions)
        self._plain = not any(asks)
        self._used = self.timer if asked.usage_always else None

    # ------------------------------------------------------------------------------------------------------- in a piece

    def body(self, outputs: list[Numbered]) -> dict[str, Any]:
        """The whole answer."""
        collector = Collector()
        for request in self.requests:
            collector.expect(request)
        for moment in outputs:
            for _, output in moment:
                collector.put(output)
        generations = [collector.generations[request.id] for request in self.requests]
        choices = [self._whole(k, g, c) for k, g in enumerate(generations) for c in g.outputs]
        return {
            **self.common,
            "choices": choices,
            "usage": usage(self.timer),
            "weight_version": self.timer.version,
        }

    def _whole(self, number: int, generation: Generation, completion: Completion) -> dict[str, Any]:
        choice = self._choice(number, completion)
        if self.asked.echo:
            prompt = self.text.decode(generation.prompt_token_ids)
            choice["text"] = prompt + choice["text"]
            if self.asked.logprobs is not None:
                choice["logprobs"] = self._echoed(generation, completion)
        elif self.asked.logprobs is not None:
            choice["logprobs"] = self._logprobs(completion)
        return choice

    def _echoed(self, generation: Generation | Output, part: Completion | Output, prompt: tuple[int, ...] = ()) -> Any:
        """Log-probabilities of prompt and output together; the first token of a prompt has none."""
        ids = prompt or tuple(generation.prompt_token_ids)  # type: ignore[union-attr]
        scored = generation.prompt_logprobs or (float("nan"),) * (len(ids) - 1)
        tops = generation.prompt_top_logprobs or ({},) * (len(ids) - 1)
        own = part.top_logprobs or ({},) * len(part.token_ids)
        return completion_logprobs(
            self.text, (*ids, *part.token_ids), (None, *scored, *part.logprobs), (None, *tops, *own)
        )

    def _logprobs(self, part: Completion | Output, offset: int = 0) -> dict[str, Any]:
        tops = part.top_logprobs or ({},) * len(part.token_ids)
        return completion_logprobs(self.text, part.token_ids, part.logprobs, tops, offset)

    def _choice(self, number: int, part: Completion | Output) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": number * self.n + part.index,
            "text": part.text,
            "logprobs": None,
            "finish_reason": part.finish_reason,
            "stop_reason": part.stop_reason,
        }
        if self.asked.return_token_ids:
            choice["token_ids"] = list(part.token_ids)
        if self.asked.return_weight_versions:
            choice["weight_versions"] = version_spans(part.versions)
        return choice

    # --------------------------------------------------------------------------------------------------------- streamed

    def events(self, outputs: Numbered) -> bytes:
        """Chunks for what has just come."""
        return "".join(self._chunk(number, part) for number, part in joined(outputs)).encode()

    def _chunk(self, number: int, part: Output | Completion) -> str:
        version = part.versions[-1] if part.versions else self.timer.version
        if self._plain and part.finish_reason is None:
            text = part.text or self._used
            return self.chunks.text(number * self.n + part.index, part.text, version, self._used) if text else ""
        choice, key = self._choice(number, part), (number, part.index)
        first = key not in self._begun
        self._begun.add(key)
        prompt = self.requests[number].prompt_token_ids
        if self.asked.echo and first:
            choice["text"] = self.text.decode(prompt) + choice["text"]
        if self.asked.logprobs is not None:
            choice["logprobs"] = self._streamed_logprobs(key, part, prompt if self.asked.echo and first else ())
        elif not (choice["text"] or part.finish_reason or self.asked.return_token_ids or self.asked.usage_always):
            return ""
        return self.chunks.any([choice], version, self._used)

    def _streamed_logprobs(
        self, key: tuple[int, int], part: Output | Completion, prompt: tuple[int, ...]
    ) -> Mapping[str, Any]:
        offset = self._offsets.get(key, 0)
        found = self._echoed(part, part, prompt) if prompt else self._logprobs(part, offset)  # type: ignore[arg-type]
        self._offsets[key] = offset + sum(map(len, found["tokens"]))
        return found

    def end(self) -> bytes:
        """The last chunk, if it was asked for."""
        return self.chunks.any([], self.timer.version, self.timer).encode() if self.asked.usage_at_end else b""
