"""What the engine needs to know of a model, read from its Hugging Face config.json.

Only json is read: nothing here imports Transformers, whose import costs a worker seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ModelError

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
"""What engine.models has layers for."""
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    """rope_type, rope_theta and what the type needs, as in Transformers' `rope_parameters`."""
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    dtype: str
    """The checkpoint's own."""

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Raises ModelError, naming the field, for what is missing, malformed or unsupported."""
        raw = _read(folder / "config.json")
        generation = _read(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        return cls.from_dict(raw, eos=generation.get("eos_token_id", raw.get("eos_token_id")))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], eos: int | list[int] | None = None) -> ModelConfig:
        architecture = check_architecture(raw)
        heads = _positive(raw, "num_attention_heads")
        kv_heads = _positive(raw, "num_key_value_heads", heads)
        hidden = _positive(raw, "hidden_size")
        if heads % kv_heads:
            raise ModelError(f"config.json: num_key_value_heads {kv_heads} does not divide num_attention_heads {heads}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ModelError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported, only silu")
        if raw.get("sliding_window") is not None:
            raise ModelError(f"config.json: sliding_window {raw['sliding_window']!r} is not supported, only null")
        max_positions = _positive(raw, "max_position_embeddings")
        return cls(
            architecture=architecture,
            num_layers=_positive(raw, "num_hidden_layers"),
            hidden_size=hidden,
            intermediate_size=_positive(raw, "intermediate_size"),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_size=_positive(raw, "head_dim", hidden // heads),
            vocab_size=_positive(raw, "vocab_size"),
            max_position_embeddings=max_positions,
            rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
            rope=_rope(raw, max_positions),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bool(raw.get("attention_bias", False)),
            mlp_bias=bool(raw.get("mlp_bias", False)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            dtype=_dtype(raw),
        )

    def kv_token_bytes(self, dtype: str) -> int:
        """Bytes of KV cache per token when served in `dtype`, a name engine.device.serving_dtype has resolved."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * DTYPE_BYTES[dtype]


def check_architecture(raw: Mapping[str, Any]) -> str:
    """The architecture, if there are layers for it. Raises ModelError naming it otherwise."""
    names = raw.get("architectures")
    if not isinstance(names, list) or not names:
        raise ModelError("config.json names no architectures; it must be a causal language model's configuration")
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"architecture {names[0]} is not supported; supported are {', '.join(ARCHITECTURES)}")
    return str(names[0])


def _read(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} must be a JSON object")
    return raw


def _positive(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    value = raw.get(name)
    if value is None:
        value = default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"config.json: {name} must be a positive integer, not {value!r}")
    return value


def _rope(raw: Mapping[str, Any], max_positions: int) -> dict[str, Any]:
    """Transformers 5 writes rope_parameters; older files have rope_theta and rope_scaling."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    rope = {
        "rope_type": given.get("rope_type", given.get("type", "default")),
        "rope_theta": float(given.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        "max_position_embeddings": max_positions,
        **{k: v for k, v in given.items() if k not in ("type", "rope_type", "rope_theta")},
    }
    if rope["rope_type"] not in ROPE_TYPES:
        raise ModelError(
            f"config.json: rope_type {rope['rope_type']!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError("config.json: partial_rotary_factor other than 1 is not supported")
    return rope


def _dtype(raw: Mapping[str, Any]) -> str:
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "float32")
    if name not in DTYPE_BYTES:
        raise ModelError(f"config.json: dtype {name!r} is not supported; supported are {', '.join(DTYPE_BYTES)}")
    return name
