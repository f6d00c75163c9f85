"""What a folder must hold to be served, checked without reading a weight."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

from core.errors import ModelError

CheckConfig = Callable[[dict], None]
"""Raises ModelError for a config.json that the engine can't run."""

_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_PICKLES = ("*.bin", "*.pt", "*.pth")
_HEADER_LIMIT = 100_000_000  # safetensors' own bound on its header


def validate(folder: Path, check_config: CheckConfig | None = None) -> Path:
    """`folder` itself if it is a whole Hugging Face model with safetensors weights and a tokenizer.

    Raises ModelError that names what is missing, cut short, or not supported.
    """
    config = read_config(folder / "config.json")
    if check_config is not None:
        check_config(config)
    for shard in _shards(folder):
        _check_shard(shard)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer.json: put the model's tokenizer files beside its weights")
    return folder


def read_config(path: Path) -> dict:
    """The JSON object in `path`."""
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise ModelError(
            f"{path.parent} has no config.json: name a folder in Hugging Face form, or a .gguf file"
        ) from error
    except OSError as error:
        raise ModelError(f"can't read {path} ({error.strerror}): make it readable to this user") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON ({error}): fetch the model again") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} is not a JSON object: fetch the model again")
    return config


def _shards(folder: Path) -> list[Path]:
    """The weight files: those the index names, else every safetensors file of the folder."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        return found or _refuse_without_weights(folder)
    weights = read_config(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise ModelError(f"{index} has no weight_map: fetch the model again")
    shards = [folder / name for name in sorted(set(weights.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {missing[0]} ({len(missing)} of {len(shards)} weight files missing): fetch them")
    return shards


def _refuse_without_weights(folder: Path) -> list[Path]:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{folder} has pickled weights (.bin) only, and loading a pickle can run code: convert them where you trust "
            "them, with AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    if next(folder.glob("*.gguf"), None):
        raise ModelError(f"{folder} has no safetensors weights: name the .gguf file in it instead")
    raise ModelError(f"{folder} has no *.safetensors weights: put them beside its config.json")


def _check_shard(shard: Path) -> None:
    """A safetensors file is 8 bytes of header length, a JSON header, then tensors up to the largest end offset."""
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
            header = json.loads(file.read(length)) if 0 < length <= _HEADER_LIMIT else {}
    except OSError as error:
        raise ModelError(f"can't read {shard} ({error.strerror}): make it readable to this user") from error
    except ValueError:
        header = {}
    if start == b"version ":
        raise ModelError(f"{shard} is a Git LFS pointer, not weights: run `git lfs pull` in {shard.parent}")
    ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    if not ends:
        raise ModelError(f"{shard} is not a safetensors file, or is cut short: fetch it again")
    if size != 8 + length + max(ends):
        raise ModelError(f"{shard} is {size} bytes where its header says {8 + length + max(ends)}: fetch it again")
