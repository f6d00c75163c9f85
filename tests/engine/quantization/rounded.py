"""What quantization makes of a checkpoint, for Transformers to run."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from engine.quantization.int8 import quantize
from engine.quantization.methods import is_quantized


def rounded(base: Path, folder: Path) -> Path:
    """A copy of the checkpoint whose projections have the values that int8 stands for."""
    shutil.copytree(base, folder)
    weights = load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if is_quantized(name, tuple(weight.shape)):
            integers, scales = quantize(weight)
            weights[name] = integers * scales[:, None]
    assert any(not torch.equal(w, weights[n]) for n, w in load_file(base / "model.safetensors").items())
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
