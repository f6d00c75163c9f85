"""The gateway's HTTP application: the OpenAI endpoints, and those operators and vLLM's users know."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version

import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from core.errors import Cancelled, InternalError, InvalidRequest, SlipstreamError, Unavailable
from core.metrics import GatewayMetrics, WorkerCollector
from gateway.admission import Admission, OneByOne
from gateway.backend import Backend
from gateway.completions import CompletionsEndpoint, Service, template_messages
from gateway.config import GatewayConfig
from gateway.exchange import Exchange, error_body
from gateway.params import check_messages, check_token_ids
from gateway.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from gateway.seeds import make_seeds
from gateway.tokenizer import INLINE_CHARS, ServedModel
from gateway.vetting import Vetting

Handler = Callable[[Exchange, Scope], Awaitable[None]]


def create_app(backend: Backend, model: ServedModel, config: GatewayConfig, metrics: GatewayMetrics) -> Starlette:
    """An ASGI application for one event loop. `app.state.admission` drains it (gateway.server does)."""
    admission = Admission(config.max_concurrent_requests, config.retry_after_s)
    vetting = Vetting(model.tokenizer_json, model.vocab_size)
    service = Service(backend, model, config, metrics, admission, make_seeds(config.seed), vetting)
    metrics.registry.register(
        WorkerCollector(
            lambda: backend.status().workers,
            model_name=model.names[0],
            routes=lambda: backend.status().routes,
            replanning=lambda: backend.status().replanning,
        )
    )
    pages = Pages(service)
    routes = [
        _route("/v1/models", pages.models),
        _route("/v1/models/{model:path}", pages.model),
        Route("/v1/chat/completions", CompletionsEndpoint(service, ChatRequest), methods=["POST"]),
        Route("/v1/completions", CompletionsEndpoint(service, CompletionRequest), methods=["POST"]),
        _route("/tokenize", pages.tokenize, "POST"),
        _route("/detokenize", pages.detokenize, "POST"),
        _route("/health", pages.health),
        _route("/ping", pages.health, "GET", "POST"),
        _route("/-/healthz", pages.alive),
        _route("/version", pages.version),
        _route("/replanning", pages.replanning),
        Route("/metrics", pages.metrics),
    ]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _on_http_error, Exception: _on_defect})
    app.router.redirect_slashes = False
    app.state.admission = admission
    return app


class _Page:
    """A handler as an ASGI application that answers SlipstreamErrors in OpenAI's shape."""

    def __init__(self, handler: Handler) -> None:
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            await self._handler(exchange, scope)
        except Cancelled:
            return  # nobody is there to be answered
        except SlipstreamError as error:
            await exchange.refuse(error)


def _route(path: str, handler: Handler, *methods: str) -> Route:
    return Route(path, _Page(handler), methods=list(methods or ("GET",)))


class Pages:
    """Everything but generation."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started = int(time.time())
        self._texts = OneByOne(service.config.max_waiting_texts, service.config.retry_after_s)

    # --- models and text -------------------------------------------------------------------------------------------

    async def models(self, exchange: Exchange, _: Scope) -> None:
        model = self._service.model
        cards = [self._card(name) for name in (*model.names, *model.adapters)]
        await exchange.reply({"object": "list", "data": cards})

    async def model(self, exchange: Exchange, scope: Scope) -> None:
        name = self._service.model.check_name(scope["path_params"]["model"])
        await exchange.reply(self._card(name))

    def _card(self, name: str) -> dict[str, object]:
        model = self._service.model
        return {
            "id": name,
            "object": "model",
            "created": self._started,
            "owned_by": "slipstream",
            "root": model.adapters.get(name, model.names[0]),
            "parent": model.adapter_bases.get(name, model.names[0]) if name in model.adapters else None,
            "max_model_len": model.max_model_len,
        }

    async def tokenize(self, exchange: Exchange, _: Scope) -> None:
        await self._convert(exchange, self._tokenized)

    async def detokenize(self, exchange: Exchange, _: Scope) -> None:
        await self._convert(exchange, self._detokenized)

    async def _convert(self, exchange: Exchange, convert: Callable[[bytes], msgspec.Raw]) -> None:
        """Answer with `convert(body)`: a large body in a thread, parsing and the writing of JSON included."""
        raw = await exchange.read_body(self._service.config.max_body_bytes)
        answer = convert(raw) if len(raw) <= INLINE_CHARS else await self._texts.run(convert, raw)
        await exchange.reply(answer)

    def _tokenized(self, raw: bytes) -> msgspec.Raw:
        body = parse(TokenizeRequest, raw)
        model = self._service.model
        model.check_name(body.model)
        special = body.add_special_tokens
        if body.prompt is not None and body.messages is None:
            text, special = body.prompt, special is not False
        elif body.messages is not None and body.prompt is None:
            text, special = self._chat_text(body), special is True
        else:
            raise InvalidRequest("send either prompt or messages", param="prompt")
        tokens = model.encode(text, add_special_tokens=special)
        strings = [model.token_text(i) for i in tokens] if body.return_token_strs else None
        answer = {"count": len(tokens), "max_model_len": model.max_model_len, "tokens": tokens, "token_strs": strings}
        return msgspec.Raw(msgspec.json.encode(answer))

    def _chat_text(self, body: TokenizeRequest) -> str:
        check_messages(body.messages or [], self._service.model)
        return self._service.model.render_chat(
            template_messages(body.messages or []),
            add_generation_prompt=body.add_generation_prompt,
            template_kwargs=body.chat_template_kwargs,
        )

    def _detokenized(self, raw: bytes) -> msgspec.Raw:
        body = parse(DetokenizeRequest, raw)
        model = self._service.model
        model.check_name(body.model)
        check_token_ids(body.tokens, "tokens", model)
        return msgspec.Raw(msgspec.json.encode({"prompt": model.decode(body.tokens, skip_special_tokens=False)}))

    # --- operations ------------------------------------------------------------------------------------------------

    async def health(self, exchange: Exchange, _: Scope) -> None:
        """200 only when a request sent now would be served."""
        if self._service.admission.draining:
            raise Unavailable("the server is shutting down")
        status = self._service.backend.status()
        if not status.ready:
            raise Unavailable(f"not ready: {status.reason}")
        await exchange.reply({"status": "ok"})

    async def alive(self, exchange: Exchange, _: Scope) -> None:
        """200 as long as this process answers."""
        await exchange.reply("success")

    async def version(self, exchange: Exchange, _: Scope) -> None:
        await exchange.reply({"version": version("slipstream")})

    async def replanning(self, exchange: Exchange, _: Scope) -> None:
        """Where it stands, and what was decided lately."""
        await exchange.reply(self._service.backend.status().replanning or {"mode": "off"})

    async def metrics(self, request: HttpRequest) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(self._service.metrics.registry), media_type=content_type)


async def _on_http_error(request: HttpRequest, error: Exception) -> Response:
    """Unknown paths and methods, which the router reports."""
    assert isinstance(error, HTTPException)  # registered for this class only
    path, status = request.url.path, error.status_code
    message = f"{request.method} is not allowed on {path}" if status == 405 else f"there is no {path} here"
    body = error_body(InvalidRequest(message))
    body["error"]["code"] = "method_not_allowed" if status == 405 else "not_found"
    return JSONResponse(body, status, headers=error.headers)


async def _on_defect(_: HttpRequest, __: Exception) -> Response:
    """Starlette raises the exception again after this answer, so the server logs it."""
    return JSONResponse(error_body(InternalError("internal error; the server's log says more")), 500)
