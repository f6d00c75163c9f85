"""Token counts of texts: from a tokenizer folder, or from the server's /tokenize and /detokenize (as vLLM has them)."""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import httpx
import tokenizers

from core.errors import ConfigError

SAMPLE = (
    "the river turned slowly past old stone houses while morning light fell across empty fields and a small boat "
    "carried seven quiet people toward the northern market where bread cheese apples paper lamps coats tools seeds "
    "and letters were traded every second week before winter closed high mountain roads for many long months because "
    "nobody who lived there could remember any summer warm enough to melt deep snow above green valleys near home"
)
"""Tokenized by the server to learn token ids that exist, when there is no tokenizer folder."""

MIN_WORDS = 100

_WORD = re.compile(r" [a-z]+\Z")


class Tokenizer(Protocol):
    @property
    def vocabulary(self) -> list[int]:
        """Ids of ordinary tokens to draw random prompts from, ascending."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids as the server would count a prompt, special tokens included."""
        ...

    def decode(self, ids: list[int]) -> str: ...


class FolderTokenizer:
    """The tokenizer.json of a Hugging Face folder. Raises ConfigError where there is none."""

    def __init__(self, path: str) -> None:
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ConfigError(f"--tokenizer: {path} has no tokenizer.json; give a model folder", param="--tokenizer")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises no narrower class for a malformed file
            raise ConfigError(f"--tokenizer: {file} can't be read: {error}", param="--tokenizer") from error
        if not self._tokenizer.get_vocab_size():
            raise ConfigError(f"--tokenizer: {file} has an empty vocabulary", param="--tokenizer")

    @cached_property
    def vocabulary(self) -> list[int]:
        """Whole lower-case words where there are enough of them: text made of those keeps its count when it is
        tokenized again. Otherwise every token that is not special and not a part of a character."""
        special = {token_id for token_id, token in self._tokenizer.get_added_tokens_decoder().items() if token.special}
        ids = sorted(set(self._tokenizer.get_vocab().values()) - special)
        anchor = next((i for i in ids if "\ufffd" not in self._tokenizer.decode([i])), ids[0])
        # Decoded after another token, since some decoders drop the space in front of the first.
        pieces = self._tokenizer.decode_batch([[anchor, token_id] for token_id in ids])
        words = [token_id for token_id, piece in zip(ids, pieces, strict=True) if _WORD.search(piece)]
        if len(words) >= MIN_WORDS:
            return words
        return [token_id for token_id, piece in zip(ids, pieces, strict=True) if "\ufffd" not in piece] or ids

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))


class ServerTokenizer:
    """The server's own. Raises ConfigError where the server has none, and asks for --tokenizer."""

    def __init__(self, client: httpx.Client, model: str) -> None:
        self._client = client
        self._model = model

    @cached_property
    def vocabulary(self) -> list[int]:
        return sorted(set(self._post("/tokenize", "tokens", prompt=SAMPLE, add_special_tokens=False)))

    def encode(self, text: str) -> list[int]:
        return list(self._post("/tokenize", "tokens", prompt=text))

    def decode(self, ids: list[int]) -> str:
        return str(self._post("/detokenize", "prompt", tokens=ids))

    def _post(self, path: str, field: str, **body: Any) -> Any:
        try:
            response = self._client.post(path, json={"model": self._model, **body})
            if response.is_success:
                return response.json()[field]
            reason = f"status {response.status_code}"
        except (httpx.HTTPError, LookupError, TypeError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"--tokenizer: the server's {path} can't be used ({reason}); give a folder with tokenizer.json",
            param="--tokenizer",
        )
