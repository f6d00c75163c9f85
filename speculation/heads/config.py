"""What a head is, as its config.json says: for EAGLE-3 in the form that speculators and vLLM read, or that its authors
publish; for Medusa and Hydra in one of ours. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from core.errors import ModelError
from engine.checkpoints.folder import read_config
from engine.config_fields import Count, Index, Positive
from engine.model_config import DecoderConfig, ModelConfig

Kind = Literal["eagle3", "hydra", "medusa"]
CONFIG = "config.json"
_LLAMA = "LlamaForCausalLM"
_PUBLISHED = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM")
"""Architectures by which EAGLE-3's authors and SGLang's name the same layout."""
_SPECULATORS = ("Eagle3Speculator", "Eagle3DraftModel")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    kind: Kind
    hidden_size: int
    """Of the target, and of the head."""
    vocab_size: int
    """Of the target."""
    draft_vocab_size: int
    """Tokens that the head can propose."""
    taps: tuple[int, ...]
    """Layers of the target whose hidden states it reads, numbered as in StepBatch.taps."""
    depth: int
    """Tokens that it was trained to propose one after the other; Medusa and Hydra have a head for each."""
    rms_norm_eps: float
    fingerprint: str = ""
    """Of the target that it was trained on; empty: not said."""
    layer: DecoderConfig | None = None
    """EAGLE-3's own."""
    norm_before_residual: bool = False
    """Whether EAGLE-3's layer adds to the normed feature rather than to the feature."""


class _Own(Struct, frozen=True, kw_only=True):
    """The section `slipstream` of a config.json: all that there is of Medusa and Hydra, and what others leave unsaid of
    EAGLE-3."""

    kind: Kind
    hidden_size: Count
    vocab_size: Count
    draft_vocab_size: Count
    taps: Annotated[tuple[Index, ...], Meta(min_length=1)]
    depth: Count
    rms_norm_eps: Positive
    fingerprint: str
    norm_before_residual: bool = False


def read_head_config(folder: Path, num_layers: int) -> HeadConfig:
    """Of the head in `folder`, for a target of so many layers. Raises ModelError, naming the field at fault."""
    source = folder / CONFIG
    found = read_config(source)
    if "slipstream" in found:
        own = _convert(found["slipstream"], f"{source}: slipstream")
        layer = read_layer(found.get("transformer_layer_config", {}), source) if own.kind == "eagle3" else None
        config = HeadConfig(**msgspec.structs.asdict(own), layer=layer)
    else:
        config = _published(found, source, num_layers)
    _check(config, num_layers, source)
    return config


def as_json(config: HeadConfig, layer: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The contents of a config.json that read_head_config reads; `layer` is EAGLE-3's, in Llama's terms."""
    own = {name: getattr(config, name) for name in _Own.__struct_fields__}
    if config.kind != "eagle3":
        return {"slipstream": own}
    return {
        "architectures": [_SPECULATORS[0]],
        "speculators_model_type": "eagle3",
        "speculators_config": {
            "algorithm": "eagle3",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": config.depth}],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": None, "architectures": []},
        },
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(config.taps),
        "norm_before_residual": config.norm_before_residual,
        "transformer_layer_config": dict(layer or {}),
        "slipstream": own,
    }


def default_taps(num_layers: int) -> tuple[int, ...]:
    """A low, a middle and a high layer, as EAGLE-3 reads them; of few layers, not the same one twice."""
    return tuple(sorted({min(2, num_layers), num_layers // 2, max(num_layers - 3, 0)}))


def _convert(section: object, source: str) -> _Own:
    try:
        return msgspec.convert(section, _Own)
    except msgspec.ValidationError as error:
        raise ModelError(f"{source}: {error}; make the head again, or mend it") from error


def read_layer(fields: object, source: Path | str) -> DecoderConfig:
    """EAGLE-3's own layer. Raises ModelError that names the field at fault."""
    if not isinstance(fields, dict):
        raise ModelError(f"{source}: transformer_layer_config is no object; it must describe the layer as Llama's")
    layer = ModelConfig.from_dict({**fields, "architectures": [_LLAMA]}, source=str(source))
    assert isinstance(layer, DecoderConfig)
    return layer


def _published(found: Mapping[str, Any], source: Path, num_layers: int) -> HeadConfig:
    """EAGLE-3's own layout, or that of speculators."""
    names = found.get("architectures")
    if not isinstance(names, list) or not names or names[0] not in (*_PUBLISHED, *_SPECULATORS):
        raise ModelError(
            f"{source}: architectures must name a head, one of {', '.join((*_PUBLISHED, *_SPECULATORS))}, or there "
            "must be a section slipstream; make heads by `slipstream drafts train`"
        )
    layer = read_layer(found.get("transformer_layer_config", found), source)
    taps = found.get("eagle_aux_hidden_state_layer_ids")
    if taps is None and isinstance(section := found.get("eagle_config"), dict):
        taps = section.get("eagle_aux_hidden_state_layer_ids")
    if taps is None:
        taps = default_taps(num_layers)
    elif not isinstance(taps, list):
        raise ModelError(f"{source}: eagle_aux_hidden_state_layer_ids is {taps!r}; it must be a list of layers")
    return HeadConfig(
        kind="eagle3",
        hidden_size=layer.hidden_size,
        vocab_size=layer.vocab_size,
        draft_vocab_size=found.get("draft_vocab_size") or layer.vocab_size,
        taps=tuple(taps),
        depth=5,
        rms_norm_eps=layer.rms_norm_eps,
        layer=layer,
        norm_before_residual=bool(found.get("norm_before_residual")),
    )


def _check(config: HeadConfig, num_layers: int, source: Path) -> None:
    if not all(isinstance(tap, int) and 0 <= tap <= num_layers for tap in config.taps):
        raise ModelError(f"{source}: taps {list(config.taps)} must be layers of the model, which has {num_layers}")
    if not isinstance(config.draft_vocab_size, int) or not 0 < config.draft_vocab_size <= config.vocab_size:
        raise ModelError(
            f"{source}: draft_vocab_size {config.draft_vocab_size} must be from 1 to vocab_size, {config.vocab_size}"
        )
    if config.kind != "eagle3" and len(config.taps) != 1:
        raise ModelError(f"{source}: taps {list(config.taps)}: a {config.kind} head reads one layer")
    if config.layer is not None and config.layer.hidden_size != config.hidden_size:
        raise ModelError(
            f"{source}: transformer_layer_config has hidden_size {config.layer.hidden_size}, but the head "
            f"{config.hidden_size}; they must be the same"
        )
