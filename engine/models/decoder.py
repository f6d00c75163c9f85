"""The decoder that Llama, Mistral, Phi-3, Qwen2 and Qwen3 share; ModelConfig says in what they differ. Equal to their
classes in Transformers in float32. Differences are settled when the model is built: a running layer asks nothing.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812

from core.errors import ModelError
from engine.attention import PagedAttention
from engine.layers import HeadNorms, RMSNorm, SwiGLU
from engine.linears import Linears
from engine.model_config import ModelConfig
from engine.rope import Angles, Rope, make_rope
from engine.weights import Weights


class DecoderLayer:
    __slots__ = (
        "_attention_norm",
        "_heads",
        "_index",
        "_mlp",
        "_mlp_norm",
        "_out",
        "_qkv",
        "_rotate_",
        "_split",
        "_window",
    )

    def __init__(self, index: int, config: ModelConfig, rope: Rope, weights: Weights, linears: Linears) -> None:
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        inner = config.intermediate_size
        self._index = index
        self._window = config.windows[index]
        self._heads = (config.num_heads, config.num_kv_heads, config.head_size)
        self._split = (queries, queries + keys)
        self._attention_norm = RMSNorm(weights.take(prefix + "input_layernorm.weight", hidden), config.rms_norm_eps)
        self._mlp_norm = RMSNorm(weights.take(prefix + "post_attention_layernorm.weight", hidden), config.rms_norm_eps)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qkv, gate_up = {"q_proj": queries, "k_proj": keys, "v_proj": keys}, {"gate_proj": inner, "up_proj": inner}
        if config.fused:
            qkv, gate_up = {"qkv_proj": queries + 2 * keys}, {"gate_up_proj": 2 * inner}
        self._qkv = linears.columns(attention, qkv, hidden, config.qkv_bias)
        self._out = linears.row(attention + "o_proj", queries, hidden, config.out_bias)
        self._rotate_ = _head_norms(weights, attention, config, rope) if config.head_norms else rope.rotate_
        self._mlp = SwiGLU(
            linears.columns(mlp, gate_up, hidden, config.mlp_bias),
            linears.row(mlp + "down_proj", inner, hidden, config.mlp_bias),
            inner,
        )

    def __call__(self, hidden: torch.Tensor, angles: Angles, attention: PagedAttention) -> torch.Tensor:
        heads, kv_heads, head_size = self._heads
        queries, rotated = self._split
        qkv = self._qkv(self._attention_norm(hidden))  # [tokens, (heads + 2 kv_heads) * head_size]
        self._rotate_(qkv[:, :rotated].view(-1, heads + kv_heads, head_size), angles)
        mixed = attention(
            self._index,
            qkv[:, :queries].view(-1, heads, head_size),
            qkv[:, queries:].view(-1, 2, kv_heads, head_size),
            self._window,
        )
        hidden = self._out.add(mixed, hidden)
        return self._mlp.add(self._mlp_norm(hidden), hidden)


class Decoder:
    """Implements engine.models.registry.Model."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", *shape)
        self._rope = make_rope(config, weights.device, weights.dtype)
        linears = Linears(weights)
        self._layers = [DecoderLayer(i, config, self._rope, weights, linears) for i in range(config.num_layers)]
        self._norm = RMSNorm(weights.take("model.norm.weight", config.hidden_size), config.rms_norm_eps)
        self._head = linears.head(self._head_weight(config, weights))

    def _head_weight(self, config: ModelConfig, weights: Weights) -> torch.Tensor:
        name = "lm_head.weight"
        if config.tie_word_embeddings and name not in weights:
            return self._embedding
        head = weights.take(name, config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings and not torch.equal(head, self._embedding):
            raise ModelError(f"config.json says tie_word_embeddings, but {name} differs from the embeddings")
        return head

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(token_ids, self._embedding)

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: PagedAttention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        angles = self._rope.angles(positions)
        wanted, tapped = frozenset(taps), {}
        for index, layer in enumerate(self._layers):
            if index in wanted:
                tapped[index] = hidden
            hidden = layer(hidden, angles, attention)
        if len(self._layers) in wanted:
            tapped[len(self._layers)] = hidden
        return hidden, tapped

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._norm(hidden))


def build(config: ModelConfig, weights: Weights) -> Decoder:
    model = Decoder(config, weights)
    weights.check_all_taken()
    return model


def _head_norms(weights: Weights, prefix: str, config: ModelConfig, rope: Rope) -> HeadNorms:
    query, key = (weights.take(f"{prefix}{name}.weight", config.head_size) for name in ("q_norm", "k_norm"))
    scales = torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))
    return HeadNorms(scales, config.rms_norm_eps, rope)
