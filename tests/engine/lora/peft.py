"""Random adapters as PEFT saves them, and what merging one makes of a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
EVERYTHING = (*ATTENTION, "gate_proj", "up_proj", "down_proj")


def save_adapter(
    folder: Path,
    base: Path,
    targets: Sequence[str] = EVERYTHING,
    *,
    rank: int = 4,
    seed: int = 0,
    ranks: Mapping[str, int] | None = None,
    **config: Any,
) -> Path:
    """An adapter of the checkpoint in `base` for all projections named in `targets`. `ranks`: by projection, where it
    is not `rank`."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in load_file(base / "model.safetensors").items():
        kind = name.split(".")[-2]
        if kind in targets and name.endswith("weight"):
            module, own = f"base_model.model.{name.removesuffix('.weight')}", (ranks or {}).get(kind, rank)
            tensors[f"{module}.lora_A.weight"] = torch.randn(own, weight.shape[1], generator=generator) * 0.3
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], own, generator=generator) * 0.3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": 8, "bias": "none"}
    values |= {"target_modules": list(targets), "lora_dropout": 0.05, "inference_mode": True}
    (folder / "adapter_config.json").write_text(json.dumps(values | config))
    return folder


def merge(adapter: Path, base: Path, folder: Path) -> Path:
    """A checkpoint of W + scale * B A for every adapted W, by PEFT's definitions."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    config = json.loads((adapter / "adapter_config.json").read_text())
    weights, matrices = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for key, down in matrices.items():
        if found := re.fullmatch(r"base_model\.model\.(.+)\.lora_A\.weight", key):
            module = found[1]
            alpha = config.get("alpha_pattern", {}).get(module.split(".")[-1], config["lora_alpha"])
            scale = alpha / (len(down) ** 0.5 if config.get("use_rslora") else len(down))
            weights[f"{module}.weight"] += scale * matrices[key.replace("lora_A", "lora_B")] @ down
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
