"""A tokenizer for the tiny models, so that they can follow a grammar: a token for each character that can be seen."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def save_tokenizer(folder: Path) -> Tokenizer:
    seen = ["Ġ", *(chr(code) for code in range(33, 127))]
    tokenizer = Tokenizer(models.BPE({character: index for index, character in enumerate(seen)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer
