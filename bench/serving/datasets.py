"""The prompts of a run that come from a file: ShareGPT, Spec-Bench, or lines of one's own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import msgspec
import numpy as np
from msgspec import Struct

from bench.serving.options import ServeOptions
from bench.serving.text import Tokenizer
from core.errors import ConfigError

T = TypeVar("T")
R = TypeVar("R")

# The length filter of `vllm bench serve`, so that a ShareGPT run has the same prompts' shape there and here.
SHAREGPT_MIN_TOKENS = 4
SHAREGPT_MAX_PROMPT_TOKENS = 1024
SHAREGPT_MAX_TOTAL_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Prompt:
    content: str | list[int]
    """Text, or token ids (completions only)."""
    output_len: int
    """Sent as the most tokens to generate."""
    category: str | None = None


def file_prompts(options: ServeOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    """`options.num_prompts` prompts: those of the file, shuffled, and again from the start when they run out, unless
    --no-oversample. Raises ConfigError naming the flag, and the line, at fault."""
    path = _existing(options.dataset_path or "")
    if options.dataset_name == "sharegpt":
        source = _sharegpt(path, options, tokenizer, rng)
    else:
        rows = _spec_bench(path, options) if options.dataset_name == "spec-bench" else _custom(path, options)
        source = iter(_shuffled(rows, options, rng))
    found = list(itertools.islice(source, options.num_prompts))
    if not found:
        raise ConfigError(f"--dataset-path: {path} holds no usable prompt", param="--dataset-path")
    wanted = len(found) if options.no_oversample else options.num_prompts
    return list(itertools.islice(itertools.cycle(found), wanted))


def _shuffled(rows: list[T], options: ServeOptions, rng: np.random.Generator) -> list[T]:
    return rows if options.disable_shuffle else [rows[i] for i in rng.permutation(len(rows))]


# --- ShareGPT ------------------------------------------------------------------------------------------------------


class _Turn(Struct, rename={"speaker": "from"}):
    value: str
    speaker: str = ""


class _Conversation(Struct):
    conversations: list[_Turn] = []


def _sharegpt(path: Path, options: ServeOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> Iterator[Prompt]:
    """The first human turn is the prompt; the turn that answers it sets the output length unless a flag does."""
    pairs = []
    for conversation in _decode_file(path, list[_Conversation]):
        turns = conversation.conversations
        human = next((i for i, turn in enumerate(turns) if turn.speaker in ("human", "user")), len(turns))
        if human + 1 < len(turns):
            pairs.append((turns[human].value, turns[human + 1].value))
    fixed = options.sharegpt_output_len
    for question, answer in _shuffled(pairs, options, rng):
        prompt_len = len(tokenizer.encode(question))
        output_len = fixed or len(tokenizer.encode(answer))
        if prompt_len < SHAREGPT_MIN_TOKENS or (fixed is None and output_len < SHAREGPT_MIN_TOKENS):
            continue
        if prompt_len <= SHAREGPT_MAX_PROMPT_TOKENS and prompt_len + output_len <= SHAREGPT_MAX_TOTAL_TOKENS:
            yield Prompt(question, output_len)


def _decode_file(path: Path, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except ValueError as error:  # msgspec's errors are ValueErrors, as are those of UTF-8
        raise ConfigError(f"--dataset-path: {path}: {error}", param="--dataset-path") from error


# --- JSON lines ----------------------------------------------------------------------------------------------------


class _SpecBenchRow(Struct):
    turns: list[str]
    category: str | None = None


class _CustomRow(Struct):
    prompt: str | None = None
    turns: list[str] = []
    output_tokens: int | None = None


def _spec_bench(path: Path, options: ServeOptions) -> list[Prompt]:
    def prompt(row: _SpecBenchRow) -> Prompt:
        if not row.turns:
            raise ValueError("`turns` is empty")
        return Prompt(row.turns[0], options.spec_bench_output_len, row.category)

    return read_lines(path, _SpecBenchRow, prompt)


def _custom(path: Path, options: ServeOptions) -> list[Prompt]:
    """A --custom-output-len of -1 takes each line's own `output_tokens`."""

    def prompt(row: _CustomRow) -> Prompt:
        text = row.prompt if row.prompt is not None else next(iter(row.turns), None)
        if text is None:
            raise ValueError("needs `prompt` or `turns`")
        output_len = row.output_tokens if options.custom_output_len == -1 else options.custom_output_len
        if output_len is None or output_len < 1:
            raise ValueError("needs `output_tokens` of 1 or more, because --custom-output-len is -1")
        return Prompt(text, output_len)

    return read_lines(path, _CustomRow, prompt)


def read_lines(path: Path, kind: type[T], convert: Callable[[T], R], flag: str = "--dataset-path") -> list[R]:
    """What `convert` makes of each line that is not blank, read as `kind`. Raises ConfigError with the number of the
    first bad one, for which `convert` raises ValueError."""
    decode = msgspec.json.Decoder(kind).decode
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            if line.strip():
                found.append(convert(decode(line)))
        except ValueError as error:
            raise ConfigError(f"{flag}: {path}, line {number}: {error}", param=flag) from error
    return found


def _existing(path: str) -> Path:
    if not Path(path).is_file():
        raise ConfigError(f"--dataset-path: there is no file {path}", param="--dataset-path")
    return Path(path)
