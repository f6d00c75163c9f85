"""Whether a checkpoint holds what its config.json demands, by the headers of its safetensors files: milliseconds, and
free of torch, so that a wrong one is refused before a process is started for it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from core.errors import ModelError
from engine.checkpoints.folder import shards
from engine.model_config import DecoderConfig, ModelConfig
from engine.models.tensors import EMBEDDING, HEAD, Shape, needed

FLOATS = ("F32", "F16", "BF16")
DERIVED = ".rotary_emb.inv_freq"
"""Old checkpoints store these buffers, which follow from the configuration."""
_COMPARED_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as its file has it."""

    path: Path
    dtype: str
    shape: Shape
    start: int
    end: int
    """Where in the file its bytes are."""


def check_weights(folder: Path, config: ModelConfig) -> None:
    """Raise ModelError, naming the tensor, unless the files hold the model's tensors and nothing else."""
    if not isinstance(config, DecoderConfig):
        from engine.fallback.load import check  # loads torch and Transformers, as reading the configuration did

        check(folder, config)
        return
    found, wanted = stored_tensors(folder), needed(config)
    tied = found.pop(HEAD, None) if config.tie_word_embeddings else None
    for name, shape in wanted.items():
        if name not in found:
            raise ModelError(f"{folder}: tensor {name} is missing from the weights; fetch the model again")
        _check(name, found[name], shape, folder)
    if tied is not None:
        _check(HEAD, tied, wanted[EMBEDDING], folder)
        if not _same(tied, found[EMBEDDING]):
            raise ModelError(f"{folder}: config.json says tie_word_embeddings, but {HEAD} differs from the embeddings")
    extra = [name for name in found if name not in wanted and not name.endswith(DERIVED)]
    if extra:
        raise ModelError(
            f"{folder}: the model has no place for tensor {min(extra)} ({len(extra)} such in all); "
            "config and weights must be of the same model"
        )


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a folder that `checkpoints.folder.validate` has looked at."""
    found: dict[str, Stored] = {}
    for path in shards(folder):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if name in found:
                raise ModelError(f"{path}: tensor {name} is in another file too; fetch the model again")
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            found[name] = Stored(path, entry["dtype"], tuple(entry["shape"]), start, end)
    return found


def _check(name: str, stored: Stored, shape: Shape, folder: Path) -> None:
    if stored.shape != shape:
        raise ModelError(
            f"{folder}: tensor {name} has shape {list(stored.shape)}, but config.json makes it {list(shape)}; "
            "config and weights must be of the same model"
        )
    if stored.dtype not in FLOATS:
        raise ModelError(
            f"{folder}: tensor {name} is stored as {stored.dtype}; use the model's bfloat16, float16 or float32 weights"
        )


def _same(one: Stored, other: Stored) -> bool:
    """Whether two tensors are equal; of different precision they are compared when the model is loaded."""
    if one.dtype != other.dtype:
        return True
    with one.path.open("rb") as left, other.path.open("rb") as right:
        left.seek(one.start)
        right.seek(other.start)
        for start in range(one.start, one.end, _COMPARED_BYTES):
            count = min(_COMPARED_BYTES, one.end - start)
            if left.read(count) != right.read(count):
                return False
    return True
