"""The Llama family: RMSNorm, rotary attention with grouped KV heads, SwiGLU. Plain objects, not modules: at small batches
on a CPU the time goes into dispatch, so nothing is called that does not compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F  # noqa: N812  the usual name
from torch import Tensor

from engine.attention import AttentionPlan
from engine.linear import Linear
from engine.model_config import ModelConfig
from engine.rope import RotaryTable
from engine.weights import Shapes, Weights

OnLayer = Callable[[int], None]


def expected_tensors(config: ModelConfig) -> Shapes:
    """Every tensor a checkpoint of this family must have, and its shape."""
    hidden, head, inner = config.hidden_size, config.head_size, config.intermediate_size
    rows = {"q": config.num_heads * head, "k": config.num_kv_heads * head, "v": config.num_kv_heads * head}
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        at = f"model.layers.{index}."
        shapes |= {f"{at}{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        shapes |= {f"{at}self_attn.{name}_proj.weight": (size, hidden) for name, size in rows.items()}
        shapes[f"{at}self_attn.o_proj.weight"] = (hidden, config.num_heads * head)
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        if config.attention_bias:
            shapes |= {f"{at}self_attn.{name}_proj.bias": (size,) for name, size in rows.items()}
            shapes[f"{at}self_attn.o_proj.bias"] = (hidden,)
        if config.mlp_bias:
            shapes |= {f"{at}mlp.{name}_proj.bias": (inner,) for name in ("gate", "up")}
            shapes[f"{at}mlp.down_proj.bias"] = (hidden,)
    return shapes


@dataclass(slots=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    out: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear


class Llama:
    """`forward` runs one step; `logits` turns its rows into scores."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        self.config = config
        self._embedding = weights.take("model.embed_tokens.weight")
        self._layers = [self._layer(weights, f"model.layers.{i}.") for i in range(config.num_layers)]
        self._norm = weights.take("model.norm.weight")
        self._head = Linear(self._embedding if config.tie_word_embeddings else weights.take("lm_head.weight"))
        self._rope = RotaryTable(config, self._embedding.dtype, self._embedding.device)

    @staticmethod
    def _layer(weights: Weights, at: str) -> Layer:
        def fused(*names: str) -> Linear:
            bias = weights.fuse([f"{at}{n}.bias" for n in names]) if f"{at}{names[0]}.bias" in weights else None
            return Linear(weights.fuse([f"{at}{n}.weight" for n in names]), bias)

        return Layer(
            input_norm=weights.take(f"{at}input_layernorm.weight"),
            qkv=fused("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            out=fused("self_attn.o_proj"),
            post_norm=weights.take(f"{at}post_attention_layernorm.weight"),
            gate_up=fused("mlp.gate_proj", "mlp.up_proj"),
            down=fused("mlp.down_proj"),
        )

    def forward(
        self,
        token_ids: Tensor,
        positions: Tensor,
        attention: AttentionPlan,
        cache: list[tuple[Tensor, Tensor]],
        taps: dict[int, Tensor],
        on_layer: OnLayer | None,
    ) -> Tensor:
        """token_ids, positions [tokens]; cache: (keys, values) per layer, each [blocks, block_size, kv_heads,
        head_size]. Fills the `taps` whose layers are keys; calls `on_layer` once a layer's KV is written. Returns the
        hidden states before the final norm, [tokens, hidden]."""
        x = F.embedding(token_ids, self._embedding)
        cos, sin = self._rope.rows(positions)
        for index, layer in enumerate(self._layers):
            if index in taps:
                taps[index] = x.clone()
            x = x + layer.out(self._attend(layer, x, cos, sin, attention, cache[index]))
            if on_layer is not None:
                on_layer(index)
            gate, up = layer.gate_up(self._normed(x, layer.post_norm)).chunk(2, -1)
            x = x + layer.down(F.silu(gate) * up)
        if len(self._layers) in taps:
            taps[len(self._layers)] = x
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [rows, vocab] float32"""
        return self._head(self._normed(hidden, self._norm)).float()

    def _attend(
        self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attention: AttentionPlan, cache: tuple[Tensor, Tensor]
    ) -> Tensor:
        config = self.config
        rotated = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(self._normed(x, layer.input_norm)).view(x.shape[0], -1, config.head_size)
        qk = self._rope.rotate(qkv[:, :rotated], cos, sin)
        return attention.run(qk[:, : config.num_heads], qk[:, config.num_heads :], qkv[:, rotated:], *cache)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.rms_norm_eps)


