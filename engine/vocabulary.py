"""The ends of a model as plain tensors, for what is to share them: whatever the runner has made of its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import ModelError
from engine.model_config import DecoderConfig, ModelConfig
from engine.models.tensors import EMBEDDING, HEAD
from engine.weights import Weights, fingerprint

_NORM = "model.norm.weight"


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Whoever has it changes nothing. Where the model ties them, both are one tensor."""

    embedding: torch.Tensor  # [vocab, hidden]
    output: torch.Tensor  # [vocab, hidden] from the normed hidden state to logits
    norm: torch.Tensor  # [hidden] the factors of the last RMSNorm
    fingerprint: str
    """Of the model's files, whatever is made of them (engine.weights.fingerprint)."""

    @property
    def on_host(self) -> Vocabulary:
        embedding = self.embedding.cpu()
        output = embedding if self.output is self.embedding else self.output.cpu()
        return Vocabulary(embedding, output, self.norm.cpu(), self.fingerprint)


def read_vocabulary(
    folder: Path,
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    embedding: torch.Tensor | None = None,
) -> Vocabulary:
    """From the model's files; `embedding` is used in place of theirs, if it is at hand. Raises ModelError for a model
    that is run by its class in Transformers, whose tensors have names of their own."""
    if not isinstance(config, DecoderConfig):
        raise ModelError(
            f"architecture {config.architecture} is run by its class in Transformers; its embedding can't be shared "
            "with a draft; use a drafter without weights, or a draft model"
        )
    shape = (config.vocab_size, config.hidden_size)
    with Weights(folder, device=device, dtype=dtype) as weights:
        if embedding is None:
            embedding = weights.take(EMBEDDING, *shape)
        output = embedding if config.tie_word_embeddings else weights.take(HEAD, *shape)
        norm = weights.take(_NORM, config.hidden_size)
    return Vocabulary(embedding, output, norm + 1 if config.gemma else norm, fingerprint(folder, config))
