from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gateway.text import MAX_HELD_TOKENS, Detokenizer, StopMatcher
from gateway.tokenizer import ServedModel


def detokenize(detokenizer: Detokenizer, token_ids: list[int]) -> str:
    return "".join(map(detokenizer.push, token_ids)) + detokenizer.flush()


@given(text=st.text(max_size=60))
def test_pieces_of_encoded_text_concatenate_to_the_text(model: ServedModel, text: str) -> None:
    assert detokenize(model.detokenizer(), model.encode(text)) == text


@given(data=st.data())
def test_pieces_concatenate_to_the_full_decoding_of_any_tokens(model: ServedModel, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, model.vocab_size - 1), max_size=MAX_HELD_TOKENS))
    skip = data.draw(st.booleans())
    assert detokenize(model.detokenizer(skip_special_tokens=skip), ids) == model.decode(ids, skip_special_tokens=skip)


def test_a_character_of_several_tokens_comes_out_whole(model: ServedModel) -> None:
    ids = [i for byte in "🦊".encode() for i in byte_token(model, byte)]
    detokenizer = model.detokenizer()
    assert [detokenizer.push(i) for i in ids] == ["", "", "", "🦊"]


def byte_token(model: ServedModel, byte: int) -> list[int]:
    return [next(i for i in range(model.vocab_size) if model.token_bytes(i) == [byte])]


def test_an_incomplete_character_at_the_end_is_shown_as_a_replacement(model: ServedModel) -> None:
    ids = byte_token(model, 0xF0)
    assert detokenize(model.detokenizer(), ids) == "\N{REPLACEMENT CHARACTER}"


def test_garbage_is_not_held_for_ever(model: ServedModel) -> None:
    detokenizer = model.detokenizer()
    pieces = [detokenizer.push(i) for i in byte_token(model, 0xFF) * (2 * MAX_HELD_TOKENS)]
    assert "".join(pieces) == "\N{REPLACEMENT CHARACTER}" * (2 * MAX_HELD_TOKENS)


@pytest.mark.parametrize("hidden", [frozenset(), frozenset({3})])
def test_sentencepiece_spaces_survive_a_skipped_token(hidden: frozenset[int]) -> None:
    vocab = {"▁hello": 0, "▁world": 1, "!": 2, "<s>": 3}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    ids = [0, *hidden, 1, 2, 1]
    assert detokenize(Detokenizer(tokenizer, hidden), ids) == "hello world! world"


def naive_cut(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The stop that is complete first, found by growing the text one character at a time."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


words = st.text(alphabet="ab🦊", max_size=30)


@given(text=words, stops=st.lists(st.text("ab🦊", min_size=1, max_size=5), max_size=4), data=st.data())
def test_stopping_equals_the_naive_cut_of_the_whole_text(text: str, stops: list[str], data: st.DataObject) -> None:
    include = data.draw(st.booleans())
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=10)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    matcher = StopMatcher(stops, include_stop=include)
    out = ""
    for piece in pieces:
        out += matcher.push(piece)
        if matcher.matched is not None:
            break
    out += matcher.flush()
    assert (out, matcher.matched) == naive_cut(text, stops, include)


def test_only_the_beginning_of_a_stop_is_held_back() -> None:
    matcher = StopMatcher(["END"])
    assert [matcher.push(p) for p in ("an E", "N", "X", "E")] == ["an ", "", "ENX", ""]
    assert matcher.flush() == "E"


def test_without_stops_text_passes_at_once() -> None:
    assert StopMatcher().push("anything") == "anything"
