"""What clients may send: OpenAI's requests, with vLLM's additions, and limits on everything that has a length.

Types are strict and unknown fields are refused by name: a misspelt `max_token` is better noticed than ignored. OpenAI's
fields that mean nothing here (`user`, `store`, ...) are taken and passed over; those that would change the answer and
can't be honoured (`suffix`, `best_of`, ...) are refused. Objects inside (messages, parts) may hold more than is read.

Lists are measured before their items are looked at, and the first bad item ends the look: otherwise four megabytes of
nulls would become gigabytes of error messages.
"""

from __future__ import annotations

import asyncio
import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field, ValidationError, WithJsonSchema
from pydantic_core import from_json

from raytron.inference import SamplingParams
from raytron.inference.types import MOST_LOGPROBS, MOST_SEQUENCES, MOST_STOPS, PauseMode

__all__ = [
    "ChatRequest",
    "CompletionRequest",
    "DetokenizeRequest",
    "Message",
    "Refused",
    "TokenizeRequest",
    "WeightsRequest",
    "parse",
    "prompts_of",
]

M = TypeVar("M", bound=BaseModel)
LARGE = 64 * 1024  # bytes of JSON beyond which parsing leaves the event loop
LONGEST_SCHEMA = 64 * 1024
MOST_TOKEN_IDS = 1 << 22
_SAME = ("n", "temperature", "top_p", "presence_penalty", "frequency_penalty")  # names that the engine shares
_SAME += ("top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens")


class Refused(Exception):  # noqa: N818
    """A request answered with an error, in OpenAI's shape. `status` is of HTTP; `param` names the field at fault."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.status, self.param, self.code, self.headers = message, status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _at_most(length: int) -> BeforeValidator:
    def check(value: Any) -> Any:
        if isinstance(value, str | list | dict) and len(value) > length:
            what = {str: "characters", list: "items", dict: "entries"}[type(value)]
            raise ValueError(f"has {len(value)} {what}; at most {length} are taken")
        return value

    return BeforeValidator(check)


def _only(*allowed: Any) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value is not None and value not in allowed:
            raise ValueError("isn't supported here; leave it out")
        return value

    return BeforeValidator(check)


def _prompt(value: Any) -> Any:
    """A text, token ids, or a list of either."""
    items = value if isinstance(value, list) and not _is_ids(value) else [value]
    if not items or not all(isinstance(item, str) or _is_ids(item) for item in items):
        raise ValueError("must be a text, a list of token ids, or a list of such; not empty")
    return value


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and 0 < len(value) <= MOST_TOKEN_IDS
        and all(type(token) is int and 0 <= token < 1 << 31 for token in value)
    )


def _stop(value: Any) -> Any:
    texts = [value] if isinstance(value, str) else value
    if texts is not None and not (isinstance(texts, list) and all(isinstance(text, str) and text for text in texts)):
        raise ValueError("must be a text or a list of texts, none of them empty")
    if texts and (len(texts) > MOST_STOPS or sum(map(len, texts)) > 16_384):
        raise ValueError(f"at most {MOST_STOPS} texts and 16384 characters are taken; there are {len(texts)} texts")
    return texts


class _FailFast(FailFast):
    """Can stand in a union, which hashes what it holds."""

    def __hash__(self) -> int:
        return hash(type(self))


_FIRST = _FailFast()
_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1}, "minItems": 1}
_PROMPTS = [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1}, _IDS, {"type": "array", "items": _IDS}]
Prompt = Annotated[Any, BeforeValidator(_prompt), WithJsonSchema({"anyOf": _PROMPTS})]
Stop = Annotated[Any, BeforeValidator(_stop), WithJsonSchema({"anyOf": [_TEXT, {"type": "array", "items": _TEXT}]})]
TokenIds = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], _FIRST]


class _Lenient(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class StreamOptions(_Lenient):
    """What a stream tells besides text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    """vLLM's: usage so far in every chunk."""


class StructuredOutputs(_Lenient):
    """vLLM's: what form the output has. `json` is a schema, as an object or as text."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: Annotated[str | None, Field(max_length=LONGEST_SCHEMA)] = None


class _Sampled(BaseModel):
    """Fields that completions and chats share."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: Annotated[str, Field(max_length=512)] = ""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int | None, Field(ge=1, le=MOST_SEQUENCES)] = None
    temperature: Annotated[float | None, Field(ge=0, le=100, allow_inf_nan=False)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1, allow_inf_nan=False)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2, allow_inf_nan=False)] = None
    logit_bias: Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]] | None, _at_most(1024)] = None
    seed: Annotated[int | None, Field(ge=-(1 << 63), lt=1 << 63)] = None
    stop: Stop = None
    max_tokens: Annotated[int | None, Field(ge=0, lt=1 << 31)] = None
    # vLLM's
    top_k: Annotated[int | None, Field(ge=-1, lt=1 << 31)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1, allow_inf_nan=False)] = None
    repetition_penalty: Annotated[float | None, Field(ge=0.001, le=100, allow_inf_nan=False)] = None
    stop_token_ids: Annotated[TokenIds | None, _at_most(1024)] = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int | None, Field(ge=0, lt=1 << 31)] = None
    regex: Annotated[str | None, Field(max_length=LONGEST_SCHEMA)] = None
    structured_outputs: StructuredOutputs | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    return_weight_versions: bool | None = None
    # OpenAI's that mean nothing here
    user: Annotated[str | None, Field(max_length=4096)] = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    request_id: Annotated[str | None, Field(max_length=512)] = None

    def sampling(self, *, max_tokens: int | None, logprobs: int | None, **others: Any) -> SamplingParams:
        """The engine's parameters. Raises Refused naming the field at fault."""
        given = {name: value for name in _SAME if (value := getattr(self, name)) is not None}
        given |= {"seed": self.seed % (1 << 62)} if self.seed is not None else {}
        given |= {"stop": tuple(self.stop or ()), "stop_token_ids": tuple(self.stop_token_ids or ())}
        try:
            bias = {int(token): value for token, value in (self.logit_bias or {}).items()}
            return SamplingParams(
                **given, logit_bias=bias, max_tokens=max_tokens, logprobs=logprobs, **(self._form() | others)
            )
        except ValueError as error:
            raise Refused(str(error).removeprefix("SamplingParams.")) from error

    def _form(self) -> dict[str, str]:
        """What the output has to look like, as asked for by vLLM's fields."""
        asked = self.structured_outputs
        form = {"regex": self.regex or (asked and asked.regex), "json_schema": asked and asked.json_}
        found = {name: _as_text(value, "structured_outputs") for name, value in form.items() if value is not None}
        return {name: text for name, text in found.items() if text}

    @property
    def usage_at_end(self) -> bool:
        """Whether the last chunk of a stream tells the usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def usage_always(self) -> bool:
        """Whether every chunk of a stream tells the usage so far."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


def _as_text(schema: Any, param: str) -> str:
    text = schema if isinstance(schema, str) else json.dumps(schema)
    if len(text) > LONGEST_SCHEMA:
        raise Refused(f"the schema has {len(text)} characters; at most {LONGEST_SCHEMA} are taken", param=param)
    return text


class CompletionRequest(_Sampled):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    suffix: Annotated[str | None, _only()] = None
    best_of: int | None = None

    def params(self) -> SamplingParams:
        """For each prompt."""
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise Refused("best_of other than n isn't supported; leave it out", param="best_of")
        scored = self.logprobs if self.echo else None
        tokens = 16 if self.max_tokens is None else self.max_tokens
        return self.sampling(max_tokens=tokens, logprobs=self.logprobs, prompt_logprobs=scored)


class Function(_Lenient):
    """A function that the model may call. `parameters` is a JSON schema."""

    name: Annotated[str, Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.-]+$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(_Lenient):
    """A tool, which is a function."""

    type: Literal["function"]
    function: Function


class _NamedFunction(_Lenient):
    name: str


class _NamedTool(_Lenient):
    type: Literal["function"]
    function: _NamedFunction


class _CalledFunction(_Lenient):
    name: str
    arguments: str = ""


class _Call(_Lenient):
    id: str | None = None
    type: Literal["function"] = "function"
    function: _CalledFunction


class _Part(_Lenient):
    type: str
    text: str | None = None


class Message(_Lenient):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | Annotated[list[_Part], _FIRST, _at_most(1024)] | None = None
    name: Annotated[str | None, Field(max_length=256)] = None
    tool_calls: Annotated[Annotated[list[_Call], _FIRST] | None, _at_most(128)] = None
    tool_call_id: Annotated[str | None, Field(max_length=256)] = None

    def for_template(self, position: int) -> dict[str, Any]:
        """As chat templates take it: text joined, arguments of calls as objects."""
        where = f"messages[{position}]"
        parts = self.content if isinstance(self.content, list) else []
        if other := next((part.type for part in parts if part.type != "text" or part.text is None), None):
            raise Refused(f"{where}: a part of type {other[:40]!r}; only text is understood", param="messages")
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise Refused(f"{where}: {self.role} needs content", param="messages")
        text = self.content if isinstance(self.content, str) else "".join(part.text or "" for part in parts)
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": text}
        turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(self, key)) is not None}
        if self.tool_calls:
            turn["tool_calls"] = [_call_for_template(call, where) for call in self.tool_calls]
        return turn


def _call_for_template(call: _Call, where: str) -> dict[str, Any]:
    try:
        arguments = from_json(call.function.arguments or "{}")
    except ValueError as error:
        raise Refused(f"{where}: arguments of a tool call aren't JSON ({error})", param="messages") from error
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class _JSONSchema(_Lenient):
    name: Annotated[str, Field(max_length=256)] = ""
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None


class ResponseFormat(_Lenient):
    """What the answer is: text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JSONSchema | None = None


class ChatRequest(_Sampled):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], _FIRST, _at_most(1024), Field(min_length=1)]
    max_completion_tokens: Annotated[int | None, Field(ge=0, lt=1 << 31)] = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    response_format: ResponseFormat | None = None
    tools: Annotated[Annotated[list[Tool], _FIRST] | None, _at_most(128)] = None
    tool_choice: Literal["none", "auto", "required"] | _NamedTool | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    modalities: Annotated[list[str] | None, _only(["text"])] = None
    audio: Annotated[dict[str, Any] | None, _only()] = None
    prediction: Annotated[dict[str, Any] | None, _only()] = None
    web_search_options: Annotated[dict[str, Any] | None, _only()] = None
    functions: Annotated[list[Any] | None, _only()] = None
    function_call: Annotated[Any, _only()] = None
    # vLLM's
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, _at_most(32)] = None

    def params(self, *, json_schema: str | None = None, stop: tuple[str, ...] = ()) -> SamplingParams:
        """For the one prompt; `json_schema` is what tools ask for, `stop` what the template does."""
        if self.top_logprobs is not None and not self.logprobs:
            raise Refused("top_logprobs needs logprobs to be true", param="top_logprobs")
        limit = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        form = self._response_form() if json_schema is None else {"json_schema": json_schema}
        params = self.sampling(max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None, **form)
        if stop and len(params.stop) + len(stop) <= MOST_STOPS:
            object.__setattr__(params, "stop", (*params.stop, *stop))
        return params

    def _response_form(self) -> dict[str, str]:
        match self.response_format:
            case None | ResponseFormat(type="text"):
                return {}
            case ResponseFormat(type="json_object"):
                return {"json_schema": '{"type": "object"}'}
            case ResponseFormat(json_schema=_JSONSchema(schema_=schema)) if schema is not None:
                return {"json_schema": _as_text(schema, "response_format")}
        raise Refused("response_format json_schema needs json_schema.schema", param="response_format")


class TokenizeRequest(BaseModel):
    """POST /tokenize: a prompt, or messages to put through the chat template."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ""
    prompt: str | None = None
    messages: Annotated[Annotated[list[Message], _FIRST] | None, _at_most(1024)] = None
    tools: Annotated[Annotated[list[Tool], _FIRST] | None, _at_most(128)] = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ""
    tokens: Annotated[TokenIds, _at_most(MOST_TOKEN_IDS)]


class WeightsRequest(BaseModel):
    """POST /admin/weights. path: a Hugging Face directory the engines can read; see `EngineLoop.update_weights`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str = ""
    path: Annotated[str, Field(min_length=1, max_length=4096)]
    mode: PauseMode = "keep"
    version: Annotated[int | None, Field(ge=0, lt=1 << 53)] = None


def prompts_of(prompt: Any) -> list[str | list[int]]:
    """The prompts in a completion's `prompt`."""
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


async def parse(kind: type[M], raw: bytes) -> M:
    """JSON text as a request of a kind, large ones off the event loop. Raises Refused saying what is wrong."""
    return _parse(kind, raw) if len(raw) < LARGE else await asyncio.to_thread(_parse, kind, raw)


def _parse(kind: type[M], raw: bytes) -> M:
    try:
        body = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        raise Refused(f"the body isn't JSON: {error}") from error
    if not isinstance(body, dict):
        raise Refused("the body must be a JSON object")
    if unknown := next((key for key in body if key not in kind.model_fields), None):
        raise Refused(f"unknown field {unknown[:80]!r}", param=unknown[:80])
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        where = ".".join(str(step)[:80] for step in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise Refused(f"{where}: {message}" if where else message, param=field) from error
