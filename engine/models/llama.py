"""Llama, and Mistral, which differs by its configuration only. Equal to Transformers' LlamaForCausalLM in float32."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F  # noqa: N812

from core.errors import ModelError
from engine.attention import PagedAttention
from engine.layers import RMSNorm, SwiGLU
from engine.linear import Linear, make_linear
from engine.model_config import ModelConfig
from engine.rope import Angles, Rope
from engine.weights import Weights


class LlamaLayer:
    __slots__ = ("_attention_norm", "_heads", "_index", "_mlp", "_mlp_norm", "_out", "_qkv", "_rope", "_split")

    def __init__(self, index: int, config: ModelConfig, rope: Rope, weights: Weights) -> None:
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        inner = config.intermediate_size
        self._index = index
        self._rope = rope
        self._heads = (config.num_heads, config.num_kv_heads, config.head_size)
        self._split = (queries, queries + keys)
        self._attention_norm = RMSNorm(weights.take(prefix + "input_layernorm.weight", hidden), config.rms_norm_eps)
        self._mlp_norm = RMSNorm(weights.take(prefix + "post_attention_layernorm.weight", hidden), config.rms_norm_eps)
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        self._qkv = _linear(weights, attention, sizes, hidden, config.attention_bias)
        self._out = _linear(weights, attention, {"o_proj": hidden}, queries, config.attention_bias)
        self._mlp = SwiGLU(
            _linear(weights, mlp, {"gate_proj": inner, "up_proj": inner}, hidden, config.mlp_bias),
            _linear(weights, mlp, {"down_proj": hidden}, inner, config.mlp_bias),
            inner,
        )

    def __call__(self, hidden: torch.Tensor, angles: Angles, attention: PagedAttention) -> torch.Tensor:
        heads, kv_heads, head_size = self._heads
        queries, rotated = self._split
        qkv = self._qkv(self._attention_norm(hidden))  # [tokens, (heads + 2 kv_heads) * head_size]
        self._rope.rotate_(qkv[:, :rotated].view(-1, heads + kv_heads, head_size), angles)
        mixed = attention(
            self._index,
            qkv[:, :queries].view(-1, heads, head_size),
            qkv[:, queries:].view(-1, 2, kv_heads, head_size),
        )
        hidden = self._out.add(mixed, hidden)
        return self._mlp.add(self._mlp_norm(hidden), hidden)


class Llama:
    """Implements engine.models.registry.Model."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape = (config.vocab_size, config.hidden_size)
        self._embedding = weights.take("model.embed_tokens.weight", *shape)
        self._rope = Rope(config, weights.device, weights.dtype)
        self._layers = [LlamaLayer(index, config, self._rope, weights) for index in range(config.num_layers)]
        self._norm = RMSNorm(weights.take("model.norm.weight", config.hidden_size), config.rms_norm_eps)
        self._head = make_linear(self._head_weight(config, weights))

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


def build(config: ModelConfig, weights: Weights) -> Llama:
    model = Llama(config, weights)
    weights.check_all_taken()
    return model


def _linear(weights: Weights, prefix: str, sizes: dict[str, int], inputs: int, bias: bool) -> Linear:
    """Projections of the same input as one layer."""
    weight = weights.take_stacked([f"{prefix}{name}.weight" for name in sizes], *[(n, inputs) for n in sizes.values()])
    stacked = [f"{prefix}{name}.bias" for name in sizes]
    return make_linear(weight, weights.take_stacked(stacked, *[(n,) for n in sizes.values()]) if bias else None)
