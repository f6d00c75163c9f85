"""Which architectures can be run, and by which module. Imports nothing heavy: configuration is checked before torch
is loaded."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from engine.attention import PagedAttention
    from engine.model_config import ModelConfig
    from engine.weights import Weights

_MODULES = {
    "LlamaForCausalLM": "engine.models.llama",
    "MistralForCausalLM": "engine.models.llama",
}

SUPPORTED = tuple(sorted(_MODULES))
"""Architectures, as config.json names them."""


class Model(Protocol):
    """A decoder: token ids in, logits out, in three parts so that a pipeline stage can run the part that it owns."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        ...

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: PagedAttention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """[tokens, hidden] -> the same after the last layer, before the norm; and the hidden states tapped, by layer:
        what goes into it, or with the number of layers what comes out of the last. `positions`: [tokens] int64."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab], in the model's dtype."""
        ...


def build(config: ModelConfig, weights: Weights) -> Model:
    """The model of `config.architecture`, which is one of SUPPORTED. Raises ModelError for weights that don't fit."""
    model: Model = import_module(_MODULES[config.architecture]).build(config, weights)
    return model
