"""Prompts of random tokens with lengths drawn from a range: the `random` dataset of `vllm bench serve`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from bench.serving.datasets import Prompt
from bench.serving.options import ServeOptions
from bench.serving.text import Tokenizer
from core.errors import ConfigError

MAX_REPAIRS = 16


def random_prompts(options: ServeOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    """A prefix of --random-prefix-len tokens, the same for all, then tokens of each prompt's own.

    Without --tokenizer, completions get token ids, exact by construction. Otherwise prompts are text whose count by the
    tokenizer, special tokens included, is the length drawn; a chat template comes on top.
    """
    vocabulary = np.asarray(tokenizer.vocabulary)
    prefix = rng.choice(vocabulary, options.random_prefix_len).tolist()
    as_ids = options.backend == "openai" and options.tokenizer is None
    input_lens = draw_lengths(options.random_input_len, options.random_range_ratio, options.num_prompts, rng)
    output_lens = draw_lengths(options.random_output_len, options.random_range_ratio, options.num_prompts, rng)
    prompts = []
    for input_len, output_len in zip(input_lens.tolist(), output_lens.tolist(), strict=True):
        ids = prefix + rng.choice(vocabulary, input_len).tolist()
        content = ids if as_ids else exact_text(ids, vocabulary, tokenizer, rng)
        prompts.append(Prompt(content, output_len))
    return prompts


def draw_lengths(mean: int, ratio: float, count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Uniform integers on [mean (1 - ratio), mean (1 + ratio)], at least 1. # [count]"""
    low, high = math.floor(mean * (1 - ratio)), math.ceil(mean * (1 + ratio))
    return rng.integers(max(low, 1), max(high, 1), size=count, endpoint=True)


def exact_text(ids: list[int], vocabulary: NDArray[np.int64], tokenizer: Tokenizer, rng: np.random.Generator) -> str:
    """Text that the tokenizer counts as len(ids) tokens. Decoding and encoding need not return the same tokens (special
    tokens are added, neighbours merge), so tokens are cut off or added at the end until they do."""
    want = len(ids)
    for _ in range(MAX_REPAIRS):
        text = tokenizer.decode(ids)
        count = len(tokenizer.encode(text))
        if count == want:
            return text
        if count < want:
            ids = ids + rng.choice(vocabulary, want - count).tolist()
        else:  # an id may count for several tokens
            ids = ids[: -max(1, (count - want) * len(ids) // count)]
        if not ids:
            break
    raise ConfigError(
        f"--random-input-len: no text of exactly {want} tokens was found with this tokenizer; "
        "use the openai backend without --tokenizer, which sends token ids",
        param="--random-input-len",
    )
