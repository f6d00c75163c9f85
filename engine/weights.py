"""Reading weights from safetensors files: every tensor by name, exactly once, none left over. Pickles are refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from core.errors import ModelError
from engine.model_config import ModelConfig
from engine.weight_check import DERIVED, FLOATS

_INDEX = "model.safetensors.index.json"
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Part:
    """What of a tensor to read: these rows, one range after the other, or these columns of all rows."""

    rows: tuple[range, ...] | None = None
    columns: range | None = None


WHOLE = Part()


class Weights:
    """The tensors of a folder, as a context manager. Raises ModelError for anything that is not as asked for.
    `bytes_read` counts what was read of them, as stored."""

    def __init__(self, folder: str | Path, *, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.bytes_read = 0
        self.folder = self._folder = Path(folder)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            for path in weight_files(self._folder):
                self._add(path)
        except BaseException:
            self._open.close()
            raise

    def _add(self, path: Path) -> None:
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error
        for name in file.keys():  # noqa: SIM118 - not a mapping
            if name in self._files:
                raise ModelError(f"{path}: tensor {name} is in another file too; fetch the model again")
            self._files[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def take(self, name: str, *shape: int, part: Part = WHOLE) -> torch.Tensor:
        """The tensor, which has `shape`, or a part of it, in memory of its own. It can't be taken again."""
        return self._read(name, shape, part).to(self.device, self.dtype, copy=True)

    def take_stacked(
        self, names: Sequence[str], *shapes: tuple[int, ...], parts: Sequence[Part] | None = None
    ) -> torch.Tensor:
        """Several tensors, or a part of each, in one, along the first axis."""
        asked = zip(names, shapes, parts or [WHOLE] * len(names), strict=True)
        found = [self._read(name, shape, part).to(self.dtype) for name, shape, part in asked]
        return torch.cat(found).to(self.device)

    def leave(self, prefix: str) -> None:
        """What starts with `prefix` is another rank's to take."""
        for name in [name for name in self._files if name.startswith(prefix)]:
            del self._files[name]

    def _read(self, name: str, shape: tuple[int, ...], part: Part) -> torch.Tensor:
        file = self._files.pop(name, None)
        if file is None:
            raise ModelError(f"{self._folder}: tensor {name} is missing from the weights; fetch the model again")
        entry = file.get_slice(name)
        if tuple(entry.get_shape()) != shape:
            raise ModelError(
                f"{self._folder}: tensor {name} has shape {list(entry.get_shape())}, "
                f"but config.json makes it {list(shape)}; config and weights must be of the same model"
            )
        if entry.get_dtype() not in FLOATS:
            raise ModelError(
                f"{self._folder}: tensor {name} is stored as {entry.get_dtype()}; "
                "use the model's bfloat16, float16 or float32 weights"
            )
        tensor = read_part(file, name, part)
        self.bytes_read += tensor.nbytes
        return tensor

    def check_all_taken(self) -> None:
        """Raise ModelError if the files hold a tensor that the model has no place for."""
        extra = [name for name in self._files if not name.endswith(DERIVED)]
        if extra:
            raise ModelError(
                f"{self._folder}: the model has no place for tensor {min(extra)} ({len(extra)} such in all); "
                "config and weights must be of the same model"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.clear()
        self._open.close()


def read_part(file: Any, name: str, part: Part) -> torch.Tensor:
    tensor: torch.Tensor
    if part.columns is not None:
        tensor = file.get_slice(name)[:, part.columns.start : part.columns.stop]
    elif part.rows is not None:
        entry = file.get_slice(name)
        tensor = torch.cat([entry[rows.start : rows.stop] for rows in part.rows])
    else:
        tensor = file.get_tensor(name)
    return tensor


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that make up the model: those the index names, or all there are."""
    index = folder / _INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} has no weight_map: fetch the model again") from error
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelError(f"{folder} lacks {missing[0]}, which its index names: fetch the model again")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(folder.glob("*.bin")):
        raise ModelError(f"{folder} has pickled weights only, which can run code: convert them to safetensors")
    if not files:
        raise ModelError(f"{folder} has no *.safetensors weights: put them beside its config.json")
    return files


def fingerprint(folder: str | Path, config: ModelConfig, *changes: str) -> str:
    """Identifies model and weights without reading all of them: configuration, safetensors headers (names, shapes,
    offsets) and evenly spaced samples of the bytes. Equal on every machine that has the same files. `changes` are what
    else the KV depends on."""
    numbers = asdict(config)
    del numbers["eos_token_ids"]  # changes no KV
    digest = hashlib.blake2b(json.dumps(numbers, sort_keys=True).encode(), digest_size=16)
    digest.update("\0".join(filter(None, changes)).encode())
    for path in weight_files(Path(folder)):
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            header = int.from_bytes(file.read(8), "little")
            digest.update(file.read(min(header, size)))
            for sample in range(_SAMPLES):
                file.seek(8 + header + max(0, size - header - 8 - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
