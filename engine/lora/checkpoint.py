"""A PEFT adapter's folder: which matrices it has for which projections, checked against the model it is served with.
Free of torch: the command line refuses what workers could not load."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from core.errors import ConfigError, ModelError
from engine.lora.adapter_config import AdapterConfig
from engine.models.tensors import Shape
from engine.weight_check import FLOATS, stored_tensors

DEFAULT_MAX_RANK = 16
WEIGHTS = "adapter_model.safetensors"

_PREFIX = "base_model.model."
_MATRIX = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_PROJECTION = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\.\w+_proj")
"""Of the decoder layers. Output layer, embeddings and experts are not adapted."""


@dataclass(frozen=True, slots=True)
class Module:
    """W + scale * B A for one projection: `down` names A [rank, inputs], `up` names B [outputs, rank]."""

    rank: int
    scale: float
    down: str
    up: str


@dataclass(frozen=True, slots=True)
class Adapter:
    """`modules` by the name of the projection in the base model."""

    name: str
    folder: Path
    modules: Mapping[str, Module]

    @property
    def weights(self) -> Path:
        return self.folder / WEIGHTS

    def digest(self) -> str:
        """Identifies what it computes: names, scales and all the bytes of its matrices."""
        digest = hashlib.blake2b(f"{self.name}\0{sorted(self.modules.items())}".encode(), digest_size=16)
        with self.weights.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()


def read_adapters(modules: Mapping[str, str], model_folder: Path, max_rank: int = DEFAULT_MAX_RANK) -> list[Adapter]:
    """The adapters of `modules` (folder by name), each of which fits the model. Raises ModelError, ConfigError."""
    if not modules:
        return []
    shapes = {name: stored.shape for name, stored in stored_tensors(model_folder).items()}
    return [_read(name, Path(path), shapes, max_rank) for name, path in modules.items()]


def _read(name: str, folder: Path, shapes: Mapping[str, Shape], max_rank: int) -> Adapter:
    path = folder / WEIGHTS
    if not folder.is_dir():
        raise ModelError(f"--lora-modules {name}: {folder} is no folder; give that of a PEFT adapter on this machine")
    if not path.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = "has pickled weights only, which can run code: save it as safetensors" if pickled else f"lacks {WEIGHTS}"
        raise ModelError(f"--lora-modules {name}: {folder} {why}")
    config = AdapterConfig.from_folder(folder)
    if config.largest_rank > max_rank:
        raise ConfigError(
            f"--lora-modules {name}: the adapter has rank {config.largest_rank}; raise --max-lora-rank {max_rank}"
        )
    tensors = _shapes(path)
    found = _modules(path, tensors)
    modules = {}
    for module in sorted(found):
        entry = Module(
            config.rank_of(module),
            config.scale_of(module),
            *(f"{_PREFIX}{module}.lora_{side}.weight" for side in "AB"),
        )
        _check(path, module, entry, tensors, shapes)
        modules[module] = entry
    return Adapter(name, folder, modules)


def _shapes(path: Path) -> dict[str, Shape]:
    try:
        with safe_open(path, framework="np") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            for name, entry in slices.items():
                if entry.get_dtype() not in FLOATS:
                    raise ModelError(f"{path}: tensor {name} is stored as {entry.get_dtype()}; save it as float32")
            return {name: tuple(entry.get_shape()) for name, entry in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is not a whole safetensors file ({error}): fetch it again") from error


def _modules(path: Path, tensors: Iterable[str]) -> set[str]:
    found = set()
    for tensor in tensors:
        match = _MATRIX.fullmatch(tensor)
        if match is None or not _PROJECTION.fullmatch(match["module"]):
            raise ModelError(
                f"{path}: tensor {tensor} has no place here; adapters may have lora_A and lora_B of the attention and "
                "MLP projections of the decoder layers, and nothing else"
            )
        found.add(match["module"])
    if not found:
        raise ModelError(f"{path} holds no tensors: save the adapter again")
    return found


def _check(path: Path, module: str, entry: Module, tensors: Mapping[str, Shape], model: Mapping[str, Shape]) -> None:
    base = model.get(f"{module}.weight")
    if base is None:
        raise ModelError(f"{path}: tensor {entry.down} is for {module}, which this model does not have")
    outputs, inputs = base
    for tensor, shape in ((entry.down, (entry.rank, inputs)), (entry.up, (outputs, entry.rank))):
        if tensor not in tensors:
            raise ModelError(f"{path}: tensor {tensor} is missing; save the adapter again")
        if tensors[tensor] != shape:
            raise ModelError(
                f"{path}: tensor {tensor} has shape {list(tensors[tensor])}, but rank {entry.rank} and this model make "
                f"it {list(shape)}; it must be an adapter of the model that is served"
            )
