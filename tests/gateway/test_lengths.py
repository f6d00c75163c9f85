from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from gateway.lengths import BYTE_LEVEL_ALPHABET, NFC_CHARS, token_length

BYTES = {byte: character for character, byte in BYTE_LEVEL_ALPHABET.items()}


def byte_level(*merges: tuple[str, str], without: tuple[int, ...] = ()) -> Tokenizer:
    alphabet = [character for byte, character in BYTES.items() if byte not in without]
    vocabulary = {token: i for i, token in enumerate([*alphabet, *("".join(pair) for pair in merges)])}
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


RARE = byte_level(("a", "b"), without=(0x04, 0xC0, 0xF1))


@pytest.mark.parametrize("tokenizer", [byte_level(("a", "b"), ("ab", "ab")), byte_fallback(), nfc(), RARE])
@given(text=st.text(max_size=60) | st.text("ab \x04\U00040000 \u0345\u03b1\u0313\u0300", max_size=60))
def test_no_text_has_fewer_tokens_than_its_length_says(tokenizer: Tokenizer, text: str) -> None:
    length = token_length(tokenizer)
    assert length is not None
    assert length.fewest_tokens(text) <= len(tokenizer.encode(text).ids)


def chars(tokenizer: Tokenizer) -> int:
    length = token_length(tokenizer)
    assert length is not None
    return length.chars


def test_characters_without_a_token_are_not_counted() -> None:
    length = token_length(RARE)
    assert length is not None
    assert [length.fewest_tokens(text) for text in ("\x04" * 99, "ab\x04ab", "ab" * 10 + "a")] == [0, 2, 11]


def test_the_bound_is_the_longest_token() -> None:
    tokenizer = byte_level(("a", "b"), ("ab", "ab"))
    assert chars(tokenizer) == 4
    tokenizer.add_special_tokens([AddedToken("<|begin|>", special=True)])
    assert chars(tokenizer) == 9
    tokenizer.normalizer = normalizers.NFC()
    assert chars(tokenizer) == 9 * NFC_CHARS


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
        byte_level(without=(0x80,)),
        changed(pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        changed(pre_tokenizer=pre_tokenizers.Sequence([pre_tokenizers.Split(" ", "removed")])),
        changed(normalizer=normalizers.Strip()),
        changed(normalizer=normalizers.Replace("ab", "c")),
    ],
)
def test_a_tokenizer_that_drops_or_folds_text_has_no_bound(tokenizer: Tokenizer) -> None:
    assert token_length(tokenizer) is None
