"""Architecture to layers."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.model_config import ModelConfig
from engine.models.llama import Llama, expected_tensors
from engine.weights import Weights

CausalModel = Llama
"""What a runner runs. ModelConfig.from_folder has refused every architecture that has no layers here."""


def load_model(config: ModelConfig, folder: Path, dtype: torch.dtype, device: torch.device) -> CausalModel:
    """Raises ModelError if the checkpoint does not fit the configuration."""
    with Weights.open(folder, expected_tensors(config), dtype, device, tied_head=config.tie_word_embeddings) as weights:
        return Llama(config, weights)
