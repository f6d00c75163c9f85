"""/v1/chat/completions and /v1/completions: validate, admit, tokenize, run, answer."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from opentelemetry.trace import Span
from starlette.types import Receive, Scope, Send

from core.errors import Cancelled, InternalError, Overloaded, SlipstreamError, Unavailable
from core.metrics import GatewayMetrics
from core.tracing import serving, traceparent_of
from core.types import Request
from gateway.admission import Admission
from gateway.backend import Backend
from gateway.config import GatewayConfig
from gateway.exchange import Exchange, Guard
from gateway.generation import Choice, Piece, best, merge, run
from gateway.params import build_requests, check_limits, check_token_ids, max_tokens, slo_from_headers
from gateway.protocol import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest, parse
from gateway.render import Renderer, renderer_for
from gateway.seeds import Seeds
from gateway.spans import OPERATIONS, describe
from gateway.speculation import may_be_remembered, wanted_speculation
from gateway.structured import wanted_grammar
from gateway.tokenizer import MESSAGE_CHARS, ServedModel, inline_or_thread
from gateway.vetting import Vetting

logger = logging.getLogger(__name__)

DEADLINE_MARGIN_S = 1.0
"""The backend ends a request by its deadline; one that has not by this much later is cut off here."""
JSON_BYTES_PER_CHAR = 8
"""So many bytes of a body are parsed in the time it takes to tokenize one character."""


@dataclass(frozen=True)
class Service:
    """What every endpoint needs."""

    backend: Backend
    model: ServedModel
    config: GatewayConfig
    metrics: GatewayMetrics
    admission: Admission
    seeds: Seeds
    vetting: Vetting


def template_messages(messages: list[ChatMessage]) -> list[dict[str, str]]:
    """As chat templates expect them. They know no developer: OpenAI's newer name for system."""
    return [
        {**m.model_dump(exclude_none=True), "role": "system" if m.role == "developer" else m.role} for m in messages
    ]


def _encode_chat(model: ServedModel, body: ChatRequest) -> list[int]:
    text = model.render_chat(
        template_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt,
        template_kwargs=body.chat_template_kwargs,
    )
    return model.encode_prompt(text, "messages", add_special_tokens=body.add_special_tokens)


class CompletionsEndpoint:
    """An ASGI application for one kind of body. Every request is answered exactly once, errors included."""

    def __init__(self, service: Service, kind: type[ChatRequest | CompletionRequest]) -> None:
        self._service = service
        self._kind = kind
        self._operation = OPERATIONS[kind.__name__]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        try:
            with serving(self._operation, exchange.headers.get("traceparent", "")) as span:
                await self._serve(exchange, span)
        except Cancelled:
            return  # nobody is there to be answered
        except SlipstreamError as error:
            if isinstance(error, (Overloaded, Unavailable)):
                self._service.metrics.refused(error)
            await exchange.fail(error)
        except Exception:
            logger.exception("request %s failed", exchange.request_id)
            await exchange.fail(InternalError("internal error; the server's log says more"))

    async def _serve(self, exchange: Exchange, span: Span) -> None:
        service = self._service
        exchange.check_request_id()
        with Guard(service.config.request_timeout_s + DEADLINE_MARGIN_S) as guard:
            raw = await exchange.read_body(service.config.max_body_bytes)
            body = await inline_or_thread(len(raw) // JSON_BYTES_PER_CHAR, parse, self._kind, raw)
            name = service.model.check_name(body.model)
            num_prompts = len(body.prompt) if isinstance(body, CompletionRequest) else 1
            check_limits(body, num_prompts, service.model, service.config)
            with service.admission.admit(num_prompts * body.num_candidates, guard.end):
                guard.watch(exchange.receive)
                base_id = uuid.uuid4().hex
                requests = await self._requests(body, exchange, base_id, traceparent_of(span))
                choices = [Choice(i, request, body, service.model) for i, request in enumerate(requests)]
                renderer = renderer_for(body, service.model, name, base_id, choices)
                try:
                    if body.stream:
                        await self._stream(exchange, choices, renderer)
                    else:
                        await self._answer(exchange, body, choices, renderer)
                finally:
                    describe(span, self._operation, name, exchange, choices)

    async def _requests(self, body: GenerationRequest, exchange: Exchange, base_id: str, trace: str) -> list[Request]:
        config = self._service.config
        has_logprobs = body.needed_alternatives is not None
        speculation = wanted_speculation(body, config.speculation, has_logprobs=has_logprobs)
        wanted = wanted_grammar(body, config.max_grammar_bytes)
        if wanted is not None:
            await self._service.vetting.check(*wanted)
        elapsed = time.perf_counter() - exchange.arrived
        return build_requests(
            body,
            await self._tokenize(body),
            self._service.model,
            self._service.seeds,
            grammar=wanted[1] if wanted else None,
            base_id=base_id,
            deadline=time.time() + config.request_timeout_s - elapsed,
            slo=slo_from_headers(exchange.headers),
            speculation=speculation,
            remember=may_be_remembered(body, exchange.headers),
            trace=trace,
        )

    async def _tokenize(self, body: GenerationRequest) -> list[list[int]]:
        model = self._service.model
        if isinstance(body, ChatRequest):
            size = sum(len(message.content) + MESSAGE_CHARS for message in body.messages)
            return [await inline_or_thread(size, _encode_chat, model, body)]
        assert isinstance(body, CompletionRequest)  # there is no third kind
        prompts = []
        for prompt in body.prompt:
            if isinstance(prompt, str):
                special = body.add_special_tokens
                ids = await inline_or_thread(
                    len(prompt), model.encode_prompt, prompt, "prompt", add_special_tokens=special
                )
                prompts.append(ids)
            else:
                max_tokens(body, len(prompt), model)  # so that only ids that fit the context are looked at
                check_token_ids(prompt, "prompt", model)
                prompts.append(prompt)
        return prompts

    async def _stream(self, exchange: Exchange, choices: list[Choice], renderer: Renderer) -> None:
        async with aclosing(self._run(exchange, choices)) as pieces:
            async for piece in pieces:
                if data := renderer.chunk(piece):
                    await exchange.write(data)
        await exchange.end(renderer.closing())

    async def _answer(
        self, exchange: Exchange, body: GenerationRequest, choices: list[Choice], renderer: Renderer
    ) -> None:
        whole = [Piece(choice.index, "", []) for choice in choices]
        async with aclosing(self._run(exchange, choices)) as pieces:
            async for piece in pieces:
                whole[piece.choice].extend(piece)
        answer = best(whole, body)
        size = renderer.num_logprobs(answer)
        await exchange.reply(await inline_or_thread(size, renderer.encoded, answer))

    def _run(self, exchange: Exchange, choices: list[Choice]) -> AsyncGenerator[Piece]:
        backend, metrics = self._service.backend, self._service.metrics
        streams = []
        for choice in choices:
            request = choice.request
            timer = metrics.track(len(request.prompt_token_ids), exchange.arrived, request.slo)
            streams.append(run(backend, choice, timer))
        return merge(streams)
