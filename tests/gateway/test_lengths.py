from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gateway.lengths import NFC_CHARS, chars_per_token

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_level(*merges: tuple[str, str]) -> Tokenizer:
    vocabulary = {token: i for i, token in enumerate([*ALPHABET, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(num_bytes: int = 256) -> Tokenizer:
    vocabulary = {"<unk>": 0, **{f"<0x{b:02X}>": b + 1 for b in range(num_bytes)}}
    return Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))


def nfc() -> Tokenizer:
    tokenizer = byte_level(("a", "b"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    return tokenizer


@pytest.mark.parametrize("tokenizer", [byte_level(("a", "b"), ("ab", "ab")), byte_fallback(), nfc()])
@given(text=st.text(max_size=60) | st.text("ab \u0345\u03b1\u0313\u0300", max_size=60))
def test_no_text_has_fewer_tokens_than_its_length_says(tokenizer: Tokenizer, text: str) -> None:
    per_token = chars_per_token(tokenizer)
    assert per_token is not None
    assert len(text) <= per_token * len(tokenizer.encode(text).ids)


def test_the_bound_is_the_longest_token() -> None:
    tokenizer = byte_level(("a", "b"), ("ab", "ab"))
    assert chars_per_token(tokenizer) == 4
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True)])
    assert chars_per_token(tokenizer) == 9
    tokenizer.normalizer = normalizers.NFC()
    assert chars_per_token(tokenizer) == 9 * NFC_CHARS


def changed(**parts: object) -> Tokenizer:
    tokenizer = byte_level()
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    return tokenizer


def stripping() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens([AddedToken("<|end|>", rstrip=True)])
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        Tokenizer(models.BPE({"a": 0}, [])),
        byte_fallback(num_bytes=128),
        stripping(),
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed")])),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace("ab", "c")),
    ],
)
def test_a_tokenizer_that_drops_or_folds_text_has_no_bound(tokenizer: Tokenizer) -> None:
    assert chars_per_token(tokenizer) is None
