"""Heads before training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from core.errors import ConfigError
from engine.model_config import DecoderConfig
from engine.vocabulary import Vocabulary
from speculation.heads.checkpoint import Target
from speculation.heads.config import HeadConfig, Kind, default_taps, read_layer
from speculation.heads.tensors import shapes

DRAFT_VOCABULARY = 8192
"""Tokens that a new head proposes, or all of a smaller vocabulary."""
DEPTH = 4
_FIRST_NORM = 0.3
"""Factor on the scale of the target's last norm, so that a layer that knows nothing yet is not sure of it."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What may be chosen of a new head."""

    draft_vocab_size: int = DRAFT_VOCABULARY
    depth: int = DEPTH
    intermediate_size: int | None = None
    """Of EAGLE-3's layer; None: twice the hidden size."""


def target_of(config: DecoderConfig, vocabulary: Vocabulary) -> Target:
    return Target(config.hidden_size, config.vocab_size, config.num_layers, vocabulary.fingerprint)


def new_config(kind: Kind, target: DecoderConfig, fingerprint: str, shape: Shape) -> tuple[HeadConfig, dict[str, Any]]:
    """And EAGLE-3's layer as its config.json says it, empty for other kinds."""
    fields = _layer_fields(target, shape) if kind == "eagle3" else {}
    config = HeadConfig(
        kind=kind,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        draft_vocab_size=min(shape.draft_vocab_size, target.vocab_size),
        taps=default_taps(target.num_layers) if kind == "eagle3" else (target.num_layers,),
        depth=shape.depth,
        rms_norm_eps=target.rms_norm_eps,
        fingerprint=fingerprint,
        layer=read_layer(fields, "the new layer") if fields else None,
    )
    return config, fields


def new_tensors(
    config: HeadConfig, vocabulary: Vocabulary, token_ids: torch.Tensor, seed: int
) -> dict[str, torch.Tensor]:
    """Float32. Medusa and Hydra begin as the target's own output layer; EAGLE-3 has that, and a layer of chance."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for name, size in shapes(config).items():
        if name == "norm.weight":
            scale = _FIRST_NORM if config.kind == "eagle3" else 1.0
            found[name] = vocabulary.norm.float().cpu() * scale
        elif name == "lm_head.weight":
            found[name] = vocabulary.output[token_ids.to(vocabulary.output.device)].float().cpu()
        elif len(size) == 1:
            found[name] = torch.zeros(size) if name.endswith(".bias") else torch.ones(size)
        elif name.startswith("heads."):
            found[name] = torch.zeros(size)
        else:
            found[name] = torch.randn(size, generator=generator) * size[1] ** -0.5
    return found


def _layer_fields(target: DecoderConfig, shape: Shape) -> dict[str, Any]:
    rope = target.ropes.kinds[0]
    if rope.size != target.head_size:
        raise ConfigError("eagle3: this model rotates part of each head, which the layer does not; train another kind")
    return {
        "model_type": "llama",
        "vocab_size": target.vocab_size,
        "hidden_size": target.hidden_size,
        "intermediate_size": shape.intermediate_size or 2 * target.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": target.num_heads,
        "num_key_value_heads": target.num_kv_heads,
        "head_dim": target.head_size,
        "max_position_embeddings": target.max_position_embeddings,
        "rms_norm_eps": target.rms_norm_eps,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": rope.rope_type, **rope.parameters},
    }
