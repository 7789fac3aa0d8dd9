"""Megatron's PUT /api: its fields, its limits and its answer, with errors that are HTTP errors.

Most requests are one request of the engine for each prompt. Two of Megatron's options change the sampling from token to
token (`top_p_decay` with `top_p_bound`, and `prevent_newline_after_colon`), which no engine does: for those the answer
is fetched token by token, each a request of its own whose prompt the engine finds cached. `beam_width` searches in the
same way, for one prompt, by `length_penalty`. A response's `logprobs` are of the model itself, before temperature,
and begin with the prompt's second token.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from raytron.inference import Collector, Output, Request, SamplingParams
from raytron.inference.types import MOST_LOGPROBS
from raytron.serving.answers import Numbered, unless_gone
from raytron.serving.backend import Backend, ModelCard
from raytron.serving.protocol import Refused, parse
from raytron.serving.rendering import finite
from raytron.serving.service import Service, json_response
from raytron.serving.text import Text

__all__ = ["MegatronRequest", "generate"]

log = logging.getLogger("raytron.serving")
FORBIDDEN = -100.0  # the least that a logit bias may be: e^-100 of the probability


class MegatronRequest(BaseModel):
    """The body of PUT /api; `model` is ours, for applications with several."""

    model_config = ConfigDict(strict=True, extra="forbid")

    prompts: Annotated[list[str], Field(min_length=1, max_length=128)]
    model: str = ""
    tokens_to_generate: Annotated[int, Field(ge=0, lt=1 << 31)] = 64
    logprobs: bool = False
    temperature: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    top_p_decay: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    top_p_bound: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = 0.0
    add_BOS: bool = False
    stop_on_double_eol: bool = False
    stop_on_eol: bool = False
    prevent_newline_after_colon: bool = False
    random_seed: Annotated[int, Field(ge=-1, lt=1 << 31)] = -1
    no_log: bool = False
    stop_token: Annotated[int | None, Field(ge=0, lt=1 << 31)] = None
    length_penalty: Annotated[float, Field(ge=-10, le=10, allow_inf_nan=False)] = 1.0
    top_n_logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] = 0
    beam_width: Annotated[int | None, Field(ge=1, le=MOST_LOGPROBS // 2)] = None
    max_len: Any = None
    sentences: Any = None

    def check(self) -> None:
        """Raise Refused for fields that don't go together."""
        wrong = {
            "max_len": self.max_len is not None and "is no longer used; say tokens_to_generate",
            "sentences": self.sentences is not None and "is no longer used; say prompts",
            "tokens_to_generate": self.tokens_to_generate == 0 and not self.logprobs and "0 needs logprobs to be true",
            "top_p": self.top_p > 0 and self.top_k > 0 and "and top_k exclude each other; set one of them",
            "top_p_decay": self.top_p_decay > 0 and self.top_p == 0 and "needs top_p",
            "top_p_bound": self.top_p_bound > 0 and not self.top_p_bound <= self.top_p and "must not exceed top_p",
            "prompts": not self.add_BOS and not all(self.prompts) and "that are empty need add_BOS to be true",
            "beam_width": self.beam_width is not None and len(self.prompts) > 1 and "takes one prompt only",
        }
        if found := next(((name, what) for name, what in wrong.items() if what), None):
            raise Refused(f"{found[0]} {found[1]}", param=found[0])
        if self.beam_width is not None and not self.tokens_to_generate:
            raise Refused("beam_width needs tokens_to_generate", param="beam_width")

    def params(self, number: int) -> SamplingParams:
        """For prompt `number`."""
        scored = self.top_n_logprobs if self.logprobs or self.top_n_logprobs else None
        return SamplingParams(
            temperature=1.0 if self.top_k == 1 else self.temperature,
            top_k=self.top_k,
            top_p=self.top_p or 1.0,
            seed=None if self.random_seed < 0 else self.random_seed + (number << 32),
            max_tokens=self.tokens_to_generate,
            logprobs=self.top_n_logprobs or None,
            prompt_logprobs=scored,
            stop=("\n\n",) * self.stop_on_double_eol + ("\n",) * self.stop_on_eol,
            stop_token_ids=() if self.stop_token is None else (self.stop_token,),
            ignore_eos=self.stop_token is not None,
        )


async def generate(service: Service, http: HTTPRequest) -> Response:
    """Answer one request."""
    asked = await parse(MegatronRequest, await http.body())
    asked.check()
    card = service.card(asked.model)
    text = await service.text(card)
    if not asked.no_log:
        log.info("PUT /api from %s: %s", http.state.caller.id, asked.model_dump(exclude={"prompts"}))
    ids = [await text.encode(prompt, special=False) for prompt in asked.prompts]
    if asked.add_BOS:
        ids = [[text.begin, *prompt] for prompt in ids]
    requests = [
        service.request(card, one, asked.params(number), http.state.caller, "api") for number, one in enumerate(ids)
    ]
    if asked.beam_width is not None:
        return json_response(await unless_gone(http, _beams(service, card, text, asked, requests[0])))
    stepwise = asked.top_p_decay > 0 or asked.prevent_newline_after_colon
    backend = _Stepwise(service.backend, asked, text) if stepwise and asked.tokens_to_generate else service.backend
    answer = service.open(http, card, requests, source=backend)
    return await service.whole(http, answer, lambda outputs: _body(asked, text, requests, outputs))


def _body(asked: MegatronRequest, text: Text, requests: Sequence[Request], outputs: list[Numbered]) -> dict[str, Any]:
    """The response, with Megatron's names."""
    collector = Collector()
    for request in requests:
        collector.expect(request)
    for moment in outputs:
        for _, output in moment:
            collector.put(output)
    found = [collector.generations[request.id] for request in requests]
    tokens = [[*one.prompt_token_ids, *one.outputs[0].token_ids] for one in found]
    body: dict[str, Any] = {
        "text": [text.decode(ids) for ids in tokens],
        "tokens": tokens,
        "segments": [[text.token_text(token) for token in ids] for ids in tokens],
    }
    if asked.logprobs:
        scored = ([*(one.prompt_logprobs or ()), *one.outputs[0].logprobs] for one in found)
        body["logprobs"] = [[finite(logprob) for logprob in row] for row in scored]
    if asked.top_n_logprobs:
        rows = ([*(one.prompt_top_logprobs or ()), *one.outputs[0].top_logprobs] for one in found)
        body["top_n_logprobs"] = [[_best(text, top, asked.top_n_logprobs) for top in row] for row in rows]
    return body


def _best(text: Text, top: Mapping[int, float], count: int) -> dict[str, float]:
    best = sorted(top.items(), key=lambda pair: -pair[1])[:count]
    return {text.token_text(token): finite(logprob) for token, logprob in best}


# ------------------------------------------------------------------------------------------------------ token by token


class _Stepwise:
    """A backend whose sampling changes from token to token."""

    def __init__(self, backend: Backend, asked: MegatronRequest, text: Text) -> None:
        self.backend, self.asked, self.text = backend, asked, text
        encoded = (text.tokenizer.encode(sign) for sign in (":", "\n"))
        self.colon, self.newline = (ids[0] if ids else None for ids in encoded)

    async def generate(self, model: str, request: Request) -> AsyncGenerator[list[Output], None]:
        """Like `Backend.generate`."""
        made: list[int] = []
        while True:
            one = self._next(request, made)
            async with aclosing(self.backend.generate(model, one)) as stream:
                outputs = [output async for some in stream for output in some]
            for output in outputs:
                made += output.token_ids
            last = outputs[-1]
            reason = None if last.finish_reason == "length" else last.finish_reason
            if reason is None and self._stopped(made, request.params.stop):
                reason = "stop"
            elif reason is None and len(made) >= (request.params.max_tokens or 0):
                reason = "length"
            yield [replace(output, request_id=request.id, finish_reason=None) for output in outputs[:-1]] + [
                replace(last, request_id=request.id, finish_reason=reason)
            ]
            if reason is not None:
                return

    def _next(self, request: Request, made: list[int]) -> Request:
        """The request for the next token."""
        asked, params, ids = self.asked, request.params, (*request.prompt_token_ids, *made)
        top_p = params.top_p
        if asked.top_p_decay > 0:
            top_p = max(asked.top_p * asked.top_p_decay ** len(made), asked.top_p_bound, 1e-6)
        after_colon = asked.prevent_newline_after_colon and self.newline is not None and ids[-1] == self.colon
        params = replace(
            params,
            max_tokens=1,
            top_p=top_p,
            logit_bias={self.newline: FORBIDDEN} if after_colon else {},
            seed=None if params.seed is None else params.seed + len(made) * 7919,
            stop=(),
            prompt_logprobs=None if made else params.prompt_logprobs,
        )
        return Request(f"{request.id}-{len(made)}", ids, params, request.client)

    def _stopped(self, made: list[int], stops: Sequence[str]) -> bool:
        tail = self.text.decode(made[-8:])
        return any(stop in tail for stop in stops)


# ---------------------------------------------------------------------------------------------------------- beam search


async def _beams(
    service: Service, card: ModelCard, text: Text, asked: MegatronRequest, request: Request
) -> dict[str, Any]:
    """The `beam_width` likeliest continuations, by log-probability / length^length_penalty; best first."""
    width, end = asked.beam_width or 1, text.tokenizer.eod if asked.stop_token is None else asked.stop_token
    beams: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    done: list[tuple[float, tuple[int, ...]]] = []

    def score(total: float, made: Sequence[int]) -> float:
        return total / max(1, len(made)) ** asked.length_penalty

    for _ in range(asked.tokens_to_generate):
        tops = await asyncio.gather(*(_likeliest(service.backend, card.id, request, made, width) for _, made in beams))
        grown = [(p + q, (*made, t)) for (p, made), top in zip(beams, tops, strict=True) for t, q in top.items()]
        grown.sort(reverse=True)
        done += [(score(total, made), made) for total, made in grown[:width] if made[-1] == end]
        beams = [(total, made) for total, made in grown if made[-1] != end][:width]
        done = sorted(done, reverse=True)[:width]
        if not beams or (len(done) == width and done[-1][0] >= score(*beams[0])):
            break
    done = sorted([*done, *((score(total, made), made) for total, made in beams)], reverse=True)[:width]
    whole = [[*request.prompt_token_ids, *made] for _, made in done]
    return {
        "text": [text.decode(ids) for ids in whole],
        "tokens": whole,
        "segments": [[text.token_text(token) for token in ids] for ids in whole],
        "scores": [finite(total) for total, _ in done],
    }


async def _likeliest(
    backend: Backend, model: str, request: Request, made: tuple[int, ...], width: int
) -> dict[int, float]:
    """Token -> log-probability of the likeliest next ones."""
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=2 * width, ignore_eos=True)
    ids = (*request.prompt_token_ids, *made)
    one = Request(f"{request.id}-{uuid.uuid4().hex[:8]}", ids, params, request.client)
    async with aclosing(backend.generate(model, one)) as stream:
        outputs = [output async for some in stream for output in some]
    return dict(next(top for output in outputs for top in output.top_logprobs or ()))
