"""Rotary position embeddings (Su et al., arXiv:2104.09864), in the half-rotated form of Llama checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model_config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """([head_size / 2] float32, factor on cos and sin). Scaled types are computed by Transformers' own functions."""
    if config.rope["rope_type"] == "default":
        exponents = torch.arange(0, config.head_size, 2, dtype=torch.int64).float() / config.head_size
        return 1.0 / (config.rope["rope_theta"] ** exponents), 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    reference = LlamaConfig(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        head_dim=config.head_size,
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=dict(config.rope),
    )
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope["rope_type"]](reference, torch.device("cpu"))
    return frequencies, float(factor)


class RotaryTable:
    """cos and sin of every position, so that a step only gathers rows."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
        frequencies, factor = inverse_frequencies(config)
        angles = torch.outer(torch.arange(config.max_position_embeddings).float(), frequencies)
        cos, sin = angles.cos() * factor, angles.sin() * factor
        self._half = config.head_size // 2
        self._cos = torch.cat((cos, cos), -1).to(device, dtype)  # [positions, head_size]
        # The sign of the rotation is folded into the table: rotated = x * cos + swap(x) * sin.
        self._sin = torch.cat((-sin, sin), -1).to(device, dtype)

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, sin, each [tokens, 1, head_size]."""
        return self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x [tokens, heads, head_size]"""
        return torch.addcmul(x * cos, torch.roll(x, self._half, -1), sin)
