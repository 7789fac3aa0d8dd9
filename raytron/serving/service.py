"""What all endpoints share: models by name, their text, requests made of prompts, and one way to answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from raytron.config import ServeConfig
from raytron.inference import Request, SamplingParams
from raytron.serving.answers import Answer, ClientGone, EventStream, Numbered, Source, refusal
from raytron.serving.backend import Backend, ModelCard
from raytron.serving.limits import Caller, Limits
from raytron.serving.metrics import Metrics, Timer
from raytron.serving.protocol import Refused
from raytron.serving.text import Text

__all__ = ["Service", "event", "json_response", "usage"]

VERSION_HEADER = "x-raytron-weight-version"
MOST_SEQUENCES = 256  # of all prompts of one HTTP request
log = logging.getLogger("raytron.serving")


class Service:
    """The application behind the routes."""

    def __init__(self, backend: Backend, config: ServeConfig) -> None:
        self.backend, self.config = backend, config
        self.metrics, self.limits = Metrics(), Limits(config)
        self._texts: dict[str, asyncio.Future[Text]] = {}

    def card(self, name: str) -> ModelCard:
        """The model of that name, or the only one for no name. Raises Refused (404)."""
        models = self.backend.models()
        if not name and len(models) == 1:
            return next(iter(models.values()))
        if name not in models:
            served = ", ".join(sorted(models)) or "none"
            raise Refused(
                f"the model {name[:200]!r} is not served here; there is {served}",
                status=404,
                param="model",
                code="model_not_found",
            )
        return models[name]

    async def text(self, card: ModelCard) -> Text:
        """Its tokenizer and template, read once."""
        reading = self._texts.get(card.path)
        if reading is None or (reading.done() and reading.exception()):
            reading = self._texts[card.path] = asyncio.ensure_future(asyncio.to_thread(Text, card.path))
        return await asyncio.shield(reading)

    def request(
        self, card: ModelCard, ids: Sequence[int], params: SamplingParams, caller: Caller, kind: str
    ) -> Request:
        """A request for the engine. Raises Refused for one that is longer than the model's context."""
        room, asked = card.max_model_len - len(ids), params.max_tokens
        if not ids:
            raise Refused("the prompt is empty", param="prompt")
        if room < (1 if asked is None else asked):
            more = "" if asked is None else f" and {asked} tokens to generate"
            raise Refused(
                f"this model's context is {card.max_model_len} tokens; {len(ids)} tokens of prompt{more} are more",
                param="prompt" if asked is None or room <= 0 else "max_tokens",
                code="context_length_exceeded",
            )
        return Request(f"{kind}-{uuid.uuid4().hex}", tuple(ids), params, caller.id)

    def open(
        self,
        http: HTTPRequest,
        card: ModelCard,
        requests: Sequence[Request],
        streamed: bool | None = False,
        source: Source | None = None,
    ) -> Answer:
        """Begin to answer; the answer has to be closed. Raises Refused for too many sequences.

        streamed: outputs are seen as they come. source: where they come from instead of the backend.
        """
        sequences = sum(request.params.n for request in requests)
        if sequences > MOST_SEQUENCES:
            raise Refused(f"prompts x n is {sequences}; at most {MOST_SEQUENCES} are taken", param="n")
        tokens = sum(len(request.prompt_token_ids) for request in requests)
        timer = Timer(self.metrics, card.id, http.url.path, tokens, card.version, sequences)
        return Answer(source or self.backend, card.id, requests, timer, unseen=not streamed)

    async def whole(self, http: HTTPRequest, answer: Answer, render: Callable[[list[Numbered]], Any]) -> Response:
        """Answer in one piece, the JSON that `render` makes of all outputs."""
        try:
            outputs = await answer.all(http)
            body = render(outputs)
            return json_response(body, headers={VERSION_HEADER: str(answer.timer.version)})
        except BaseException as error:
            answer.failed(error)
            raise
        finally:
            self._spend(http, answer)
            await answer.close()

    async def streamed(
        self,
        http: HTTPRequest,
        answer: Answer,
        render: Callable[[Numbered], bytes],
        end: Callable[[], bytes],
    ) -> Response:
        """Answer as server-sent events: what `render` makes of outputs as they come, then `end`, then [DONE]."""
        try:
            await answer.start(http)
        except BaseException as error:
            answer.failed(error)
            await answer.close()
            raise
        events = self._events(http, answer, render, end)
        return EventStream(answer, events, {VERSION_HEADER: str(answer.first_version)})

    async def _events(
        self, http: HTTPRequest, answer: Answer, render: Callable[[Numbered], bytes], end: Callable[[], bytes]
    ) -> AsyncGenerator[bytes, None]:
        try:
            async for outputs in answer:
                if events := render(outputs):
                    yield events
            yield end() + b"data: [DONE]\n\n"
        except Exception as error:  # the status is out already, so the error is an event
            answer.failed(error)
            known = refusal(error)
            if known is None:
                log.exception("answering %s failed", http.url.path)
            refused = known or Refused("an internal error; the server's log has more", status=500)
            yield event(refused.body()) + b"data: [DONE]\n\n"
        finally:
            self._spend(http, answer)

    def _spend(self, http: HTTPRequest, answer: Answer) -> None:
        self.limits.spend(http.state.caller, answer.timer.prompt_tokens + answer.timer.generated_tokens)


def event(body: Mapping[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def json_response(body: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON, as compact as it goes."""
    raw = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
    return Response(raw, status_code=status, headers=dict(headers or {}), media_type="application/json")


def usage(timer: Timer) -> dict[str, Any]:
    """OpenAI's usage so far."""
    return {
        "prompt_tokens": timer.prompt_tokens,
        "completion_tokens": timer.generated_tokens,
        "total_tokens": timer.prompt_tokens + timer.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": timer.cached_tokens},
    }


def created() -> int:
    """Now, as OpenAI writes it."""
    return int(time.time())


__all__ += ["VERSION_HEADER", "ClientGone", "created"]
