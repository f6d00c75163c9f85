"""What quantization costs in quality: the perplexity of texts under the model as it is and as it is served, through our
own engine.

exp of the mean of -log p(token | those before it in its window), natural logs, over all tokens but the first of each
window. A text is cut into windows of WINDOW tokens that know nothing of each other; whole texts are taken in the order
of their files until there are enough tokens. Models are loaded one after the other.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from core.errors import ConfigError
from engine.kv_layout import KVLayout
from engine.quantization.methods import Method
from engine.runner import ModelRunner
from engine.step import ScoredRows, StepBatch
from gateway.tokenizer import ServedModel

WINDOW = 512
_BLOCK_SIZE = 16
_FLAG = "--perplexity-texts"


def measure_perplexity(
    folder: Path, texts: Path, max_tokens: int, quantization: Method | None, **load: Any
) -> dict[str, Any]:
    """The keys of the JSON result. `load`: of ModelRunner.load. Raises ConfigError, ModelError."""
    windows = list(_windows(folder, texts, max_tokens))
    if not windows:
        raise ConfigError(f"{_FLAG}: {texts} holds no text of two tokens or more")
    plain = _perplexity(folder, windows, None, **load)
    result = {"perplexity": plain, "perplexity_tokens": sum(len(window) - 1 for window in windows)}
    if quantization is not None:
        quantized = _perplexity(folder, windows, quantization, **load)
        result |= {"perplexity_quantized": quantized, "perplexity_change": quantized / plain - 1}
    return result


# --- texts ---------------------------------------------------------------------------------------------------------


def read_texts(path: Path) -> Iterator[str]:
    """Those of a file: of each line of .jsonl its `turns`, joined, or its `text` or `prompt`; else the whole file. Of a
    folder, those of its .jsonl and .txt files. Raises ConfigError for a file that can't be read."""
    if path.is_dir():
        for file in sorted([*path.glob("*.jsonl"), *path.glob("*.txt")]):
            yield from read_texts(file)
        return
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_FLAG}: cannot read {path}: {error}") from error
    if path.suffix != ".jsonl":
        yield content
        return
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            entry = json.loads(line) if line.strip() else {}
        except ValueError as error:
            raise ConfigError(f"{_FLAG}: line {number} of {path} is not JSON: {error}") from error
        if text := _text_of(entry):
            yield text


def _text_of(entry: object) -> str:
    """Lines without text, such as those of traces, have none."""
    if not isinstance(entry, dict):
        return ""
    turns = entry.get("turns")
    if isinstance(turns, list):
        return "\n\n".join(turn for turn in turns if isinstance(turn, str))
    text = entry.get("text") or entry.get("prompt")
    return text if isinstance(text, str) else ""


def _windows(folder: Path, texts: Path, max_tokens: int) -> Iterator[list[int]]:
    """Of two tokens or more each; `max_tokens` are scored in all, at most."""
    model = ServedModel.load(folder, ["model"])
    size = min(WINDOW, model.max_model_len)
    for text in read_texts(texts):
        token_ids = model.encode(text)
        for start in range(0, len(token_ids), size):
            window = token_ids[start : start + size][: max_tokens + 1]
            if len(window) > 1:
                yield window
                max_tokens -= len(window) - 1
            if max_tokens < 1:
                return


# --- the engine ----------------------------------------------------------------------------------------------------


def _perplexity(folder: Path, windows: list[list[int]], quantization: Method | None, **load: Any) -> float:
    runner = ModelRunner.load(
        folder, block_size=_BLOCK_SIZE, num_blocks=WINDOW // _BLOCK_SIZE, quantization=quantization, **load
    )
    try:
        logprobs = np.concatenate([_logprobs(runner, window) for window in windows])
        return math.exp(-float(logprobs.mean(dtype=np.float64)))
    finally:
        runner.shutdown()
        runner.pool.close()


def _logprobs(runner: ModelRunner, token_ids: list[int]) -> np.ndarray:
    """[tokens - 1] of a prompt that is computed in one step."""
    output = runner.submit(_step(np.array(token_ids), runner.layout)).result()
    return np.frombuffer(output.prompt_logprobs[0].logprobs, "<f4")


def _step(token_ids: np.ndarray, layout: KVLayout) -> StepBatch:
    rows = np.arange(len(token_ids))
    return StepBatch(
        token_ids=token_ids,
        positions=rows,
        slots=rows,
        query_starts=np.array([0, len(token_ids)]),
        context_lens=np.zeros(1, np.int64),
        block_tables=(np.arange(-(-len(token_ids) // layout.block_size)),),
        logit_rows=np.empty(0, np.int64),
        scored=(ScoredRows(0, token_ids[1:], 0),),
    )
