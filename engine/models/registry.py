"""Which architectures can be run, how each differs from Llama, and by which module. Imports nothing heavy: the
configuration is checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from engine.attention import Attention
    from engine.linears import Linears
    from engine.model_config import ModelConfig
    from engine.weights import Weights


WindowRule = Literal["none", "all", "all if used", "some if used", "by layer type", "without rope"]
"""Which layers sliding_window is for. Some: as max_window_layers or layer_types say; used: if use_sliding_window is
set; by layer type: as layer_types says, or else all but every sliding_window_pattern-th; without rope: as layer_types
says, or else those that no_rope_layers names, if used."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a layer's tensors: the router and the experts are under `prefix`, the projections under an expert."""

    prefix: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What an architecture's config.json leaves unsaid. A bias of None is as `attention_bias` or `mlp_bias` says."""

    module: str = "engine.models.decoder"
    qkv_bias: bool | None = False
    out_bias: bool | None = False
    mlp_bias: bool | None = False
    head_norms: bool = False
    """RMSNorm of every query and key head, before RoPE."""
    fused: bool = False
    """The checkpoint has qkv_proj and gate_up_proj as one tensor each."""
    partial_rotary: bool = False
    """Heeds partial_rotary_factor."""
    windows: WindowRule = "none"
    ropes: Literal["one", "by layer type", "some layers"] = "one"
    """Gemma 3 has other angles in layers with a window than in those without; SmolLM3 leaves layers without any."""
    experts: ExpertNames | None = None
    gemma: bool = False
    """Norms scale by 1 + weight and come after each part of a layer too, embeddings are scaled, attention scores by
    query_pre_attn_scalar, logits are capped, and the activation is `hidden_activation`."""
    score_caps: bool = False
    """Heeds attn_logit_softcapping."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of its Transformers class, for fields that config.json lacks, where Llama's are others."""


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 256,
}

FAMILIES: Mapping[str, Family] = {
    "Gemma2ForCausalLM": Family(
        qkv_bias=None,
        out_bias=None,
        windows="by layer type",
        gemma=True,
        score_caps=True,
        defaults=_GEMMA
        | {"sliding_window_pattern": 2, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    ),
    "Gemma3ForCausalLM": Family(
        qkv_bias=None,
        out_bias=None,
        head_norms=True,
        windows="by layer type",
        ropes="by layer type",
        gemma=True,
        defaults=_GEMMA | {"sliding_window_pattern": 6},
    ),
    "LlamaForCausalLM": Family(qkv_bias=None, out_bias=None, mlp_bias=None),
    "MistralForCausalLM": Family(windows="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "MixtralForCausalLM": Family(
        windows="all",
        experts=ExpertNames("block_sparse_moe.", "w1", "w3", "w2"),
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": True,
        },
    ),
    "Phi3ForCausalLM": Family(
        fused=True,
        partial_rotary=True,
        windows="all",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="some if used", defaults=_QWEN),
    "Qwen3ForCausalLM": Family(
        qkv_bias=None, out_bias=None, head_norms=True, windows="some if used", defaults=_QWEN | {"head_dim": 128}
    ),
    "Qwen3MoeForCausalLM": Family(
        qkv_bias=None,
        out_bias=None,
        head_norms=True,
        windows="all if used",
        experts=ExpertNames("mlp.", "gate_proj", "up_proj", "down_proj"),
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_local_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
        },
    ),
    "SmolLM3ForCausalLM": Family(
        qkv_bias=None,
        out_bias=None,
        mlp_bias=None,
        windows="without rope",
        ropes="some layers",
        defaults={"num_key_value_heads": 4, "rope_theta": 2e6, "tie_word_embeddings": True},
    ),
}
"""By architecture, as config.json names it."""

SUPPORTED = tuple(sorted(FAMILIES))


class Model(Protocol):
    """A decoder: token ids in, logits out, in three parts so that a pipeline stage can run the part that it owns."""

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        ...

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """[tokens, hidden] -> the same after the last layer, before the norm; and the hidden states tapped, by layer:
        what goes into it, or with the number of layers what comes out of the last. `positions`: [tokens] int64."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab], in the model's dtype."""
        ...


def build(config: ModelConfig, weights: Weights, linears: Linears) -> Model:
    """The model of `config.architecture`. Raises ModelError for weights that don't fit."""
    module = FAMILIES[config.architecture].module if config.architecture in FAMILIES else "engine.fallback.model"
    model: Model = import_module(module).build(config, weights, linears)
    return model
