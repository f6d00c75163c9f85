"""EAGLE-3 (arXiv:2503.01840): a decoder layer over the embedding of a token beside a feature of the position before it.

The feature of a position that the target has computed is a projection of its hidden states at some layers; of one that
is only drafted, the layer's own output there. Tensors are named as speculators and vLLM name them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from engine.fusion import gated_mlp, rotation, wide_head
from engine.layers import RMSNorm
from engine.linear import MakeLinear
from engine.rope import make_rope
from speculation.heads.config import HeadConfig
from speculation.heads.lesson import Lesson
from speculation.heads.tensors import LAYER


class HeadAttention(Protocol):
    def __call__(self, layer: int, query: torch.Tensor, kv: torch.Tensor, /) -> torch.Tensor:
        """As engine.attention.Attention."""
        ...


class Eagle:
    def __init__(
        self, config: HeadConfig, tensors: Mapping[str, torch.Tensor], make: MakeLinear, *, native: bool = False
    ) -> None:
        """`native`: what `make` makes are our own kernels'."""
        layer = config.layer
        assert layer is not None
        self.num_heads, self.num_kv_heads, self.head_size = layer.num_heads, layer.num_kv_heads, layer.head_size
        own = {name.removeprefix(LAYER): tensor for name, tensor in tensors.items()}
        eps = config.rms_norm_eps
        self._adds_to_normed = config.norm_before_residual

        def stacked(*names: str) -> torch.Tensor:
            return torch.cat([own[f"{name}.weight"] for name in names])

        self.fuse = make(own["fc.weight"], None)
        self._token_norm = RMSNorm(own["input_layernorm.weight"], eps)
        self._feature_norm = RMSNorm(own["hidden_norm.weight"], eps)
        self._qkv = make(stacked("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), None)
        self._out = make(own["self_attn.o_proj.weight"], None)
        self._mlp = gated_mlp(
            RMSNorm(own["post_attention_layernorm.weight"], eps),
            make(stacked("mlp.gate_proj", "mlp.up_proj"), None),
            make(own["mlp.down_proj.weight"], None),
            layer.activation,
        )
        self.logits = wide_head(RMSNorm(own["norm.weight"], eps), make(own["lm_head.weight"], None))
        """[rows, hidden] -> [rows, draft vocabulary]."""
        weight = own["fc.weight"]
        rope = make_rope(layer.ropes.kinds[0], layer, weight.device, weight.dtype)
        self._angles, self._rotate_ = rope.angles, rotation(rope, None, eps, native)

    def __call__(
        self,
        embedded: torch.Tensor,
        features: torch.Tensor,
        positions: torch.Tensor,
        attention: HeadAttention,
        kept: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The features that follow: [rows, hidden] of embeddings and features of the positions before, [rows, hidden];
        of the rows `kept` only, if the attention returns only those."""
        rotated = self.num_heads + self.num_kv_heads
        normed = self._feature_norm(features)
        qkv = self._qkv(torch.cat((self._token_norm(embedded), normed), -1))
        heads = qkv.view(len(qkv), -1, self.head_size)
        self._rotate_(heads[:, :rotated], self._angles(positions))
        kv = heads[:, self.num_heads :].view(len(qkv), 2, self.num_kv_heads, self.head_size)
        mixed = attention(0, heads[:, : self.num_heads], kv)
        residual = normed if self._adds_to_normed else features
        hidden = self._out.add(mixed, residual if kept is None else residual[kept])
        return self._mlp.add(hidden, hidden)

    def rollout(self, lesson: Lesson, embedding: torch.Tensor, depth: int) -> Iterator[torch.Tensor]:
        """Logits [rows, draft vocabulary] of each depth, as if all drafted tokens so far were those of the text: what
        EAGLE-3 calls the training-time test."""
        rows, attention = lesson.rows, _LookBack(lesson)
        features = self.fuse(lesson.features.flatten(1))
        positions = torch.arange(len(lesson.tokens)) - torch.tensor(lesson.offsets[:-1]).repeat_interleave(
            torch.tensor(lesson.offsets).diff()
        )
        following = lesson.tokens.roll(-1)
        hidden = self(embedding[following], features, positions, attention, rows)
        yield self.logits(hidden)
        for step in range(1, depth):
            hidden = self(embedding[lesson.token(step)], hidden, positions[rows] + step, attention)
            yield self.logits(hidden)


class _LookBack:
    """Attention of a rollout. At depth 0 a row sees the rows of its passage up to its own; at later ones those, and
    what itself was at the depths between."""

    def __init__(self, lesson: Lesson) -> None:
        bounds = torch.tensor(lesson.offsets)
        counts = torch.bincount(torch.bucketize(lesson.rows, bounds, right=True) - 1, minlength=len(bounds) - 1)
        self._spans = [(start, end) for start, end in zip(lesson.offsets, lesson.offsets[1:], strict=False)]
        self._own = torch.split(lesson.rows, counts.tolist())
        self._steps: list[torch.Tensor] = []

    def __call__(self, _layer: int, query: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        first = not self._steps
        self._steps.append(kv)
        mixed, start = [], 0
        for (begin, end), rows in zip(self._spans, self._own, strict=True):
            own = slice(start, start + len(rows))
            start += len(rows)
            later = [step[own] for step in self._steps[1:]]
            mixed.append(_attend(query[rows if first else own], self._steps[0][begin:end], rows - begin, later))
        return torch.cat(mixed)


def _attend(query: torch.Tensor, kv: torch.Tensor, places: torch.Tensor, later: list[torch.Tensor]) -> torch.Tensor:
    """query [rows, heads, size] over kv [keys, 2, kv_heads, size] up to `places` [rows], and each row over its own of
    `later`, [rows, 2, kv_heads, size] each: [rows, heads * size]."""
    rows, heads, size = query.shape
    kv_heads = kv.shape[2]
    grouped = query.view(rows, kv_heads, heads // kv_heads, size) * size**-0.5
    scores = torch.einsum("rkgd,skd->rkgs", grouped, kv[:, 0])
    hidden = torch.arange(len(kv)) > places[:, None]
    scores = scores.masked_fill(hidden[:, None, None], float("-inf"))
    beside = [torch.einsum("rkgd,rkd->rkg", grouped, step[:, 0])[..., None] for step in later]
    weights = torch.cat((scores, *beside), -1).softmax(-1).to(kv.dtype)
    mixed = torch.einsum("rkgs,skd->rkgd", weights[..., : len(kv)], kv[:, 1])
    for index, step in enumerate(later):
        mixed = mixed + weights[..., len(kv) + index, None] * step[:, 1, :, None]
    return mixed.reshape(rows, heads * size)
