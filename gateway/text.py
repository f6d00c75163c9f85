"""Token ids to text, and where text stops.

Text lives in the gateway only: workers see token ids and know nothing of stop strings. When a stop string is complete
the gateway closes the backend's iterator, which cancels the request everywhere; usage counts the tokens up to and
including the one that completed the stop string. Tokens that were already on their way are dropped. The text of a stop
token (end of sequence, stop_token_ids) is not output unless include_stop_str_in_output asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
MAX_HELD_TOKENS = 64
"""A character takes at most four tokens, so tokens held for longer than this are no text: they go out as they are."""


class Decodes(Protocol):
    """tokenizers.Tokenizer, as far as it is needed here."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str: ...


class Detokenizer:
    """Text of a growing token sequence. What `push` and the final `flush` return, concatenated, is the decoding of all
    tokens at once (short of MAX_HELD_TOKENS of garbage in a row).

    Decoders are context dependent in two ways: a character may take several tokens, and SentencePiece drops the space
    at the start of what it decodes. So a window is decoded: the tokens of the last text that went out, as context, and
    the tokens since. `hidden` are ids without text: special tokens that are to be skipped.
    """

    def __init__(self, tokenizer: Decodes, hidden: frozenset[int] = frozenset()) -> None:
        self._decode = tokenizer.decode
        self._hidden = hidden
        self._window: list[int] = []
        self._num_context = 0
        self._num_emitted = 0
        """Characters of the window's text that have gone out."""

    def push(self, token_id: int) -> str:
        """Text that is complete with this token, or "" while a character is incomplete."""
        if token_id in self._hidden:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window, skip_special_tokens=False)
        new = text[self._num_emitted :]
        if len(self._window) - self._num_context >= MAX_HELD_TOKENS:
            self._window, self._num_context, self._num_emitted = [], 0, 0
        elif not new or new.endswith(REPLACEMENT):
            return ""
        else:
            self._window = self._window[self._num_context :]
            self._num_context = len(self._window)
            self._num_emitted = len(self._decode(self._window, skip_special_tokens=False))
        return new

    def flush(self) -> str:
        """The rest, when no more tokens come: an incomplete character reads as U+FFFD."""
        if len(self._window) == self._num_context:
            return ""
        text = self._decode(self._window, skip_special_tokens=False)[self._num_emitted :]
        self._num_context, self._num_emitted = len(self._window), self._num_emitted + len(text)
        return text


class StopMatcher:
    """Lets text through up to the first stop string: the one that is complete first and, among those complete at the
    same character, the longest. Text that may be the beginning of one is held back. Independent of how the text is cut
    into pieces. `matched` is the stop string once found; nothing may be pushed afterwards."""

    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._stops = tuple(stops)
        self._include_stop = include_stop
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """The text that may be sent now."""
        if not self._stops or not text:
            return text
        text = self._held + text
        ends = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        if ends:
            end, start, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include_stop else start]
        cut = self._first_possible_start(text)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """What is held, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _first_possible_start(self, text: str) -> int:
        """The smallest index from which `text` to its end is the beginning of a stop string; len(text) if none."""
        cut = len(text)
        for stop in self._stops:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1), cut)
            while start >= 0:
                if stop.startswith(text[start:]):
                    cut = start
                    break
                start = text.find(stop[0], start + 1, cut)
        return cut
