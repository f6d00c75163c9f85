"""Rotary position embeddings, arXiv:2104.09864, in the half-split form that Llama checkpoints use."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import torch

from engine.model_config import DecoderConfig
from engine.rope_config import RopeConfig

Angles = tuple[torch.Tensor, torch.Tensor]
"""cos and signed sin of a step's positions, each [tokens, 1, rotated size]."""


Rotate = Callable[[torch.Tensor, Angles], None]
"""Changes heads, [tokens, heads, head_size], in place."""


def keep(heads: torch.Tensor, angles: Angles) -> None:
    """The rotation of layers that have none."""


class Rope:
    def __init__(self, rope: RopeConfig, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> None:
        inv_freq, self._scale = inverse_frequencies(rope, config)
        self._size = rope.size
        self._half = self._size // 2
        self._inv_freq = torch.cat((inv_freq, inv_freq)).to(device)  # [rotated size]
        half = torch.ones(self._half, device=device)
        self._sign = torch.cat((-half, half))
        self._dtype = dtype

    def angles(self, positions: torch.Tensor) -> Angles:
        """Computed in float32 once per step, for all layers. `positions`: [tokens]."""
        theta = (positions.to(torch.float32)[:, None] * self._inv_freq)[:, None]
        cos, sin = theta.cos(), theta.sin().mul_(self._sign)
        if self._scale != 1.0:
            cos, sin = cos.mul_(self._scale), sin.mul_(self._scale)
        return cos.to(self._dtype), sin.to(self._dtype)

    def rotate_(self, heads: torch.Tensor, angles: Angles) -> None:
        """In place, on [tokens, heads, head_size]: (a, b) becomes (a cos - b sin, b cos + a sin)."""
        cos, sin = angles
        swapped = heads.roll(self._half, -1)
        heads.mul_(cos).addcmul_(swapped, sin)


class PartialRope(Rope):
    """Rotates the first dimensions of a head and leaves the rest as it is."""

    def rotate_(self, heads: torch.Tensor, angles: Angles) -> None:
        super().rotate_(heads[..., : self._size], angles)


def make_rope(rope: RopeConfig, config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> Rope:
    return (Rope if rope.size == config.head_size else PartialRope)(rope, config, device, dtype)


def inverse_frequencies(rope: RopeConfig, config: DecoderConfig) -> tuple[torch.Tensor, float]:
    """[rotated size / 2] float32, and the factor on cos and sin. Scaled types are computed by Transformers."""
    if rope.rope_type in ("default", "dynamic"):  # the same for as long as we let a sequence get, see ROPE_TYPES
        exponents = torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size
        return 1.0 / rope.parameters["rope_theta"] ** exponents, 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    fields = SimpleNamespace(
        rope_parameters={"rope_type": rope.rope_type, **rope.parameters},
        head_dim=config.head_size,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        max_position_embeddings=config.max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope.rope_type](fields)
    return inv_freq.float(), float(scale)
