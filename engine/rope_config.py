"""The rotary embedding of a model, read from its config.json and checked once. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ModelError

_ORIGINAL = "original_max_position_embeddings"

ROPE_TYPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
    "longrope": ("factor", _ORIGINAL),
}
"""The kinds of rotary embedding we run, and the numbers each must have. The frequencies of `dynamic` and `longrope`
change for every position once the sequence outgrows a length, so keys cached before would be wrong: sequences end at
that length, up to which the frequencies stay the same (`dynamic`: the default ones, `longrope`: the short ones)."""
_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`parameters` are those of Transformers' `rope_parameters`: rope_theta, and what the type asks for."""

    rope_type: str
    parameters: Mapping[str, Any]
    size: int
    """How many dimensions of a head are rotated: the first ones."""

    def longest(self, max_position_embeddings: int) -> int:
        """Tokens of a sequence up to which the frequencies are as meant, and stay the same."""
        if self.rope_type == "longrope":
            return min(max_position_embeddings, int(self.parameters[_ORIGINAL]))
        if self.rope_type == "yarn":  # configurations that leave max_position_embeddings as it was before scaling
            return max(max_position_embeddings, int(self.parameters["factor"] * self.parameters[_ORIGINAL]))
        return max_position_embeddings


def read_rope(
    parameters: Mapping[str, Any],
    *,
    theta: float,
    head_size: int,
    max_position_embeddings: int,
    original_max_position_embeddings: int | None,
    partial_rotary_factor: float | None,
    may_be_partial: bool,
    source: str,
) -> RopeConfig:
    """`parameters`: rope_parameters, as Transformers 5 writes them, or the older rope_scaling. The others are fields of
    config.json; `may_be_partial`: the architecture heeds partial_rotary_factor. Raises ModelError."""
    found = dict(parameters)
    if partial_rotary_factor is not None:
        found.setdefault("partial_rotary_factor", partial_rotary_factor)
    rope_type = found.pop("rope_type", None) or found.pop("type", None) or "default"
    found.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise ModelError(f"{source}: rope_type {rope_type} is not supported; supported are {', '.join(ROPE_TYPES)}")
    found.setdefault("rope_theta", theta)
    if _ORIGINAL in ROPE_TYPES[rope_type]:
        found.setdefault(_ORIGINAL, max_position_embeddings)
        found[_ORIGINAL] = original_max_position_embeddings or found[_ORIGINAL]
    if rope_type == "longrope" and found.get("factor") is None and _is_positive(found[_ORIGINAL]):
        found["factor"] = max_position_embeddings / found[_ORIGINAL]
    for name in ("rope_theta", *ROPE_TYPES[rope_type]):
        if not _is_positive(found.get(name)):
            raise ModelError(f"{source}: {name} of rope_type {rope_type} must be a number above 0")
    for name in _OPTIONAL:
        if found.get(name) is not None and not _is_positive(found[name]):
            raise ModelError(f"{source}: {name} of rope_type {rope_type} must be a number above 0, or left out")
    size = _rotated(found.get("partial_rotary_factor", 1.0), head_size, may_be_partial, source)
    if rope_type == "longrope":
        _check_longrope(found, size, source)
    return RopeConfig(rope_type, found, size)


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _rotated(factor: Any, head_size: int, may_be_partial: bool, source: str) -> int:
    if factor != 1.0 and not may_be_partial:
        raise ModelError(f"{source}: partial_rotary_factor other than 1 is not supported for this architecture")
    if not _is_positive(factor) or factor > 1 or int(head_size * factor) < 2 or int(head_size * factor) % 2:
        raise ModelError(
            f"{source}: partial_rotary_factor {factor} must be above 0, at most 1, and rotate an even number of the "
            f"{head_size} dimensions of a head"
        )
    return int(head_size * factor)


def _check_longrope(parameters: dict[str, Any], size: int, source: str) -> None:
    for name in ("short_factor", "long_factor"):
        factors = parameters.get(name)
        if not isinstance(factors, list) or len(factors) != size // 2 or not all(map(_is_positive, factors)):
            raise ModelError(f"{source}: {name} of rope_type longrope must be {size // 2} numbers above 0")
    if parameters[_ORIGINAL] < 2:
        raise ModelError(f"{source}: {_ORIGINAL} of rope_type longrope must be 2 or more")
