"""What a folder must hold to be served, checked without reading a weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from core.errors import ModelError

CheckConfig = Callable[[dict[str, Any]], object]
"""Raises ModelError for a config.json that the engine can't run, as ModelConfig.from_dict does."""

_TOKENIZERS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))
_PICKLES = ("*.bin", "*.pt", "*.pth")
AS_MODEL = "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
_LFS = b"version https://git-lfs"


def validate(folder: Path, check_config: CheckConfig | None = None) -> Path:
    """`folder` itself if it is a whole Hugging Face model with safetensors weights and a tokenizer.

    Raises ModelError that names what is missing, cut short, or not supported.
    """
    config = read_config(folder / "config.json")
    if check_config is not None:
        check_config(config)
    check_shards(folder)
    if not any(all((folder / name).is_file() for name in names) for names in _TOKENIZERS):
        raise ModelError(f"{folder} has no tokenizer.json: put the model's tokenizer files beside its weights")
    return folder


def check_shards(folder: Path, convert: str = AS_MODEL) -> None:
    """Raises ModelError unless the weights are there, whole, and no pickles. `convert` as for `shards`."""
    for shard in shards(folder, convert):
        _check_shard(shard)


def read_config(path: Path) -> dict[str, Any]:
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


def shards(folder: Path, convert: str = AS_MODEL) -> list[Path]:
    """The weight files: those the index names, else every safetensors file of the folder. `convert`: what makes such
    ones of pickles."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        found = sorted(folder.glob("*.safetensors"))
        return found or _refuse_without_weights(folder, convert)
    weights = read_config(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise ModelError(f"{index} has no weight_map: fetch the model again")
    shards = [folder / name for name in sorted(set(weights.values()))]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing:
        raise ModelError(
            f"{folder} lacks {len(missing)} of {len(shards)} weight files ({missing[0]}): fetch them again"
        )
    return shards


def _refuse_without_weights(folder: Path, convert: str) -> list[Path]:
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise ModelError(
            f"{folder} has pickled weights (.bin) only, and loading a pickle can run code: convert them where you "
            f"trust them, with {convert}"
        )
    if next(folder.glob("*.gguf"), None):
        raise ModelError(f"{folder} has no safetensors weights: name the .gguf file in it instead")
    raise ModelError(f"{folder} has no *.safetensors weights: put them beside its config.json")


def _check_shard(shard: Path) -> None:
    """The header must parse and account for every byte of the file; safetensors' own reader knows."""
    from safetensors import SafetensorError, safe_open

    try:
        with shard.open("rb") as file:
            start = file.read(len(_LFS))
        if start == _LFS:
            raise ModelError(f"{shard} is a Git LFS pointer, not weights: run `git lfs pull` in {shard.parent}")
        with safe_open(shard, framework="np"):
            pass
    except OSError as error:
        raise ModelError(f"can't read {shard} ({error.strerror}): make it readable to this user") from error
    except SafetensorError as error:
        raise ModelError(f"{shard} is not a whole safetensors file ({error}): fetch it again") from error
