"""What a model is, read from a Hugging Face folder and checked once. Neither torch nor Transformers is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from core.errors import ModelError
from engine.checkpoints.folder import read_config
from engine.models.registry import FAMILIES, SUPPORTED, Family
from engine.rope_config import RopeConfig, read_rope

_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

_Count = Annotated[int, Meta(ge=1)]


class _Fields(msgspec.Struct, frozen=True, kw_only=True):
    """config.json as its authors write it; what may be left out has the default of Transformers' LlamaConfig, unless
    the family has one of its own."""

    architectures: list[str]
    vocab_size: _Count
    hidden_size: _Count
    intermediate_size: _Count
    num_hidden_layers: _Count
    num_attention_heads: _Count
    num_key_value_heads: _Count | None = None
    head_dim: _Count | None = None
    max_position_embeddings: _Count
    original_max_position_embeddings: _Count | None = None
    sliding_window: _Count | None = None
    use_sliding_window: bool = False
    max_window_layers: Annotated[int, Meta(ge=0)] = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    rms_norm_eps: Annotated[float, Meta(gt=0)] = 1e-6
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    eos_token_id: int | list[int] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    quantization_config: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position_embeddings: int
    """Longest sequence that the model computes as its authors meant."""
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool
    out_bias: bool
    mlp_bias: bool
    head_norms: bool
    fused: bool
    windows: tuple[int | None, ...]
    """By layer: a row sees no more than this many positions, its own the last. None is all."""
    eos_token_ids: tuple[int, ...]
    """Of generation_config.json and config.json together."""

    @classmethod
    def from_folder(cls, folder: str | Path) -> ModelConfig:
        """Raises ModelError that names the file and the field at fault."""
        folder = Path(folder)
        generation = folder / "generation_config.json"
        return cls.from_dict(
            read_config(folder / "config.json"),
            read_config(generation) if generation.is_file() else {},
            source=str(folder / "config.json"),
        )

    @classmethod
    def from_dict(
        cls, config: dict[str, Any], generation_config: dict[str, Any] | None = None, *, source: str = "config.json"
    ) -> ModelConfig:
        """From the contents of config.json and generation_config.json; `source` is named in errors."""
        architecture = _architecture(config, source)
        family = FAMILIES[architecture]
        try:
            fields = msgspec.convert({**family.defaults, **config}, _Fields)
        except msgspec.ValidationError as error:
            raise ModelError(f"{source}: {error}; this field must be right for {architecture} to run") from error
        heads, kv_heads = fields.num_attention_heads, fields.num_key_value_heads or fields.num_attention_heads
        head_size = fields.head_dim or fields.hidden_size // heads
        if heads % kv_heads:
            raise ModelError(f"{source}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if head_size < 2 or head_size % 2:
            raise ModelError(f"{source}: head_dim {head_size} is odd, and rotary embeddings need an even one")
        if fields.quantization_config is not None:
            method = fields.quantization_config.get("quant_method", "unknown")
            raise ModelError(
                f"{source}: quantization_config says {method}; quantized weights are not supported, "
                "use the model's bfloat16, float16 or float32 weights"
            )
        rope = _rope(fields, family, head_size, source)
        return cls(
            architecture=architecture,
            vocab_size=fields.vocab_size,
            hidden_size=fields.hidden_size,
            intermediate_size=fields.intermediate_size,
            num_layers=fields.num_hidden_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=head_size,
            max_position_embeddings=rope.longest(fields.max_position_embeddings),
            rms_norm_eps=fields.rms_norm_eps,
            rope=rope,
            tie_word_embeddings=fields.tie_word_embeddings,
            qkv_bias=fields.attention_bias if family.qkv_bias is None else family.qkv_bias,
            out_bias=fields.attention_bias if family.out_bias is None else family.out_bias,
            mlp_bias=fields.mlp_bias if family.mlp_bias is None else family.mlp_bias,
            head_norms=family.head_norms,
            fused=family.fused,
            windows=_windows(fields, family, source),
            eos_token_ids=_eos_token_ids(generation_config or {}, fields),
        )

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of KV cache per token; `dtype` as on the command line, "auto" included."""
        if dtype == "auto":
            from engine.device import resolve_device, resolve_dtype  # loads torch

            dtype = resolve_dtype(dtype, resolve_device("auto"))
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * _ITEM_BYTES[dtype]


def check_config(config: dict[str, Any]) -> None:
    """Raise ModelError for a config.json that can't be run."""
    ModelConfig.from_dict(config)


def _architecture(config: dict[str, Any], source: str) -> str:
    names = config.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError(f"{source}: architectures is missing; it must name one of {', '.join(SUPPORTED)}")
    if names[0] not in SUPPORTED:
        raise ModelError(f"{source}: architecture {names[0]} is not supported; supported are {', '.join(SUPPORTED)}")
    return str(names[0])


def _rope(fields: _Fields, family: Family, head_size: int, source: str) -> RopeConfig:
    """Transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling."""
    return read_rope(
        fields.rope_parameters or fields.rope_scaling or {},
        theta=fields.rope_theta or 10000.0,
        head_size=head_size,
        max_position_embeddings=fields.max_position_embeddings,
        original_max_position_embeddings=fields.original_max_position_embeddings,
        partial_rotary_factor=fields.partial_rotary_factor,
        may_be_partial=family.partial_rotary,
        source=source,
    )


def _windows(fields: _Fields, family: Family, source: str) -> tuple[int | None, ...]:
    layers = fields.num_hidden_layers
    if family.windows == "none" or (family.windows == "some" and not fields.use_sliding_window):
        return (None,) * layers
    if family.windows == "all":
        return (fields.sliding_window,) * layers
    kinds = fields.layer_types or [
        "sliding_attention" if layer >= fields.max_window_layers else "full_attention" for layer in range(layers)
    ]
    if len(kinds) != layers:
        raise ModelError(f"{source}: layer_types names {len(kinds)} layers, num_hidden_layers {layers}")
    return tuple(fields.sliding_window if kind == "sliding_attention" else None for kind in kinds)


def _eos_token_ids(generation_config: dict[str, Any], fields: _Fields) -> tuple[int, ...]:
    ids: dict[int, None] = {}
    for value in (generation_config.get("eos_token_id"), fields.eos_token_id):
        ids |= dict.fromkeys(value if isinstance(value, list) else [] if value is None else [value])
    return tuple(ids)
