"""config.json as its authors write it. Free of torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from core.errors import ModelError

Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]
LayerType = Literal["full_attention", "sliding_attention"]


class Fields(msgspec.Struct, frozen=True, kw_only=True):
    """What may be left out has the default of Transformers' LlamaConfig, unless the family has one of its own."""

    architectures: list[str]
    vocab_size: Count
    hidden_size: Count
    intermediate_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    num_key_value_heads: Count | None = None
    head_dim: Count | None = None
    max_position_embeddings: Count
    original_max_position_embeddings: Count | None = None
    sliding_window: Count | None = None
    use_sliding_window: bool = False
    sliding_window_pattern: Count = 1
    max_window_layers: Index = 28
    layer_types: list[LayerType] | None = None
    no_rope_layers: list[int] | None = None
    no_rope_layer_interval: Count = 4
    rms_norm_eps: Positive = 1e-6
    hidden_act: str = "silu"
    hidden_activation: str | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    query_pre_attn_scalar: Positive = 1.0
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    use_bidirectional_attention: bool | None = None
    num_experts: Index | None = None
    num_local_experts: Index | None = None
    num_experts_per_tok: Count = 1
    moe_intermediate_size: Count | None = None
    norm_topk_prob: bool = False
    decoder_sparse_step: Count = 1
    mlp_only_layers: list[Index] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float | None = None


def read_fields(config: dict[str, Any], architecture: str, source: str) -> Fields:
    """Raises ModelError that names the field at fault."""
    try:
        return msgspec.convert(config, Fields)
    except msgspec.ValidationError as error:
        raise ModelError(f"{source}: {error}; this field must be right for {architecture} to run") from error
