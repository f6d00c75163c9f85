"""What a model is, read from a Hugging Face folder and checked once. Neither torch nor Transformers is imported, except
for architectures that we have no layers for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from core.errors import ModelError
from engine.checkpoints.folder import read_config
from engine.config_fields import Fields, read_fields
from engine.layer_config import Experts, Ropes, read_experts, read_ropes, read_windows
from engine.models.registry import FAMILIES, SUPPORTED, Family

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

Activation = Literal["silu", "gelu_pytorch_tanh"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What is known of every model. It is a DecoderConfig for one that we have layers for, and else an
    engine.fallback.config.TransformersConfig."""

    architecture: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    """Longest sequence that the model computes as its authors meant."""
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    """Of generation_config.json and config.json together."""

    @staticmethod
    def from_folder(folder: str | Path) -> ModelConfig:
        """Raises ModelError that names the file and the field at fault."""
        folder = Path(folder)
        generation = folder / "generation_config.json"
        return ModelConfig.from_dict(
            read_config(folder / "config.json"),
            read_config(generation) if generation.is_file() else {},
            source=str(folder / "config.json"),
        )

    @staticmethod
    def from_dict(
        config: dict[str, Any], generation_config: dict[str, Any] | None = None, *, source: str = "config.json"
    ) -> ModelConfig:
        """From the contents of config.json and generation_config.json; `source` is named in errors."""
        architecture = _architecture(config, source)
        _check_precision(config, source)
        stops = _eos_token_ids(generation_config or {}, config, source)
        if architecture in FAMILIES:
            return read_decoder(config, architecture, stops, source)
        from engine.fallback.config import read_transformers  # loads torch and Transformers

        return read_transformers(config, architecture, stops, source)

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of KV cache per token; `dtype` as on the command line, "auto" included."""
        if dtype == "auto":
            from engine.device import resolve_device, resolve_dtype  # loads torch

            dtype = resolve_dtype(dtype, resolve_device("auto"))
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * _ITEM_BYTES[dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig(ModelConfig):
    """Of a model of one of our families: all that engine.models.decoder asks."""

    intermediate_size: int
    rms_norm_eps: float
    ropes: Ropes
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    fused: bool
    windows: tuple[int | None, ...]
    """By layer: a row sees no more than this many positions, its own the last. None is all."""
    activation: Activation
    experts: Experts | None
    gemma: bool
    """As Gemma builds it: see Family."""
    attention_scale: float | None
    """Factor on attention scores; None is 1 / sqrt(head_size)."""
    attention_softcap: float | None
    """Attention scores become softcap * tanh(score / softcap)."""
    logit_softcap: float | None


def read_decoder(config: dict[str, Any], architecture: str, stops: tuple[int, ...], source: str) -> DecoderConfig:
    """`architecture` is one of FAMILIES. Raises ModelError that names the field at fault."""
    family = FAMILIES[architecture]
    fields = read_fields({**family.defaults, **config}, architecture, source)
    heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads or fields.num_attention_heads
    head_size = fields.head_dim or fields.hidden_size // heads
    if heads % kv_heads:
        raise ModelError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_size < 2 or head_size % 2:
        raise ModelError(f"{source}: head_dim {head_size} is odd, and rotary embeddings need an even one")
    if fields.use_bidirectional_attention:
        raise ModelError(f"{source}: use_bidirectional_attention is set, and only causal models generate text")
    ropes = read_ropes(fields, family, head_size, source)
    return DecoderConfig(
        architecture=architecture,
        vocab_size=fields.vocab_size,
        hidden_size=fields.hidden_size,
        intermediate_size=fields.intermediate_size,
        num_layers=fields.num_hidden_layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_size=head_size,
        max_position_embeddings=min(rope.longest(fields.max_position_embeddings) for rope in ropes.kinds),
        rms_norm_eps=fields.rms_norm_eps,
        ropes=ropes,
        tie_word_embeddings=fields.tie_word_embeddings,
        qkv_bias=fields.attention_bias if family.qkv_bias is None else family.qkv_bias,
        out_bias=fields.attention_bias if family.out_bias is None else family.out_bias,
        mlp_bias=fields.mlp_bias if family.mlp_bias is None else family.mlp_bias,
        head_norms=family.head_norms,
        fused=family.fused,
        windows=read_windows(fields, family, source),
        activation=_activation(fields, family, source),
        experts=read_experts(fields, family, source),
        gemma=family.gemma,
        attention_scale=fields.query_pre_attn_scalar**-0.5 if family.gemma else None,
        attention_softcap=fields.attn_logit_softcapping if family.score_caps else None,
        logit_softcap=fields.final_logit_softcapping if family.gemma else None,
        eos_token_ids=stops,
    )


def _architecture(config: dict[str, Any], source: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise ModelError(f"{source}: architectures is missing; it must name one, such as {', '.join(SUPPORTED)}")
    return names[0]


def _check_precision(config: dict[str, Any], source: str) -> None:
    quantization = config.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method", "unknown") if isinstance(quantization, dict) else "unknown"
        raise ModelError(
            f"{source}: quantization_config says {method}; quantized weights are not supported, "
            "use the model's bfloat16, float16 or float32 weights"
        )


def _activation(fields: Fields, family: Family, source: str) -> Activation:
    if not family.gemma and fields.hidden_act == "silu":
        return "silu"
    if family.gemma and fields.hidden_activation in (None, "gelu_pytorch_tanh"):
        return "gelu_pytorch_tanh"
    name, got = ("hidden_activation", fields.hidden_activation) if family.gemma else ("hidden_act", fields.hidden_act)
    raise ModelError(f"{source}: {name} {got} is not supported for this architecture")


def _eos_token_ids(generation_config: dict[str, Any], config: dict[str, Any], source: str) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for value in (generation_config.get("eos_token_id"), config.get("eos_token_id")):
        found = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(token, int) for token in found):
            raise ModelError(f"{source}: eos_token_id {value} must be a token id, or a list of them")
        ids |= dict.fromkeys(found)
    return tuple(ids)
