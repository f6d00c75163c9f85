"""One request to an OpenAI endpoint, from bytes made beforehand to a Timeline."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import msgspec

from bench.serving.datasets import Prompt
from bench.serving.http import HttpClient, RequestFailed
from bench.serving.options import ServeOptions
from bench.serving.stream import CompletionStream
from bench.serving.timeline import Timeline


@dataclass(frozen=True, slots=True)
class Client:
    """Sends requests over kept connections. A failure of any kind is an error on the timeline, never an exception."""

    http: HttpClient
    timeout: float
    """Seconds a request may take."""
    keep_text: bool

    async def run(self, request: bytes, timeline: Timeline) -> Timeline:
        stream = CompletionStream(timeline, keep_text=self.keep_text)
        timeline.start = perf_counter()
        try:
            async with asyncio.timeout(self.timeout) as limit:
                status = await self.http.send(request, stream)
        except (RequestFailed, OSError) as error:
            timeline.error = f"no end within --request-timeout {self.timeout:g} s" if limit.expired() else str(error)
        else:
            stream.close(status)
        timeline.end = timeline.end or perf_counter()
        return timeline


def encode_requests(http: HttpClient, options: ServeOptions, model: str, prompts: list[Prompt]) -> list[bytes]:
    """All requests as bytes, so that encoding costs nothing while the clock runs."""
    encode = msgspec.json.Encoder().encode
    return [
        http.request(encode(payload(options, model, prompt)), f"{options.request_id_prefix}{i}")
        for i, prompt in enumerate(prompts)
    ]


def payload(options: ServeOptions, model: str, prompt: Prompt) -> dict[str, Any]:
    """The body of a request. --extra-body wins over every other flag."""
    body: dict[str, Any] = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    if options.backend == "openai-chat":
        body |= {
            "messages": [{"role": "user", "content": prompt.content}],
            "max_completion_tokens": prompt.output_len,
        }
    else:
        body |= {"prompt": prompt.content, "max_tokens": prompt.output_len}
    if options.ignore_eos:
        body["ignore_eos"] = True
    return body | options.sampling | options.extra_body
