"""How many characters one token can stand for: text longer than the context times this need not be tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

NFC_CHARS = 4
"""Code points that canonical composition makes one at most (Unicode UAX 15: the expansion factor of NFD)."""

_KEEPS_TEXT = {"ByteLevel", "Digits", "Metaspace", "Prepend"}


def chars_per_token(backend: Tokenizer) -> int | None:
    """At least as many characters as any token stands for; None where there is no such number, because the tokenizer
    drops text (spaces, say) or takes any unknown word for one token."""
    model = backend.model
    stripping = any(token.lstrip or token.rstrip for token in backend.get_added_tokens_decoder().values())
    if not isinstance(model, models.BPE) or stripping:
        return None
    factors = [_shrinks_by(part) for part in (*_parts(backend.normalizer), *_parts(backend.pre_tokenizer))]
    vocabulary = backend.get_vocab()
    if not _knows_every_byte(backend, vocabulary):
        return None
    longest = max(map(len, vocabulary))
    for factor in factors:
        if factor is None:
            return None
        longest *= factor
    return longest


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


def _knows_every_byte(backend: Tokenizer, vocabulary: dict[str, int]) -> bool:
    """Otherwise what is not in the vocabulary vanishes, or many unknown characters become one token."""
    if backend.model.byte_fallback:
        return all(f"<0x{byte:02X}>" in vocabulary for byte in range(256))
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    return isinstance(backend.decoder, decoders.ByteLevel) and alphabet <= vocabulary.keys()
