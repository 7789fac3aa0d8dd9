"""The HTTP application: routes, errors in OpenAI's shape, and a door in front (`guard`). Knows `Backend`, not Ray."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import Response

from raytron.config import ServeConfig
from raytron.inference import EngineFailed, Overloaded, WeightUpdateError
from raytron.serving import protocol
from raytron.serving.answers import ClientGone, refusal
from raytron.serving.backend import Backend, ModelCard
from raytron.serving.chats import chat
from raytron.serving.completion import complete
from raytron.serving.guard import Guard
from raytron.serving.megatron import MegatronRequest, generate
from raytron.serving.metrics import CONTENT_TYPE
from raytron.serving.protocol import Refused, parse
from raytron.serving.service import Service, json_response

__all__ = ["create_app"]

log = logging.getLogger("raytron.serving")
CLOSED_REQUEST = 499  # nginx's: the client left; nobody reads it
# The page is one file; nothing may be loaded from elsewhere, nor the page be put inside another.
PAGE_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def create_app(backend: Backend, config: ServeConfig | None = None) -> FastAPI:
    """The ASGI application that serves the models of `backend`."""
    config = config or ServeConfig()
    service = Service(backend, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        # Tokenizers are read now rather than while the first request waits; one that can't be is that model's trouble.
        await asyncio.gather(*(service.text(card) for card in backend.models().values()), return_exceptions=True)
        yield

    app = FastAPI(title="raytron", version=version("raytron"), docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.service = service
    app.add_middleware(Guard, config=config, limits=service.limits)
    _errors(app)
    _openai(app, service)
    _operations(app, service)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    return app


def _openai(app: FastAPI, service: Service) -> None:
    """What generates, and what goes with it."""

    @app.post("/v1/completions", openapi_extra=_body("CompletionRequest"))
    async def completions(http: Request) -> Response:
        return await complete(service, http)

    @app.post("/v1/chat/completions", openapi_extra=_body("ChatRequest"))
    async def chat_completions(http: Request) -> Response:
        return await chat(service, http)

    @app.put("/api", openapi_extra=_body("MegatronRequest"))
    async def megatron(http: Request) -> Response:
        return await generate(service, http)

    @app.get("/v1/models")
    async def models() -> Response:
        cards = service.backend.models().values()
        return json_response({"object": "list", "data": [_card(card) for card in cards]})

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        return json_response(_card(service.card(model)))

    @app.post("/tokenize", openapi_extra=_body("TokenizeRequest"))
    async def tokenize(http: Request) -> Response:
        return json_response(await _tokenize(service, http))

    @app.post("/detokenize", openapi_extra=_body("DetokenizeRequest"))
    async def detokenize(http: Request) -> Response:
        asked = await parse(protocol.DetokenizeRequest, await http.body())
        text = await service.text(service.card(asked.model))
        if (highest := max(asked.tokens, default=0)) >= text.tokenizer.vocab_size:
            last = text.tokenizer.vocab_size - 1
            raise Refused(f"token {highest} is not in the vocabulary, which ends at {last}", param="tokens")
        return json_response({"prompt": await asyncio.to_thread(text.decode, asked.tokens)})


async def _tokenize(service: Service, http: Request) -> dict[str, Any]:
    asked = await parse(protocol.TokenizeRequest, await http.body())
    card = service.card(asked.model)
    text = await service.text(card)
    if (asked.prompt is None) == (asked.messages is None):
        raise Refused("give either prompt or messages")
    if asked.prompt is not None:
        ids = await text.encode(asked.prompt, special=asked.add_special_tokens is not False)
    else:
        rendered = await text.chat(
            [message.for_template(position) for position, message in enumerate(asked.messages or ())],
            [tool.model_dump(exclude_none=True) for tool in asked.tools or ()] or None,
            add_generation_prompt=asked.add_generation_prompt is not False,
        )
        ids = await text.encode(rendered.prompt, special=bool(asked.add_special_tokens))
    found: dict[str, Any] = {"count": len(ids), "max_model_len": card.max_model_len, "tokens": ids}
    return found | ({"token_strs": [text.token_text(token) for token in ids]} if asked.return_token_strs else {})


def _operations(app: FastAPI, service: Service) -> None:
    """Health, numbers, weights, and the page."""
    page = files("raytron.serving").joinpath("page/index.html").read_bytes()

    @app.get("/")
    async def chat_page() -> Response:
        headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff"}
        return Response(page, media_type="text/html", headers=headers)

    @app.get("/health")
    async def health() -> Response:
        problems = service.backend.problems()
        return json_response({"status": "ok"} if not problems else {"status": "failing"}, 503 if problems else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.page(await _stats(service)), media_type=CONTENT_TYPE)

    @app.get("/admin/stats")
    async def stats() -> Response:
        found = {model: [asdict(engine) for engine in engines] for model, engines in (await _stats(service)).items()}
        return json_response({"models": found, "problems": dict(service.backend.problems())})

    @app.post("/admin/weights", openapi_extra=_body("WeightsRequest"))
    async def weights(http: Request) -> Response:
        asked = await parse(protocol.WeightsRequest, await http.body())
        card = service.card(asked.model)
        begun = time.perf_counter()
        try:
            version = await service.backend.update_weights(card.id, asked.path, asked.mode, asked.version)
        except WeightUpdateError as error:
            raise Refused(f"the weights don't fit: {error}", param="path", code="weight_update_failed") from error
        seconds = round(time.perf_counter() - begun, 3)
        return json_response({"model": card.id, "version": version, "seconds": seconds})


async def _stats(service: Service) -> dict[str, Any]:
    models = list(service.backend.models())
    return dict(zip(models, await asyncio.gather(*map(service.backend.stats, models)), strict=True))


def _card(card: ModelCard) -> dict[str, Any]:
    return {
        "id": card.id,
        "object": "model",
        "created": card.created,
        "owned_by": "raytron",
        "max_model_len": card.max_model_len,
        "weight_version": card.version,
    }


# --------------------------------------------------------------------------------------------------------------- errors


def _errors(app: FastAPI) -> None:
    """Everything that goes wrong, in OpenAI's shape."""

    async def known(http: Request, error: Exception) -> Response:
        refused = refusal(error)
        assert refused is not None
        return _told(http, refused)

    async def of_http(http: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        what = {404: f"there is no {http.url.path[:200]}", 405: f"{http.method} isn't for {http.url.path[:200]}"}
        message = what.get(error.status_code, str(error.detail))
        return _told(http, Refused(message, status=error.status_code, headers=dict(error.headers or {})))

    async def gone(http: Request, error: Exception) -> Response:
        return Response(status_code=CLOSED_REQUEST)

    async def unknown(http: Request, error: Exception) -> Response:
        log.error("answering %s failed", http.url.path, exc_info=error)
        return _told(http, Refused("an internal error; the server's log has more", status=500))

    for kind in (Refused, Overloaded, EngineFailed, ValueError):
        app.add_exception_handler(kind, known)
    app.add_exception_handler(HTTPException, of_http)
    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(Exception, unknown)


def _told(http: Request, refused: Refused) -> Response:
    body = refused.body()
    if http.url.path == "/api":  # Megatron's command line reads this
        body["message"] = refused.message
    return json_response(body, refused.status, refused.headers)


# -------------------------------------------------------------------------------------------------------------- OpenAPI

BODIES = (
    protocol.CompletionRequest,
    protocol.ChatRequest,
    protocol.TokenizeRequest,
    protocol.DetokenizeRequest,
    protocol.WeightsRequest,
    MegatronRequest,
)


def _body(name: str) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{name}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _openapi(app: FastAPI) -> dict[str, Any]:
    """The document, with the bodies' schemas: they are parsed here and not by FastAPI, which so doesn't know them."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        template = "#/components/schemas/{model}"
        _, schemas = models_json_schema([(body, "validation") for body in BODIES], ref_template=template)
        document.setdefault("components", {}).setdefault("schemas", {}).update(schemas["$defs"])
        app.openapi_schema = document
    return app.openapi_schema
