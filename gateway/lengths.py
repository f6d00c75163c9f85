"""How many characters one token can stand for: text longer than the context times this need not be tokenized."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer, decoders, models

NFC_CHARS = 4
"""Code points that canonical composition makes one at most (Unicode UAX 15: the expansion factor of NFD)."""


def _byte_level_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE: printable Latin-1 for itself, the rest from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


BYTE_LEVEL_ALPHABET = _byte_level_alphabet()

_KEEPS_TEXT = {"ByteLevel", "Digits", "Metaspace", "Prepend"}


@dataclass(frozen=True)
class TokenLength:
    """`chars`: no token stands for more. `dropped`: ASCII characters the vocabulary lacks, which leave no token."""

    chars: int
    dropped: str = ""

    def fewest_tokens(self, text: str) -> int:
        """`text` has at least so many tokens, however it is cut."""
        return -(-(len(text) - sum(map(text.count, self.dropped))) // self.chars)


def token_length(backend: Tokenizer) -> TokenLength | None:
    """None where there is no such number, because the tokenizer drops text (spaces, say) or takes any unknown word for
    one token."""
    vocabulary = backend.get_vocab()
    stripping = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    dropped = _dropped(backend, vocabulary)
    factors = [_shrinks_by(part) for part in (*_parts(backend.normalizer), *_parts(backend.pre_tokenizer))]
    if not isinstance(backend.model, models.BPE) or stripping or dropped is None or None in factors:
        return None
    return TokenLength(math.prod(filter(None, factors)) * max(map(len, vocabulary)), dropped)


def _parts(component: Any) -> Iterator[dict[str, Any]]:
    """The settings of a normalizer or pre-tokenizer, sequences taken apart."""
    if component is None:
        return
    waiting = [json.loads(component.__getstate__())]
    while waiting:
        part = waiting.pop()
        if part["type"] == "Sequence":
            waiting += part.get("normalizers") or part.get("pretokenizers") or []
        else:
            yield part


def _shrinks_by(part: dict[str, Any]) -> int | None:
    """The factor by which this step may shorten text, None if there is none."""
    kind = part["type"]
    if kind == "NFC":
        return NFC_CHARS
    if kind == "Replace":
        replaced = part["pattern"].get("String")
        return 1 if replaced is not None and len(part["content"]) >= len(replaced) else None
    if kind in ("Split", "Punctuation"):
        return 1 if part["behavior"] != "Removed" else None
    return 1 if kind in _KEEPS_TEXT else None


def _dropped(backend: Tokenizer, vocabulary: Mapping[str, int]) -> str | None:
    """The ASCII characters without a token, None if others have none too. A longer character needs only its
    continuation bytes to leave a token; vocabularies do lack rare first bytes."""
    if isinstance(backend.decoder, decoders.ByteLevel):
        known = {byte for character, byte in BYTE_LEVEL_ALPHABET.items() if character in vocabulary}
    elif getattr(backend.model, "byte_fallback", False) and all(f"<0x{b:02X}>" in vocabulary for b in range(256)):
        return ""
    else:
        return None
    if not known.issuperset(range(0x80, 0xC0)):
        return None
    return "".join(chr(byte) for byte in range(0x80) if byte not in known)
