"""Which architectures can be run, how each differs from Llama, and by which module. Imports nothing heavy: the
configuration is checked before torch is loaded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from engine.attention import PagedAttention
    from engine.model_config import ModelConfig
    from engine.weights import Weights


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
    windows: Literal["none", "all", "some"] = "none"
    """Which layers sliding_window is for; some: as use_sliding_window, max_window_layers and layer_types say."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Of its Transformers class, for fields that config.json lacks, where Llama's are others."""


_QWEN = {"num_key_value_heads": 32, "sliding_window": 4096}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(qkv_bias=None, out_bias=None, mlp_bias=None),
    "MistralForCausalLM": Family(windows="all", defaults={"num_key_value_heads": 8, "sliding_window": 4096}),
    "Phi3ForCausalLM": Family(
        fused=True,
        partial_rotary=True,
        windows="all",
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
    ),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windows="some", defaults=_QWEN),
    "Qwen3ForCausalLM": Family(
        qkv_bias=None, out_bias=None, head_norms=True, windows="some", defaults=_QWEN | {"head_dim": 128}
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
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: PagedAttention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """[tokens, hidden] -> the same after the last layer, before the norm; and the hidden states tapped, by layer:
        what goes into it, or with the number of layers what comes out of the last. `positions`: [tokens] int64."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab], in the model's dtype."""
        ...


def build(config: ModelConfig, weights: Weights) -> Model:
    """The model of `config.architecture`, which is one of SUPPORTED. Raises ModelError for weights that don't fit."""
    model: Model = import_module(FAMILIES[config.architecture].module).build(config, weights)
    return model
