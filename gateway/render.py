"""The bodies clients read: chat completions and text completions, whole or in chunks."""

from __future__ import annotations

import time
from typing import Any

import msgspec

from core.types import Request, TokenLogprobs
from gateway.exchange import event
from gateway.generation import Choice, Piece
from gateway.prompt_scores import finite, prompt_logprobs_body, scored_tokens
from gateway.protocol import ChatRequest, CompletionRequest, GenerationRequest, StreamOptions
from gateway.tokenizer import ServedModel

Json = dict[str, Any]
Entry = tuple[int, TokenLogprobs | None]
"""A token and what the model gave it; None for the first of a prompt."""


class Renderer:
    """Base. One per HTTP request; `chunk` is called once per piece, so it builds one plain dict and encodes it once."""

    id_prefix: str
    chunk_object: str
    whole_object: str

    def __init__(
        self, body: GenerationRequest, model: ServedModel, name: str, base_id: str, choices: list[Choice]
    ) -> None:
        self._body = body
        self._model = model
        self._choices = choices
        self._head: Json = {"id": f"{self.id_prefix}-{base_id}", "created": int(time.time()), "model": name}
        self._options = body.stream_options or StreamOptions()
        self._opened: set[int] = set()
        self._text_offsets = dict.fromkeys(range(len(choices)), 0)

    # --- streams ---------------------------------------------------------------------------------------------------

    def chunk(self, piece: Piece) -> bytes:
        """Events for a piece; none if it holds nothing the client has asked for."""
        data = b""
        if piece.choice not in self._opened:
            self._opened.add(piece.choice)
            data = self._opening(piece)
        has_news = piece.text or piece.finish_reason is not None or piece.logprobs or self._body.return_token_ids
        return data + self._event(self._chunk_choice(piece)) if has_news else data

    def closing(self) -> bytes:
        """After the last piece: usage, if the client wants it."""
        if not self._options.include_usage:
            return b""
        return event({**self._head, "object": self.chunk_object, "choices": [], "usage": self.usage()})

    def _event(self, choice: Json) -> bytes:
        payload = {**self._head, "object": self.chunk_object, "choices": [choice]}
        if self._options.continuous_usage_stats:
            payload["usage"] = self.usage()
        elif self._options.include_usage:
            payload["usage"] = None
        return event(payload)

    def _opening(self, first: Piece) -> bytes:
        """What comes before the first piece of a choice."""
        raise NotImplementedError

    def _chunk_choice(self, piece: Piece) -> Json:
        raise NotImplementedError

    # --- whole answers ---------------------------------------------------------------------------------------------

    def encoded(self, pieces: list[Piece]) -> msgspec.Raw:
        """`whole` as JSON."""
        return msgspec.Raw(msgspec.json.encode(self.whole(pieces)))

    def num_logprobs(self, pieces: list[Piece]) -> int:
        """That there are to write, of prompts and of outputs."""
        each = 1 + (self._body.prompt_alternatives or 0)
        prompts = sum(each * len(self._request(p.choice).prompt_token_ids) for p in pieces if p.prompt_logprobs)
        return prompts + sum(1 + len(token.top) for piece in pieces for token in piece.logprobs)

    def whole(self, pieces: list[Piece]) -> Json:
        """The answer to a request that does not stream, from one joined piece per choice that is returned."""
        choices = [{**self._whole_choice(piece), "index": index} for index, piece in enumerate(pieces)]
        return {**self._head, "object": self.whole_object, "choices": choices, "usage": self.usage()}

    def _whole_choice(self, piece: Piece) -> Json:
        raise NotImplementedError

    def usage(self) -> Json:
        """Each prompt counts once, however many choices it has; candidates that are not returned count too. Drafted
        tokens are accepted, and then of the completion's, or rejected, and then of none of the sums."""
        firsts = self._choices[:: self._body.num_candidates]
        num_prompt = sum(len(c.request.prompt_token_ids) for c in firsts)
        num_output = sum(c.num_tokens for c in self._choices)
        num_drafted = sum(c.num_drafted_tokens for c in self._choices)
        num_accepted = sum(c.num_accepted_tokens for c in self._choices)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": sum(c.num_cached_tokens for c in firsts)},
            "completion_tokens_details": {
                "accepted_prediction_tokens": num_accepted,
                "rejected_prediction_tokens": num_drafted - num_accepted,
                "drafted_tokens": num_drafted,
            },
        }

    # --- parts -----------------------------------------------------------------------------------------------------

    def _ending(self, piece: Piece) -> Json:
        reason = piece.finish_reason
        ending: Json = {"finish_reason": reason.value if reason is not None else None}
        if reason is not None:
            ending["stop_reason"] = piece.stop_reason
        if self._body.return_token_ids:
            ending["token_ids"] = piece.token_ids
        return ending

    def _request(self, choice: int) -> Request:
        return self._choices[choice].request

    def _prompt_logprobs(self, piece: Piece) -> Json:
        """vLLM's field, for those who asked for it."""
        num_top = self._body.prompt_logprobs
        if num_top is None:
            return {}
        prompt = self._request(piece.choice).prompt_token_ids
        return {"prompt_logprobs": prompt_logprobs_body(self._model, prompt, piece.prompt_logprobs, num_top)}


class ChatRenderer(Renderer):
    id_prefix = "chatcmpl"
    chunk_object = "chat.completion.chunk"
    whole_object = "chat.completion"

    def _opening(self, first: Piece) -> bytes:
        choice = first.choice
        opening: Json = {
            "index": choice,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }
        if not self._body.return_token_ids:
            return self._event(opening)
        prompt = self._request(choice).prompt_token_ids
        return event({**self._head, "object": self.chunk_object, "choices": [opening], "prompt_token_ids": prompt})

    def _chunk_choice(self, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text else {}
        return {"index": piece.choice, "delta": delta, "logprobs": self._logprobs(piece), **self._ending(piece)}

    def whole(self, pieces: list[Piece]) -> Json:
        answer = {**super().whole(pieces), **self._prompt_logprobs(pieces[0])}
        if self._body.return_token_ids:
            answer["prompt_token_ids"] = self._request(0).prompt_token_ids
        return answer

    def _whole_choice(self, piece: Piece) -> Json:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return {"index": piece.choice, "message": message, "logprobs": self._logprobs(piece), **self._ending(piece)}

    def _logprobs(self, piece: Piece) -> Json | None:
        if self._body.alternatives is None:
            return None
        pairs = zip(piece.token_ids, piece.logprobs, strict=True)
        return {"content": [self._entry(token_id, logprobs) for token_id, logprobs in pairs], "refusal": None}

    def _entry(self, token_id: int, logprobs: TokenLogprobs) -> Json:
        alternatives = logprobs.top[: self._body.alternatives]
        top = [self._token(other, logprob) for other, logprob in alternatives]
        return {**self._token(token_id, logprobs.logprob), "top_logprobs": top}

    def _token(self, token_id: int, logprob: float) -> Json:
        model = self._model
        return {
            "token": model.token_text(token_id),
            "logprob": finite(logprob),
            "bytes": model.token_bytes(token_id),
        }


class CompletionRenderer(Renderer):
    id_prefix = "cmpl"
    chunk_object = "text_completion"
    whole_object = "text_completion"

    def __init__(
        self,
        body: CompletionRequest,
        model: ServedModel,
        name: str,
        base_id: str,
        choices: list[Choice],
    ) -> None:
        super().__init__(body, model, name, base_id, choices)
        self._prompt_texts = [self._prompt_text(body, c.index) for c in choices] if body.echo else None

    def _prompt_text(self, body: CompletionRequest, choice: int) -> str:
        prompt = body.prompt[choice // body.num_candidates]
        return prompt if isinstance(prompt, str) else self._model.decode(prompt)

    def _opening(self, first: Piece) -> bytes:
        if self._prompt_texts is None and not self._body.return_token_ids:
            return b""
        choice, logprobs = first.choice, None
        echo = self._prompt_texts[choice] if self._prompt_texts is not None else ""
        if self._prompt_texts is not None and self._body.alternatives is not None:
            logprobs = self._entries(choice, self._prompt_entries(first))
        opening: Json = {"index": choice, "text": echo, "logprobs": logprobs, "finish_reason": None}
        if self._body.return_token_ids:
            opening["prompt_token_ids"] = self._request(choice).prompt_token_ids
        return self._event(opening)

    def _chunk_choice(self, piece: Piece) -> Json:
        logprobs = None
        if self._body.alternatives is not None:
            logprobs = self._entries(piece.choice, self._output_entries(piece))
        return {"index": piece.choice, "text": piece.text, "logprobs": logprobs, **self._ending(piece)}

    def _whole_choice(self, piece: Piece) -> Json:
        choice = {"index": piece.choice, "text": piece.text, "logprobs": None, **self._ending(piece)}
        if self._body.alternatives is not None:
            prompt = self._prompt_entries(piece) if self._prompt_texts is not None else []
            choice["logprobs"] = self._entries(piece.choice, [*prompt, *self._output_entries(piece)])
        if self._prompt_texts is not None:
            choice["text"] = self._prompt_texts[piece.choice] + piece.text
        if self._body.return_token_ids:
            choice["prompt_token_ids"] = self._request(piece.choice).prompt_token_ids
        return choice | self._prompt_logprobs(piece)

    def _output_entries(self, piece: Piece) -> list[Entry]:
        return list(zip(piece.token_ids, piece.logprobs, strict=True))

    def _prompt_entries(self, piece: Piece) -> list[Entry]:
        prompt = self._request(piece.choice).prompt_token_ids
        scored = scored_tokens(prompt, piece.prompt_logprobs)
        return [(prompt[0], None), *((token.token_id, token.logprobs) for token in scored)]

    def _entries(self, choice: int, entries: list[Entry]) -> Json:
        """The next tokens of a choice in OpenAI's shape: one list per property."""
        tokens = [self._model.token_text(token_id) for token_id, _ in entries]
        offsets, offset = [], self._text_offsets[choice]
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        self._text_offsets[choice] = offset
        return {
            "tokens": tokens,
            "token_logprobs": [None if entry is None else finite(entry.logprob) for _, entry in entries],
            "top_logprobs": [
                None if entry is None else self._top(token, entry)
                for token, (_, entry) in zip(tokens, entries, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token: str, logprobs: TokenLogprobs) -> dict[str, float]:
        """The most likely tokens, and the one that is there."""
        top: dict[str, float] = {}
        for other, logprob in logprobs.top[: self._body.alternatives]:
            top.setdefault(self._model.token_text(other), finite(logprob))
        top.setdefault(token, finite(logprobs.logprob))
        return top


def renderer_for(
    body: GenerationRequest, model: ServedModel, name: str, base_id: str, choices: list[Choice]
) -> Renderer:
    if isinstance(body, CompletionRequest):
        return CompletionRenderer(body, model, name, base_id, choices)
    assert isinstance(body, ChatRequest)  # there is no third kind
    return ChatRenderer(body, model, name, base_id, choices)
