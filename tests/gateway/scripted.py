"""A tiny model (byte-level BPE with a chat template) and a backend that plays what a test tells it to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client import CollectorRegistry
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.metrics import GatewayMetrics
from core.replan_metrics import ReplanStatus
from core.types import Finish, FinishReason, Request, TokenDelta
from core.wire import WorkerStatus
from gateway.app import create_app
from gateway.backend import BackendStatus
from gateway.config import GatewayConfig
from gateway.tokenizer import ServedModel

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPUS = ["hello world, how are you today? the quick brown fox jumps over the lazy dog 😀 é STOP END"] * 4
MAX_MODEL_LEN = 256


def write_model(folder: Path, **tokenizer_config: object) -> Path:
    """A model folder without weights."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in ("<|im_start|>", "<|im_end|>")])
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("<|im_end|>")
    config = {"max_position_embeddings": MAX_MODEL_LEN, "vocab_size": tokenizer.get_vocab_size(), "eos_token_id": eos}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": eos, "top_p": 0.9, "top_k": 7}))
    settings = {"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE, **tokenizer_config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


Script = Callable[[Request], AsyncIterator[TokenDelta]]


@dataclass
class ScriptedBackend:
    """Plays `script` for every request; `open` counts iterators that were neither exhausted nor closed."""

    script: Script
    requests: list[Request] = field(default_factory=list)
    open: int = 0
    all_closed: asyncio.Event = field(default_factory=asyncio.Event)
    arrivals: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(0))
    ready: bool = True
    workers: tuple[WorkerStatus, ...] = ()
    replanning: ReplanStatus | None = None

    async def generate(self, request: Request) -> AsyncIterator[TokenDelta]:
        self.requests.append(request)
        self.open += 1
        self.arrivals.release()
        try:
            async for delta in self.script(request):
                yield delta
        finally:
            self.open -= 1
            if self.open == 0:
                self.all_closed.set()

    def status(self) -> BackendStatus:
        reason = "" if self.ready else "no worker is alive"
        return BackendStatus(ready=self.ready, reason=reason, workers=self.workers, replanning=self.replanning)


def says(token_ids: list[int], finish: Finish | None = None, *, cached: int = 0, per_delta: int = 1) -> Script:
    """Emits the tokens, then ends with `finish` (LENGTH by default)."""
    finish = finish or Finish(reason=FinishReason.LENGTH)

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        for index in range(0, len(token_ids), per_delta):
            last = index + per_delta >= len(token_ids)
            yield TokenDelta(
                request_id=request.request_id,
                index=index,
                token_ids=token_ids[index : index + per_delta],
                num_cached_tokens=cached if index == 0 else 0,
                finish=finish if last else None,
            )

    return script


def fails(error: Exception, after: list[int]) -> Script:
    """Emits the tokens, then raises."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        for index, token_id in enumerate(after):
            yield TokenDelta(request_id=request.request_id, index=index, token_ids=[token_id])
        raise error

    return script


def hangs(after: list[int]) -> Script:
    """Emits the tokens, then nothing any more."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        for index, token_id in enumerate(after):
            yield TokenDelta(request_id=request.request_id, index=index, token_ids=[token_id])
        await asyncio.Event().wait()

    return script


class Gateway:
    """An application under test, its parts, and a client without a network."""

    def __init__(self, model: ServedModel, script: Script, **config: object) -> None:
        self.model = model
        self.registry = CollectorRegistry()
        self.backend = ScriptedBackend(script)
        self.metrics = GatewayMetrics(self.registry, model_name="tiny", replica="g0")
        self.app = create_app(self.backend, model, GatewayConfig.model_validate(config), self.metrics)
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://gateway")

    async def post(self, path: str, headers: dict[str, str] | None = None, **body: object) -> httpx.Response:
        return await self.client.post(path, json=body, headers=headers)

    async def chat(self, **body: object) -> httpx.Response:
        return await self.post("/v1/chat/completions", **{"messages": [{"role": "user", "content": "hi"}], **body})

    async def complete(self, **body: object) -> httpx.Response:
        return await self.post("/v1/completions", **{"prompt": "hello world", **body})

    def sample(self, name: str, **labels: str) -> float:
        labels = {"model_name": "tiny", "role": "gateway", "replica": "g0"} | labels
        return self.registry.get_sample_value(name, labels) or 0.0

    def ends(self) -> dict[str, float]:
        """Sequences ended, by reason."""
        counts = {r.value: self.sample("vllm:request_success_total", finished_reason=r.value) for r in FinishReason}
        return {reason: count for reason, count in counts.items() if count}


MakeGateway = Callable[..., Gateway]


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The events of a stream, which must end with [DONE]."""
    blocks = response.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


def chat_text(chunks: list[dict[str, Any]], choice: int = 0) -> str:
    parts = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice]
    return "".join(part["delta"].get("content", "") for part in parts)
