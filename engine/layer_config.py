"""In what the layers of one model differ from each other: windows, rotary embeddings, experts. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ModelError
from engine.config_fields import Fields
from engine.models.registry import Family
from engine.rope_config import RopeConfig, read_rope

_WINDOWED, _FULL = "sliding_attention", "full_attention"
_LOCAL_THETA, _GLOBAL_THETA = 1e4, 1e6
"""Of Gemma 3, where config.json names none."""


@dataclass(frozen=True, slots=True)
class Experts:
    count: int
    per_token: int
    inner_size: int
    normalized: bool
    """Whether the weights of the chosen experts add up to 1."""
    layers: tuple[bool, ...]
    """By layer: whether it has experts, or one MLP for all tokens."""


@dataclass(frozen=True, slots=True)
class Ropes:
    kinds: tuple[RopeConfig, ...]
    of_layers: tuple[int | None, ...]
    """By layer: which of the kinds; None is none at all."""


def read_windows(fields: Fields, family: Family, source: str) -> tuple[int | None, ...]:
    """By layer: how many positions a row sees, its own the last. None is all."""
    if family.windows == "none" or (family.windows.endswith("if used") and not fields.use_sliding_window):
        return (None,) * fields.num_hidden_layers
    if family.windows.startswith("all"):
        return (fields.sliding_window,) * fields.num_hidden_layers
    return tuple(fields.sliding_window if kind == _WINDOWED else None for kind in _layer_types(fields, family, source))


def _layer_types(fields: Fields, family: Family, source: str) -> list[str]:
    layers = range(fields.num_hidden_layers)
    if fields.layer_types:
        if len(fields.layer_types) != len(layers):
            raise ModelError(
                f"{source}: layer_types names {len(fields.layer_types)} layers, num_hidden_layers {len(layers)}"
            )
        return list(fields.layer_types)
    if family.windows == "by layer type":
        windowed = [(layer + 1) % fields.sliding_window_pattern != 0 for layer in layers]
    elif family.windows == "without rope":
        windowed = [fields.use_sliding_window and not roped for roped in _roped(fields, source)]
    else:
        windowed = [layer >= fields.max_window_layers for layer in layers]
    return [_WINDOWED if has_window else _FULL for has_window in windowed]


def _roped(fields: Fields, source: str) -> list[bool]:
    layers = fields.num_hidden_layers
    if fields.no_rope_layers is None:
        return [(layer + 1) % fields.no_rope_layer_interval != 0 for layer in range(layers)]
    if len(fields.no_rope_layers) < layers:
        raise ModelError(
            f"{source}: no_rope_layers names {len(fields.no_rope_layers)} layers, num_hidden_layers {layers}"
        )
    return [bool(roped) for roped in fields.no_rope_layers[:layers]]


def read_ropes(fields: Fields, family: Family, head_size: int, source: str) -> Ropes:
    """Transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling."""
    layers = fields.num_hidden_layers
    if family.ropes == "by layer type":
        types = _layer_types(fields, family, source)
        kinds = tuple(_rope(p, t, fields, family, head_size, source) for p, t in _by_layer_type(fields, source))
        return Ropes(kinds, tuple(0 if kind == _FULL else 1 for kind in types))
    parameters = fields.rope_parameters or fields.rope_scaling or {}
    rope = _rope(parameters, fields.rope_theta or 1e4, fields, family, head_size, source)
    if family.ropes == "some layers":
        return Ropes((rope,), tuple(0 if roped else None for roped in _roped(fields, source)))
    return Ropes((rope,), (0,) * layers)


def _by_layer_type(fields: Fields, source: str) -> list[tuple[Mapping[str, Any], float]]:
    """Parameters and default base of layers without a window and with one. Before Transformers 5, rope_scaling was for
    the former only."""
    theta, local = fields.rope_theta or _GLOBAL_THETA, fields.rope_local_base_freq or _LOCAL_THETA
    written = fields.rope_parameters
    if written is None:
        return [(fields.rope_scaling or {}, theta), ({}, local)]
    if strange := set(written) - {_FULL, _WINDOWED}:
        raise ModelError(f"{source}: rope_parameters has {min(strange)}; it must have {_FULL} and {_WINDOWED} only")
    found: list[tuple[Mapping[str, Any], float]] = []
    for name, base in ((_FULL, theta), (_WINDOWED, local)):
        parameters = written.get(name) or {}
        if not isinstance(parameters, dict):
            raise ModelError(f"{source}: {name} of rope_parameters must be an object")
        found.append((parameters, base))
    return found


def _rope(
    parameters: Mapping[str, Any], theta: float, fields: Fields, family: Family, head_size: int, source: str
) -> RopeConfig:
    return read_rope(
        parameters,
        theta=theta,
        head_size=head_size,
        max_position_embeddings=fields.max_position_embeddings,
        original_max_position_embeddings=fields.original_max_position_embeddings,
        partial_rotary_factor=fields.partial_rotary_factor,
        may_be_partial=family.partial_rotary,
        source=source,
    )


def read_experts(fields: Fields, family: Family, source: str) -> Experts | None:
    count = fields.num_experts if fields.num_experts is not None else fields.num_local_experts or 0
    if family.experts is None or count == 0:
        return None
    if fields.num_experts_per_tok > count:
        raise ModelError(f"{source}: num_experts_per_tok {fields.num_experts_per_tok} is above the {count} experts")
    dense, layers = fields.mlp_only_layers or [], range(1, fields.num_hidden_layers + 1)
    return Experts(
        count=count,
        per_token=fields.num_experts_per_tok,
        inner_size=fields.moe_intermediate_size or fields.intermediate_size,
        normalized=fields.norm_topk_prob,
        layers=tuple(layer - 1 not in dense and layer % fields.decoder_sparse_step == 0 for layer in layers),
    )
