"""Runs one job and says how it ended. What the answer has to be is known beforehand, to the token."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from bench.serving.http import HttpClient, RequestFailed
from bench.soak.mix import Job

_DONE = b"data: [DONE]"


class Outcome(StrEnum):
    DONE = "done"
    """Answered, whole."""
    LEFT = "left"
    """The client left, as it meant to, after a part of the answer."""
    LEFT_UNANSWERED = "left unanswered"
    """The client left before any of the answer: the server may not have seen the request."""
    REFUSED = "refused"
    """A bad request, as it should be."""
    LOST = "lost"
    """No end, or not all of the tokens."""
    DOUBLED = "doubled"
    """A second end, or too many tokens."""
    FAILED = "failed"
    """An error instead of an answer, or an answer to a bad request."""


FAULTS = (Outcome.LOST, Outcome.DOUBLED, Outcome.FAILED)


@dataclass(frozen=True, slots=True)
class End:
    outcome: Outcome
    reason: str = ""
    """Of a fault."""
    tokens: int = 0


class _Answer:
    """Collects the body; leaves after so many events. Implements bench.serving.http.Sink."""

    def __init__(self, leave_events: int | None) -> None:
        self.data = bytearray()
        self._leave_events = leave_events
        self._patience: asyncio.Timeout | None = None

    def feed(self, data: bytes, _now: float) -> None:
        self.data += data
        if self._leave_events is None or self._patience is None or self._patience.expired():
            return
        if self.data.count(b"\n\n") >= self._leave_events:
            self._leave_events = None
            self._patience.reschedule(asyncio.get_running_loop().time())

    def leave_by(self, patience: asyncio.Timeout) -> None:
        self._patience = patience


class SoakClient:
    """`run` never raises for what the server does."""

    def __init__(self, base_url: str, timeout_s: float) -> None:
        self._clients = {path: HttpClient(base_url + path, {}) for path in ("/v1/completions", "/v1/chat/completions")}
        self._timeout_s = timeout_s

    async def run(self, job: Job, request_id: str) -> End:
        client, answer = self._clients[job.path], _Answer(job.leave_events)
        limit = self._timeout_s if job.leave_s is None else job.leave_s
        try:
            async with asyncio.timeout(limit) as patience:
                answer.leave_by(patience)
                status = await client.send(client.request(job.body, request_id), answer)
        except TimeoutError:
            return self._left(job, answer)
        except (RequestFailed, OSError) as error:
            return End(Outcome.LOST, str(error))
        return judge(job, status, bytes(answer.data))

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def _left(self, job: Job, answer: _Answer) -> End:
        if job.leave_s is None and job.leave_events is None:
            return End(Outcome.LOST, f"no end within {self._timeout_s:g} s")
        return End(Outcome.LEFT if answer.data else Outcome.LEFT_UNANSWERED)


def judge(job: Job, status: int, body: bytes) -> End:
    """How a request ended whose answer has come to its end."""
    if job.bad:
        return End(Outcome.REFUSED) if 400 <= status < 500 else End(Outcome.FAILED, f"bad request answered {status}")
    if status != 200:
        return End(Outcome.FAILED, f"status {status}: {body[:200].decode(errors='replace')}")
    try:
        return _judge_stream(job, body) if job.stream else _judge_whole(job, msgspec.json.decode(body))
    except (msgspec.DecodeError, KeyError, TypeError, ValueError) as error:
        return End(Outcome.LOST, f"the answer can't be read: {type(error).__name__}: {error}")


def _judge_whole(job: Job, answer: dict[str, Any]) -> End:
    choices = answer["choices"]
    ends = Counter({c["index"]: c["finish_reason"] is not None for c in choices})
    tokens = Counter({c["index"]: len(c.get("token_ids") or []) for c in choices})
    return _compare(job, ends, tokens, answer["usage"])


def _judge_stream(job: Job, body: bytes) -> End:
    events = [part for part in body.split(b"\n\n") if part]
    if not events or events[-1] != _DONE:
        return End(Outcome.LOST, "the stream ends without [DONE]")
    ends: Counter[int] = Counter()
    tokens: Counter[int] = Counter()
    usage: dict[str, Any] = {}
    for part in events[:-1]:
        event = msgspec.json.decode(part.removeprefix(b"data: "))
        if "error" in event:
            return End(Outcome.FAILED, str(event["error"].get("message")))
        usage = event.get("usage") or usage
        for choice in event["choices"]:
            if ends[choice["index"]]:
                return End(Outcome.DOUBLED, f"choice {choice['index']} goes on after its end")
            tokens[choice["index"]] += len(choice.get("token_ids") or [])
            ends[choice["index"]] += choice["finish_reason"] is not None
    return _compare(job, ends, tokens, usage)


def _compare(job: Job, ends: Counter[int], tokens: Counter[int], usage: dict[str, Any]) -> End:
    """Every choice ended, with as many tokens as it was asked for, and usage says the same."""
    if ends != Counter(dict.fromkeys(range(job.num_choices), 1)):
        return End(Outcome.LOST, f"{ends.total()} of {job.num_choices} choices ended")
    total = job.num_choices * job.max_tokens
    counts = [*tokens.values()] if tokens.total() else []  # a server that does not return ids is taken at its word
    told = usage.get("completion_tokens")
    if any(count > job.max_tokens for count in counts) or (told or 0) > total:
        return End(Outcome.DOUBLED, f"{tokens.total()} tokens, {told} by usage, where {total} were asked for")
    if any(count < job.max_tokens for count in counts) or told != total:
        return End(Outcome.LOST, f"{tokens.total()} tokens, {told} by usage, where {total} were asked for")
    return End(Outcome.DONE, tokens=total)
