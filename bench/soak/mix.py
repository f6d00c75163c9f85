"""What the clients of a soak do: short and long, patient and not, of every class, and sometimes wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import msgspec

_WORDS = ("time", "year", "people", "way", "day", "man", "thing", "woman", "life", "child", "world", "school", "state")
_NUM_PREFIXES = 8
_BAD: tuple[tuple[str, dict[str, Any]], ...] = (
    ("/v1/completions", {"prompt": "a", "temperature": -1}),
    ("/v1/completions", {"prompt": []}),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**9}),
    ("/v1/completions", {"prompt": "a", "stream": "yes", "max_tokens": "many"}),
    ("/v1/chat/completions", {"messages": [{"role": "nobody", "content": "a"}]}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "top_p": 2}),
)


@dataclass(frozen=True, slots=True)
class Job:
    """One request. A client that leaves does so after `leave_events` pieces of its answer, or `leave_s` seconds."""

    path: str
    body: bytes
    num_choices: int = 1
    max_tokens: int = 0
    """Every choice has so many: the end of sequence is ignored."""
    stream: bool = False
    bad: bool = False
    """To be refused with a status from 400 to 499."""
    leave_events: int | None = None
    leave_s: float | None = None


@dataclass(frozen=True, slots=True)
class Lengths:
    """Longest prompt and output, in tokens; a word is `tokens_per_word` tokens."""

    input_tokens: int
    output_tokens: int
    tokens_per_word: float


class Mix:
    """Draws jobs; the same for the same seed."""

    def __init__(self, model: str, lengths: Lengths, seed: int) -> None:
        self._model = model
        self._lengths = lengths
        self._rng = random.Random(seed)
        self._prefixes = [self._words(self._max_words // 2) for _ in range(_NUM_PREFIXES)]

    def next(self) -> Job:
        rng = self._rng
        if rng.random() < 0.1:
            return self._bad()
        stream = rng.random() < 0.7
        chat = rng.random() < 0.4
        num_choices = 2 if rng.random() < 0.05 else 1
        max_tokens = self._length(self._lengths.output_tokens)
        body = self._options(stream) | {"n": num_choices, "max_tokens": max_tokens}
        body |= {"messages": [{"role": "user", "content": self._prompt()}]} if chat else {"prompt": self._prompt()}
        events, seconds = self._patience(stream)
        return Job(
            path="/v1/chat/completions" if chat else "/v1/completions",
            body=msgspec.json.encode(body),
            num_choices=num_choices,
            max_tokens=max_tokens,
            stream=stream,
            leave_events=events,
            leave_s=seconds,
        )

    def _bad(self) -> Job:
        kind = self._rng.randrange(len(_BAD) + 2)
        if kind == len(_BAD):
            return Job("/v1/completions", b'{"prompt": ', bad=True)
        path, body = _BAD[kind] if kind < len(_BAD) else ("/v1/completions", {"prompt": "a", "model": "no such model"})
        return Job(path, msgspec.json.encode({"model": self._model} | body), bad=True)

    def _options(self, stream: bool) -> dict[str, Any]:
        rng = self._rng
        options: dict[str, Any] = {
            "model": self._model,
            "stream": stream,
            "ignore_eos": True,
            "temperature": rng.choice([0, 0.7, 1]),
            "return_token_ids": True,
        }
        if stream:
            options["stream_options"] = {"include_usage": True}
        if rng.random() < 0.3:
            options["priority"] = rng.randint(-2, 2)
        if rng.random() < 0.2:
            options["cache_salt"] = rng.choice("abc")
        return options

    def _patience(self, stream: bool) -> tuple[int | None, float | None]:
        """A fifth of the clients leave: at once, after a while, or after some of a stream."""
        kind = self._rng.random()
        if kind < 0.08 and stream:
            return self._rng.randint(1, 20), None
        if kind < 0.14:
            return None, self._rng.random() * 2
        return None, 0.0 if kind < 0.2 else None

    @property
    def _max_words(self) -> int:
        return max(1, int(self._lengths.input_tokens / self._lengths.tokens_per_word))

    def _prompt(self) -> str:
        count = self._length(self._max_words)
        if count > self._max_words // 2 and self._rng.random() < 0.5:
            prefix = self._rng.choice(self._prefixes)
            return f"{prefix} {self._words(max(1, count - self._max_words // 2))}"
        return self._words(count)

    def _length(self, longest: int) -> int:
        """Short ones mostly: three quarters are in the shortest quarter."""
        return self._rng.randint(1, max(1, longest // 4 if self._rng.random() < 0.75 else longest))

    def _words(self, count: int) -> str:
        return " ".join(self._rng.choices(_WORDS, k=count))
