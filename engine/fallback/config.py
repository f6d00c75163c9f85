"""Which of Transformers' architectures can be run, and what their config.json says. Imports torch and Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from core.errors import ModelError
from engine.fallback.probe import Found, probe, ropes
from engine.model_config import ModelConfig
from engine.models.registry import SUPPORTED

_ROPE_TYPES = ("default", *ROPE_INIT_FUNCTIONS)
_CHANGING = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
"""Rotary embeddings whose frequencies change for all positions past this length; see engine.rope_config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersConfig(ModelConfig):
    fields: Mapping[str, Any]
    """config.json as it is."""
    value_size: int
    """Size of a value head, at most that of a key head, which is head_size."""


def read_transformers(
    config: dict[str, Any], architecture: str, stops: tuple[int, ...], source: str
) -> TransformersConfig:
    """Raises ModelError, naming architecture or field, for what can't be run."""
    family = model_class(architecture, config, source)
    read = class_config(family, config, source)
    found = probe(family, read, source)
    return TransformersConfig(
        architecture=architecture,
        vocab_size=read.vocab_size,
        hidden_size=found.hidden_size,
        num_layers=found.num_layers,
        num_heads=found.num_heads,
        num_kv_heads=found.num_kv_heads,
        head_size=found.head_size,
        value_size=found.value_size,
        max_position_embeddings=_longest(read, found, source),
        tie_word_embeddings=bool(getattr(read, "tie_word_embeddings", False)),
        eos_token_ids=stops,
        fields=config,
    )


def model_class(architecture: str, config: Mapping[str, Any], source: str) -> Any:
    """The causal language model of that name whose attention can be replaced."""
    known = {name for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() for name in _names(names)}
    family = _class(architecture, source) if architecture in known else None
    ours = f"supported are {', '.join(SUPPORTED)}, and the causal models of Transformers with replaceable attention"
    if family is None and "auto_map" in config:
        raise ModelError(
            f"{source}: architecture {architecture} is code that comes with the checkpoint (auto_map), "
            f"which is never run; {ours}"
        )
    if family is None:
        raise ModelError(f"{source}: architecture {architecture} is not supported; {ours}")
    if not family._supports_attention_backend:
        raise ModelError(
            f"{source}: architecture {architecture} is not supported: its class in Transformers does not let its "
            f"attention be replaced (_supports_attention_backend); {ours}"
        )
    return family


def _class(architecture: str, source: str) -> Any:
    try:
        return getattr(transformers, architecture, None)
    except (ImportError, RuntimeError) as error:  # of a package that this class wants
        raise ModelError(f"{source}: architecture {architecture} is not supported here: {_one_line(error)}") from error


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def class_config(family: Any, config: Mapping[str, Any], source: str) -> Any:
    """config.json as the class reads it. Raises ModelError with what the class has against it."""
    try:
        read = family.config_class.from_dict(dict(config))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{source}: {family.__name__} does not take this configuration: {_one_line(error)}") from error
    if read.get_text_config() is not read:
        raise ModelError(f"{source}: architecture {family.__name__} is not supported: it is more than a language model")
    for parameters in ropes(read):
        kind = parameters.get("rope_type", "default")
        if kind not in _ROPE_TYPES:
            raise ModelError(f"{source}: rope_type {kind} is not supported; Transformers has {', '.join(_ROPE_TYPES)}")
    for name in ("output_router_logits", "output_attentions", "output_hidden_states"):
        if hasattr(read, name):
            setattr(read, name, False)
    return read


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _longest(config: Any, found: Found, source: str) -> int:
    longest = getattr(config, "max_position_embeddings", None)
    if not isinstance(longest, int) or longest < 1:
        raise ModelError(f"{source}: max_position_embeddings is missing; it must say how long a sequence may be")
    for parameters in found.ropes:
        field = _CHANGING.get(str(parameters.get("rope_type")))
        limit = parameters.get(field, longest) if field is not None else longest
        longest = min(longest, int(limit))
    return longest
