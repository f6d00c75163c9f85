"""Tiny random models, made with Transformers and saved as checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "eos_token_id": 2,
    "tie_word_embeddings": True,
}

MakeModel = Callable[..., tuple[LlamaForCausalLM, Path]]


@pytest.fixture(scope="session")
def make_model(tmp_path_factory: pytest.TempPathFactory) -> MakeModel:
    """(reference model, its folder) for a tiny Llama with these settings; biases and norms are random too."""

    def make(**settings: Any) -> tuple[LlamaForCausalLM, Path]:
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(TINY | settings))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.1)
        folder = tmp_path_factory.mktemp("model")
        model.save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def tiny(make_model: MakeModel) -> tuple[LlamaForCausalLM, Path]:
    return make_model()
