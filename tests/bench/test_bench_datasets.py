"""Prompts: from files and at random, with token counts that are exact."""

import json

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from bench.serving.datasets import Prompt, file_prompts
from bench.serving.random_prompts import draw_lengths, exact_text, random_prompts
from bench.serving.text import FolderTokenizer
from core.errors import ConfigError


class Characters:
    """One token a character, and one more in front of every prompt, as a beginning-of-sequence token would be."""

    vocabulary = range(97, 123)

    def encode(self, text):
        return [1, *map(ord, text)]

    def decode(self, ids):
        return "".join(map(chr, ids))


class Pairs(Characters):
    """Merges any two equal neighbours: what is decoded does not encode to the same tokens."""

    def encode(self, text):
        ids, i = [], 0
        while i < len(text):
            step = 2 if text[i : i + 2] == text[i] * 2 else 1
            ids.append(text[i : i + step])
            i += step
        return ids


@pytest.fixture
def load(tmp_path, make_options):
    """Prompts of a file with this content."""

    def load(dataset, content, *args, **changes):
        path = tmp_path / "data"
        path.write_text(content)
        options = make_options("--dataset-name", dataset, "--dataset-path", str(path), *args, **changes)
        return file_prompts(options, Characters(), np.random.default_rng(0))

    return load


def lines(*rows):
    return "\n".join(json.dumps(row) for row in rows)


def chat(*turns):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in turns]}


IN_ORDER = ("--disable-shuffle", "--no-oversample")


# --- files ---------------------------------------------------------------------------------------------------------


def test_spec_bench_takes_the_first_turn_and_the_category(load):
    row = {"question_id": 81, "category": "writing", "turns": ["one", "two"]}
    assert load("spec-bench", lines(row), *IN_ORDER) == [Prompt("one", 256, "writing")]


def test_vllms_spelling_of_spec_bench_is_understood(load):
    assert load("spec_bench", lines({"turns": ["one"]}), "--output-len", "9", *IN_ORDER) == [Prompt("one", 9)]


def test_custom_takes_prompt_or_turns(load):
    content = lines({"prompt": "p"}, {"turns": ["t", "u"]}) + "\n\n"
    assert load("custom", content, "--custom-output-len", "5", *IN_ORDER) == [Prompt("p", 5), Prompt("t", 5)]


def test_custom_lines_may_carry_their_own_output_length(load):
    content = lines({"prompt": "p", "output_tokens": 3})
    assert load("custom", content, "--custom-output-len", "-1", *IN_ORDER) == [Prompt("p", 3)]


def test_sharegpt_pairs_the_first_question_with_its_answer(load):
    content = json.dumps(
        [
            chat(("system", "be kind"), ("human", "question"), ("gpt", "an answer"), ("human", "more")),
            chat(("gpt", "unasked answer")),
            chat(("human", "unanswered")),
            {"id": "empty"},
        ]
    )
    assert load("sharegpt", content, *IN_ORDER) == [Prompt("question", len("an answer") + 1)]


def test_sharegpt_drops_what_is_too_short_or_too_long(load):
    fits = chat(("human", "h" * 1023), ("gpt", "g" * 1023))
    others = [
        chat(("human", "hi"), ("gpt", "long enough")),
        chat(("human", "long enough"), ("gpt", "no")),
        chat(("human", "h" * 1024), ("gpt", "long enough")),
        chat(("human", "h" * 1023), ("gpt", "g" * 1024)),
    ]
    assert load("sharegpt", json.dumps([fits, *others]), *IN_ORDER) == [Prompt("h" * 1023, 1024)]
    assert len(load("sharegpt", json.dumps([fits, *others]), "--sharegpt-output-len", "8", *IN_ORDER)) == 3


def test_a_short_file_is_repeated_unless_told_otherwise(load):
    content = lines({"prompt": "a"}, {"prompt": "b"})
    assert sorted(p.content for p in load("custom", content, "--num-prompts", "5")) in (list("aaabb"), list("aabbb"))
    assert len(load("custom", content, "--num-prompts", "5", "--no-oversample")) == 2


def test_shuffling_follows_the_seed(load):
    content = lines(*({"prompt": str(i)} for i in range(50)))
    once, again = (load("custom", content, "--num-prompts", "50") for _ in range(2))
    assert once == again
    assert sorted(once, key=lambda p: int(p.content)) != once


@pytest.mark.parametrize(
    ("dataset", "content", "complaint"),
    [
        ("custom", '{"prompt": "a"}\n{"prompt": 3}', "line 2: Expected `str | null`, got `int` - at `$.prompt`"),
        ("custom", '{"prompt": "a"}\n\n{oops', "line 3: "),
        ("custom", '{"text": "a"}', "line 1: needs `prompt` or `turns`"),
        ("spec-bench", '{"turns": []}', "line 1: `turns` is empty"),
        ("spec-bench", '{"prompt": "a"}', "line 1: Object missing required field `turns`"),
        ("sharegpt", '[{"conversations": [{"from": "human"}]}]', "missing required field `value`"),
        ("sharegpt", '{"conversations": []}', "Expected `array`, got `object`"),
        ("sharegpt", "[]", "holds no usable prompt"),
        ("custom", "", "holds no usable prompt"),
    ],
)
def test_bad_files_are_refused_by_line(load, dataset, content, complaint):
    with pytest.raises(ConfigError, match=r"^--dataset-path: ") as refused:
        load(dataset, content)
    assert complaint in refused.value.message
    assert "\n" not in refused.value.message


def test_a_line_without_its_output_length_is_refused(load):
    with pytest.raises(ConfigError, match="line 1: needs `output_tokens`"):
        load("custom", lines({"prompt": "p"}), "--custom-output-len", "-1")


def test_text_that_is_not_utf8_is_refused(tmp_path, make_options):
    path = tmp_path / "data"
    path.write_bytes(b'{"prompt": "\xff"}')
    options = make_options("--dataset-name", "custom", "--dataset-path", str(path))
    with pytest.raises(ConfigError, match="line 1"):
        file_prompts(options, Characters(), np.random.default_rng(0))


# --- random --------------------------------------------------------------------------------------------------------


def random(make_options, tokenizer, *args, **changes):
    options = make_options("--num-prompts", "20", *args, **changes)
    return random_prompts(options, tokenizer, np.random.default_rng(0))


def test_without_a_tokenizer_completions_get_token_ids(make_options):
    prompts = random(make_options, Characters(), "--random-input-len", "10", "--random-prefix-len", "4")
    assert {len(p.content) for p in prompts} == {14}
    assert len({tuple(p.content[:4]) for p in prompts}) == 1
    assert len({tuple(p.content[4:]) for p in prompts}) == 20
    assert all(p.output_len == 128 for p in prompts)


@pytest.mark.parametrize("tokenizer", [Characters(), Pairs()])
def test_chat_prompts_are_text_of_the_exact_count(make_options, tokenizer):
    prompts = random(make_options, tokenizer, "--backend", "openai-chat", "--random-input-len", "30")
    assert {len(tokenizer.encode(p.content)) for p in prompts} == {30}


def test_text_of_an_impossible_count_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="--random-input-len: no text of exactly 1 tokens"):
        exact_text([97], np.array([97]), Characters(), rng)


@given(mean=st.integers(1, 500), ratio=st.floats(0, 0.99), seed=st.integers(0, 5))
def test_lengths_stay_in_their_range(mean, ratio, seed):
    lengths = draw_lengths(mean, ratio, 50, np.random.default_rng(seed))
    assert lengths.min() >= max(1, np.floor(mean * (1 - ratio)))
    assert lengths.max() <= np.ceil(mean * (1 + ratio))


def test_lengths_reach_both_ends_of_their_range():
    assert set(draw_lengths(4, 0.5, 500, np.random.default_rng(0)).tolist()) == {2, 3, 4, 5, 6}


# --- tokenizer folders ---------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """A byte-level BPE of 400 tokens with a special token."""
    words = " ".join(f"{a}{b}{a}" for a in "abcdefghijklmnop" for b in "aeiou")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([words] * 3, trainer)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_a_folder_gives_text_of_exact_counts(folder, make_options):
    tokenizer = FolderTokenizer(str(folder))
    assert 0 not in tokenizer.vocabulary
    prompts = random(make_options, tokenizer, "--tokenizer", str(folder), "--random-input-len", "25")
    assert all(isinstance(p.content, str) for p in prompts)
    assert {len(tokenizer.encode(p.content)) for p in prompts} == {25}


def test_a_folder_without_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^--tokenizer: .* has no tokenizer\.json"):
        FolderTokenizer(str(tmp_path))


def test_a_malformed_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"^--tokenizer: .* can't be read"):
        FolderTokenizer(str(tmp_path))
