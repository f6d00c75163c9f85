"""Reads a streamed OpenAI answer (completions or chat) into a Timeline, decoding only what is measured."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from bench.serving.timeline import Timeline

MAX_REASON_CHARS = 300


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None

    def written(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning_content or self.delta.reasoning or ""


class _CachedTokens(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class CompletionStream:
    """The sink of one request. After the exchange, `close` gives the verdict on the timeline."""

    def __init__(self, timeline: Timeline, *, keep_text: bool) -> None:
        self._timeline = timeline
        self._keep_text = keep_text
        self._text: list[str] = []
        self._rest = b""
        self._now = 0.0
        self._done = False
        self._other: list[bytes] = []
        """Lines that are no events: the JSON body of an error."""

    def feed(self, data: bytes, now: float) -> None:
        self._now = now
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._line(line, now)

    def close(self, status: int) -> None:
        """Judge the answer, once the body has ended."""
        if self._rest:
            self._line(self._rest, self._now)
        timeline = self._timeline
        timeline.text = "".join(self._text)
        if status != 200:
            timeline.error = f"HTTP {status}: {_message(b''.join(self._other))}"
        elif timeline.error is None and not timeline.finished:
            # Some servers leave the finish reason out; [DONE] after text is as good.
            timeline.finished = self._done and bool(timeline.chunks)
            if not timeline.finished:
                timeline.error = "the stream broke off" if timeline.chunks else "no event with text came"

    def _line(self, line: bytes, now: float) -> None:
        if line.startswith(b"data:"):
            self._event(line[5:].strip(), now)
        elif line.strip() and not line.startswith((b":", b"event:", b"id:", b"retry:")):
            self._other.append(line)

    def _event(self, payload: bytes, now: float) -> None:
        if payload == b"[DONE]":
            self._done = True
            return
        try:
            chunk = _decode(payload)
        except msgspec.DecodeError as error:
            self._timeline.error = f"a chunk is not what the OpenAI API sends: {error}"
            return
        if chunk.error is not None:
            self._timeline.error = _shorten(_error_text(chunk.error))
            return
        for choice in chunk.choices:
            self._choice(choice, now)
        if chunk.usage is not None:
            self._count(chunk.usage)

    def _choice(self, choice: _Choice, now: float) -> None:
        timeline = self._timeline
        if (text := choice.written()) or choice.token_ids:
            timeline.chunks.append(now)
            timeline.end = now
            if self._keep_text:
                self._text.append(text)
        if choice.finish_reason is not None:
            timeline.finished = True
            timeline.end = now

    def _count(self, usage: _Usage) -> None:
        timeline = self._timeline
        timeline.prompt_tokens = usage.prompt_tokens
        timeline.completion_tokens = usage.completion_tokens
        if usage.prompt_tokens_details is not None:
            timeline.cached_tokens = usage.prompt_tokens_details.cached_tokens or 0


def _message(body: bytes) -> str:
    """What a failed answer says: OpenAI's error.message, FastAPI's detail, or the body as it is."""
    try:
        value = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return _shorten(body.decode("utf-8", "replace") or "no body")
    if isinstance(value, dict):
        value = value.get("error") or value.get("detail") or value
    return _shorten(_error_text(value))


def _error_text(error: Any) -> str:
    if isinstance(error, dict) and "message" in error:
        return str(error["message"])
    return error if isinstance(error, str) else msgspec.json.encode(error).decode()


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MAX_REASON_CHARS else line[: MAX_REASON_CHARS - 1] + "…"
