"""POST /v1/chat/completions: a chat in, the next turn out, whole or streamed, with tool calls found in it."""

from __future__ import annotations

import uuid
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from raytron.inference import Collector, Completion, Output, Request
from raytron.serving.answers import Answer, Numbered
from raytron.serving.backend import ModelCard
from raytron.serving.protocol import ChatRequest, parse
from raytron.serving.rendering import Chunks, chat_logprobs, joined, version_spans
from raytron.serving.service import Service, created, usage
from raytron.serving.text import Text
from raytron.serving.tools import ToolCall, ToolParser, choice_of, forced_calls

__all__ = ["chat"]


async def chat(service: Service, http: HTTPRequest) -> Response:
    """Answer one request."""
    asked = await parse(ChatRequest, await http.body())
    card = service.card(asked.model)
    text = await service.text(card)
    tools, forced, schema = choice_of(asked)
    rendered = await text.chat(
        [message.for_template(position) for position, message in enumerate(asked.messages)],
        [tool.model_dump(exclude_none=True) for tool in tools] or None,
        add_generation_prompt=asked.add_generation_prompt is not False and not asked.continue_final_message,
        continue_final_message=bool(asked.continue_final_message),
        extra=asked.chat_template_kwargs,
    )
    params = asked.params(json_schema=schema, stop=rendered.stop)
    ids = await text.encode(rendered.prompt, special=bool(asked.add_special_tokens))
    request = service.request(card, ids, params, http.state.caller, "chatcmpl")
    answer = service.open(http, card, [request], asked.stream)
    rendering = _Rendering(asked, card, text, request, answer, forced, bool(tools))
    if asked.stream:
        return await service.streamed(http, answer, rendering.events, rendering.end)
    return await service.whole(http, answer, rendering.body)


class _Rendering:
    """Outputs of one HTTP request, as OpenAI writes them. `forced`: the tool the answer must call, "" for any."""

    def __init__(
        self,
        asked: ChatRequest,
        card: ModelCard,
        text: Text,
        request: Request,
        answer: Answer,
        forced: str | None,
        tools: bool,
    ) -> None:
        self.asked, self.text, self.request, self.timer, self.forced = asked, text, request, answer.timer, forced
        self.id, self.model, self.created = f"chatcmpl-{uuid.uuid4().hex}", card.id, created()
        common = {"id": self.id, "object": "chat.completion.chunk", "created": self.created, "model": self.model}
        self.chunks = Chunks(common, '"delta":{"content":', "}")
        self._begun: set[int] = set()
        self._parsers = {index: ToolParser() for index in range(request.params.n)} if tools and forced is None else {}
        self._called: dict[int, int] = {}  # choice -> how many calls it has been told of
        self._forced: dict[int, str] = {}  # choice -> what has come of a forced call
        asks = (asked.logprobs, tools, asked.return_token_ids, asked.return_weight_versions)
        self._plain = not any(asks)
        self._used = self.timer if asked.usage_always else None

    # ------------------------------------------------------------------------------------------------------- in a piece

    def body(self, outputs: list[Numbered]) -> dict[str, Any]:
        """The whole answer."""
        collector = Collector()
        collector.expect(self.request)
        for moment in outputs:
            for _, output in moment:
                collector.put(output)
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.model,
            "choices": [self._whole(part) for part in collector.generations[self.request.id].outputs],
            "usage": usage(self.timer),
            "weight_version": self.timer.version,
        }

    def _whole(self, part: Completion) -> dict[str, Any]:
        content, calls = self._parsed(part.index, part.text, last=True)
        message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
        message |= {"refusal": None} | ({"tool_calls": [call.body() for call in calls]} if calls else {})
        return self._choice(part, {"message": message}, bool(calls))

    def _parsed(self, index: int, text: str, last: bool) -> tuple[str, list[ToolCall]]:
        """Content and tool calls of new text."""
        if self.forced is not None:
            whole = self._forced[index] = self._forced.get(index, "") + text
            calls = forced_calls(whole, self.forced) if last else []
            return ("", calls) if calls is not None else (whole, [])
        if parser := self._parsers.get(index):
            return parser.feed(text, last=last)
        return text, []

    def _choice(self, part: Completion | Output, said: dict[str, Any], calls: bool) -> dict[str, Any]:
        reason = "tool_calls" if calls and part.finish_reason == "stop" else part.finish_reason
        choice: dict[str, Any] = {
            "index": part.index,
            **said,
            "logprobs": chat_logprobs(self.text, part) if self.asked.logprobs else None,
            "finish_reason": reason,
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
        return "".join(self._chunk(part) for _, part in joined(outputs)).encode()

    def _chunk(self, part: Output | Completion) -> str:
        version = part.versions[-1] if part.versions else self.timer.version
        opening = ""
        if part.index not in self._begun:
            self._begun.add(part.index)
            delta = {"role": "assistant", "content": ""}
            choice = {"index": part.index, "delta": delta, "logprobs": None, "finish_reason": None}
            opening = self.chunks.any([choice], version)
        if self._plain and part.finish_reason is None:
            text = part.text or self._used
            return opening + (self.chunks.text(part.index, part.text, version, self._used) if text else "")
        content, calls = self._parsed(part.index, part.text, last=part.finish_reason is not None)
        delta = {"content": content} if content or not calls else {}
        if calls:
            told = self._called.get(part.index, 0)
            self._called[part.index] = told + len(calls)
            delta["tool_calls"] = [{"index": told + k, **call.body()} for k, call in enumerate(calls)]
        worth = (
            content or calls or part.finish_reason or self.asked.logprobs or self._used or self.asked.return_token_ids
        )
        if not worth:
            return opening
        choice = self._choice(part, {"delta": delta}, bool(self._called.get(part.index)))
        return opening + self.chunks.any([choice], version, self._used)

    def end(self) -> bytes:
        """The last chunk, if it was asked for."""
        return self.chunks.any([], self.timer.version, self.timer).encode() if self.asked.usage_at_end else b""
