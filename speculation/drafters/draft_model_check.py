"""Whether a folder can draft for a model, by what its files say: before anything is started, and free of torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ModelError
from engine.checkpoints.folder import check_shards, read_config
from engine.kv_layout import DTYPE_BYTES
from engine.model_config import ModelConfig
from engine.weight_check import check_weights, stored_tensors

BLOCK_SIZE = 16
LEAST_TOKENS = 512
"""Of KV: with less it would hardly ever draft."""
_TOKENIZER = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class Room:
    """What a draft model takes of the memory that it may hold."""

    weight_bytes: int
    num_blocks: int


def check(folder: Path, target: Path, max_memory_bytes: int, dtype: str) -> None:
    """Of the folder of a draft model, for the model in folder `target`; `dtype` is that of both, or auto. Raises
    ModelError, naming what differs or is broken, and ConfigError for too little memory."""
    config = check_config(folder, ModelConfig.from_folder(target).vocab_size)
    check_tokens(folder, target)
    room_for(folder, config, dtype if dtype in DTYPE_BYTES else "bfloat16", max_memory_bytes, max_requests=1)


def check_config(folder: Path, vocab_size: int) -> ModelConfig:
    """Raises ModelError for a folder that is no model with whole safetensors weights and this vocabulary."""
    config = ModelConfig.from_folder(folder)
    if config.vocab_size != vocab_size:
        raise ModelError(
            f"{folder / 'config.json'}: vocab_size is {config.vocab_size}, and that of the model it is to draft for "
            f"{vocab_size}; give a draft model of the same family"
        )
    check_shards(folder)
    check_weights(folder, config)
    return config


def check_tokens(folder: Path, target: Path) -> None:
    """Raises ModelError unless a token id means the same text to both. A folder without tokenizer.json says nothing."""
    files = folder / _TOKENIZER, target / _TOKENIZER
    if not all(file.is_file() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return
    ours, theirs = (_token_ids(file) for file in files)
    for token in ours.keys() | theirs.keys():
        if ours.get(token) != theirs.get(token):
            raise ModelError(
                f"{files[0]}: token {token!r} is {_number(ours.get(token))}, and {_number(theirs.get(token))} in "
                f"{files[1]}; give a draft model with the same tokenizer"
            )


def _number(token_id: int | None) -> str:
    return "not there" if token_id is None else f"number {token_id}"


def _token_ids(file: Path) -> dict[str, int]:
    """Merges are left aside: they say how text is cut, not what a token means."""
    try:
        tokenizer = read_config(file)
        vocab = tokenizer["model"]["vocab"]
        known = dict(vocab) if isinstance(vocab, Mapping) else _listed(vocab)
        return known | {added["content"]: added["id"] for added in tokenizer.get("added_tokens", [])}
    except (KeyError, TypeError, IndexError) as error:
        raise ModelError(f"{file} has no vocabulary of tokens: fetch the model again") from error


def _listed(vocab: list[Any]) -> dict[str, int]:
    """Of a unigram model: pairs of token and score."""
    return {token: number for number, (token, _) in enumerate(vocab)}


def room_for(folder: Path, config: ModelConfig, dtype: str, max_memory_bytes: int, max_requests: int) -> Room:
    """The memory shared out: weights first. Raises ConfigError if they leave too little for KV."""
    size = DTYPE_BYTES[dtype]
    weight_bytes = size * sum(math.prod(stored.shape) for stored in stored_tensors(folder).values())
    block_bytes = BLOCK_SIZE * config.kv_token_bytes(dtype)
    longest = -(-config.max_position_embeddings // BLOCK_SIZE)
    least = min(LEAST_TOKENS // BLOCK_SIZE, longest)
    num_blocks = min((max_memory_bytes - weight_bytes) // block_bytes, longest * max_requests)
    if num_blocks < least:
        needed = weight_bytes + least * block_bytes
        raise ConfigError(
            f"drafter draft_model has {_mib(max_memory_bytes)} of memory, and the weights in {folder} with a KV cache "
            f"of {least * BLOCK_SIZE} tokens take {_mib(needed)}; raise --speculation-memory, which drafters share"
        )
    return Room(weight_bytes, num_blocks)


def _mib(count: float) -> str:
    return f"{math.ceil(10 * count / 2**20) / 10} MiB"
