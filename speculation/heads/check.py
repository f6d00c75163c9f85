"""Whether a folder holds a head that fits a model, by what its files say: before anything is started, free of torch."""

from __future__ import annotations

import math
from pathlib import Path

from core.errors import ConfigError, ModelError
from engine.checkpoints.folder import check_shards
from engine.kv_layout import DTYPE_BYTES
from engine.model_config import ModelConfig
from engine.weight_check import FLOATS, stored_tensors
from speculation.heads.config import HeadConfig, read_head_config
from speculation.heads.tensors import IN_TARGET, TO_TARGET, named, optional, shapes

AGAIN = "make the head again, for this model"
_AS_HEAD = "safetensors.torch.save_file(torch.load(file, weights_only=True), 'model.safetensors')"
_WHOLE = {TO_TARGET: ("I64", "I32"), IN_TARGET: ("BOOL",)}


def check(folder: Path, target: Path, max_memory_bytes: int, dtype: str) -> None:
    """Of the head in `folder`, for the model in folder `target`, in `dtype`, or auto. Raises ModelError, naming what
    differs or is broken, and ConfigError for too little memory. That the fingerprint fits is seen when it is loaded."""
    model = ModelConfig.from_folder(target)
    config = read_head_config(folder, model.num_layers)
    check_fits(config, folder, model.hidden_size, model.vocab_size)
    check_stored(config, folder)
    item = DTYPE_BYTES.get(dtype, DTYPE_BYTES["bfloat16"])
    nbytes = item * sum(math.prod(shape) for shape in shapes(config).values())
    if nbytes >= max_memory_bytes:
        raise ConfigError(
            f"drafter {config.kind}: the weights in {folder} take {nbytes} bytes, and it may hold {max_memory_bytes}; "
            "raise --speculation-memory"
        )


def check_fits(config: HeadConfig, folder: Path, hidden_size: int, vocab_size: int) -> None:
    """These are the target's."""
    for name, wanted in (("hidden_size", hidden_size), ("vocab_size", vocab_size)):
        if (found := getattr(config, name)) != wanted:
            raise ModelError(f"{folder}: {name} is {found}, but the model's {wanted}; {AGAIN}")


def check_stored(config: HeadConfig, folder: Path) -> None:
    """Names, shapes and types, as the headers of the files have them."""
    check_shards(folder, _AS_HEAD)
    stored = {named(name): tensor for name, tensor in stored_tensors(folder).items()}
    wanted, other = shapes(config), optional(config)
    if config.draft_vocab_size < config.vocab_size:
        wanted[TO_TARGET] = other[TO_TARGET]
    for name in wanted:
        if name not in stored:
            raise ModelError(f"{folder}: tensor {name} is missing; {AGAIN}")
    for name, tensor in stored.items():
        shape = wanted.get(name, other.get(name))
        if shape is None:
            raise ModelError(f"{folder}: a {config.kind} head has no place for tensor {name}; {AGAIN}")
        if tensor.shape != shape:
            raise ModelError(f"{folder}: tensor {name} has shape {list(tensor.shape)}, not {list(shape)}; {AGAIN}")
        if tensor.dtype not in _WHOLE.get(name, FLOATS):
            raise ModelError(f"{folder}: tensor {name} is stored as {tensor.dtype}; {AGAIN}")
