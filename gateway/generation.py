"""Running sequences: deltas of token ids in, pieces of text out, one end for each."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field

from core.errors import Cancelled, InternalError, SlipstreamError, Unavailable
from core.metrics import RequestTimer
from core.types import Finish, FinishReason, PromptLogprobs, Request, TokenDelta, TokenLogprobs
from gateway.backend import Backend
from gateway.protocol import GenerationRequest
from gateway.text import StopMatcher
from gateway.tokenizer import ServedModel


@dataclass(slots=True)
class Piece:
    """What one delta brought for one choice. `token_ids` and `logprobs` may run ahead of `text`, which waits for whole
    characters and for what may become a stop string. `finish_reason` is set on the last piece of a choice."""

    choice: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the stop token id that ended it; None for the model's own end of sequence."""
    prompt_logprobs: PromptLogprobs | None = None

    def extend(self, later: Piece) -> None:
        """Append the next piece of the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_reason = later.finish_reason, later.stop_reason
        self.prompt_logprobs = self.prompt_logprobs or later.prompt_logprobs

    @property
    def mean_logprob(self) -> float:
        """Of its tokens, which all have logprobs; 0 without tokens."""
        return sum(entry.logprob for entry in self.logprobs) / len(self.logprobs) if self.logprobs else 0.0


class Choice:
    """The text side of one sequence."""

    def __init__(self, index: int, request: Request, body: GenerationRequest, model: ServedModel) -> None:
        self.index = index
        self.request = request
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.num_drafted_tokens = 0
        self.num_accepted_tokens = 0
        self.ttft_s: float | None = None
        self._eos_token_ids = model.eos_token_ids
        self._min_tokens = body.min_tokens
        self._show_stop = body.include_stop_str_in_output
        self._detokenizer = model.detokenizer(skip_special_tokens=body.skip_special_tokens)
        self._matcher = StopMatcher(body.stop, include_stop=body.include_stop_str_in_output)

    def push(self, delta: TokenDelta) -> Piece:
        """Raises the error a failed request ended with."""
        self.num_cached_tokens += delta.num_cached_tokens
        stop_token_id = delta.finish.stop_token_id if delta.finish is not None else None
        text, num_kept = "", 0
        for token_id in delta.token_ids:
            num_kept += 1
            if token_id == stop_token_id and num_kept == len(delta.token_ids) and not self._show_stop:
                break
            text += self._feed(token_id, num_kept)
            if self._matcher.matched is not None:
                break
        self.num_tokens += num_kept
        self.num_drafted_tokens += delta.num_drafted_tokens
        self.num_accepted_tokens += min(delta.num_accepted_tokens, num_kept)
        piece = Piece(self.index, text, delta.token_ids[:num_kept], (delta.logprobs or [])[:num_kept])
        piece.prompt_logprobs = delta.prompt_logprobs
        if self._matcher.matched is not None:
            piece.finish_reason, piece.stop_reason = FinishReason.STOP, self._matcher.matched
        elif delta.finish is not None:
            self._finish(piece, delta.finish)
        return piece

    def _feed(self, token_id: int, num_new: int) -> str:
        text = self._detokenizer.push(token_id)
        # Stop strings count from the end of the first min_tokens tokens.
        return text if self.num_tokens + num_new <= self._min_tokens else self._matcher.push(text)

    def _finish(self, piece: Piece, finish: Finish) -> None:
        if finish.reason is FinishReason.ERROR:
            raise _for_client(finish.to_error())
        if finish.reason is FinishReason.ABORT:
            raise Unavailable(finish.message or "the request was aborted by the server; retry")
        piece.text += self._matcher.push(self._detokenizer.flush())
        piece.finish_reason = finish.reason
        if self._matcher.matched is not None:
            piece.finish_reason, piece.stop_reason = FinishReason.STOP, self._matcher.matched
            return
        piece.text += self._matcher.flush()
        if finish.stop_token_id not in self._eos_token_ids:
            piece.stop_reason = finish.stop_token_id


def _for_client(error: SlipstreamError) -> SlipstreamError:
    """Cancelled says that the client has gone, which this one has not."""
    return Unavailable(error.message) if isinstance(error, Cancelled) else error


def best(pieces: list[Piece], body: GenerationRequest) -> list[Piece]:
    """Of the finished candidates of each prompt, the n with the highest log probability per token, the highest first,
    as OpenAI defines best_of; all of them in their order if n are all. Each gets what was reported of its prompt."""
    chosen: list[Piece] = []
    for start in range(0, len(pieces), body.num_candidates):
        group = pieces[start : start + body.num_candidates]
        for piece in group:
            piece.prompt_logprobs = group[0].prompt_logprobs
        if body.num_candidates > body.n:
            group = sorted(group, key=lambda piece: piece.mean_logprob, reverse=True)[: body.n]
        chosen += group
    return chosen


async def run(backend: Backend, choice: Choice, timer: RequestTimer) -> AsyncGenerator[Piece]:
    """The pieces of one sequence, the last with a finish reason. Leaving early cancels it in the cluster."""
    deltas = backend.generate(choice.request)
    with timer:
        async with aclosing(deltas):
            async for delta in deltas:
                piece = choice.push(delta)
                timer.tokens(len(piece.token_ids))
                choice.ttft_s = timer.ttft_s
                if piece.finish_reason is not None:
                    timer.finished(piece.finish_reason)
                    if delta.finish is None:  # a stop string, of which the cluster knows nothing
                        with suppress(StopAsyncIteration):
                            await deltas.asend(piece.finish_reason)
                yield piece
                if piece.finish_reason is not None:
                    return
        raise InternalError("the request ended without saying how")


async def merge(streams: Sequence[AsyncGenerator[Piece]]) -> AsyncGenerator[Piece]:
    """Pieces of several sequences as they come. The first error ends all of them."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for piece in only:
                yield piece
        return
    queue: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    try:
        num_running = len(pumps)
        while num_running:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                num_running -= 1
            else:
                yield item
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[Piece], queue: asyncio.Queue[Piece | BaseException | None]) -> None:
    """Everything `stream` gives into `queue`, then None or what it raised."""
    try:
        async with aclosing(stream):
            async for piece in stream:
                queue.put_nowait(piece)
    except Exception as error:  # noqa: BLE001  raised again by merge, in the request's own task
        queue.put_nowait(error)
    else:
        queue.put_nowait(None)
