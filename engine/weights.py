"""Reading checkpoints: safetensors only, every tensor accounted for before the first is loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import ModelError

Shapes = dict[str, tuple[int, ...]]

SAMPLE_BYTES = 1 << 16
DERIVED = ("rotary_emb.inv_freq",)
"""Tensors that old checkpoints carry and that follow from the configuration."""


class Weights:
    """The tensors of a folder, by name, each read once, converted to the serving type on its device."""

    def __init__(self, files: dict[str, Any], where: dict[str, str], dtype: torch.dtype, device: torch.device) -> None:
        self._files = files
        self._where = where
        self._dtype = dtype
        self._device = device

    @classmethod
    def open(
        cls, folder: Path, expected: Shapes, dtype: torch.dtype, device: torch.device, *, tied_head: bool = False
    ) -> Weights:
        """Raises ModelError, naming the tensor, unless the folder has exactly the expected ones. A copy of the tied
        output head is let pass."""
        files: dict[str, Any] = {}
        where: dict[str, str] = {}
        shapes: Shapes = {}
        for path in weight_files(folder):
            try:
                file = safe_open(path, framework="pt", device="cpu").__enter__()
            except (SafetensorError, OSError) as error:
                raise ModelError(f"cannot read {path}: {error}; fetch the model again") from error
            files[path.name] = file
            for name in file.keys():  # noqa: SIM118  not a mapping
                where[name] = path.name
                shapes[name] = tuple(file.get_slice(name).get_shape())
        _compare(folder, shapes, expected, tied_head)
        return cls(files, where, dtype, device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for file in self._files.values():
            file.__exit__(None, None, None)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def take(self, name: str) -> Tensor:
        # A copy: the tensor must not keep the whole file mapped.
        return self._files[self._where[name]].get_tensor(name).to(self._device, self._dtype, copy=True)

    def fuse(self, names: Sequence[str]) -> Tensor:
        """The tensors stacked along their first axis."""
        return self.take(names[0]) if len(names) == 1 else torch.cat([self.take(name) for name in names])


def weight_files(folder: Path) -> list[Path]:
    """Raises ModelError if there are none, saying so when there is a pickle instead."""
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return files
    if pickles := sorted(folder.glob("*.bin")):
        raise ModelError(
            f"{pickles[0]} is a pickle and is never loaded: it could run code; save the model as safetensors"
        )
    raise ModelError(f"{folder} has no *.safetensors files")


def _compare(folder: Path, found: Shapes, expected: Shapes, tied_head: bool) -> None:
    for name, shape in expected.items():
        if name not in found:
            raise ModelError(f"{folder}: tensor {name} is missing; the checkpoint is incomplete or of another model")
        if found[name] != shape:
            raise ModelError(f"{folder}: tensor {name} has shape {found[name]}, config.json says {shape}")
    allowed = {"lm_head.weight"} if tied_head else set()
    for name in found:
        if name not in expected and name not in allowed and not name.endswith(DERIVED):
            raise ModelError(f"{folder}: tensor {name} is not part of this architecture; config.json may be another's")


def fingerprint(folder: Path) -> str:
    """Identifies the weights: configuration, tensor tables, and samples of the bytes at both ends of each file."""
    digest = xxhash.xxh3_128()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(volatile, None)
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weight_files(folder):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            digest.update(file.read(length + SAMPLE_BYTES))
            file.seek(-min(SAMPLE_BYTES, path.stat().st_size), 2)
            digest.update(file.read())
    return digest.hexdigest()
