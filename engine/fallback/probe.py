"""Whether a class of Transformers leaves all of its memory of earlier tokens to the attention interface, seen from one
step without weights or numbers: on torch's meta device, where only shapes are computed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from core.errors import ModelError
from engine.fallback.interface import NAME, attending
from engine.fallback.opened import CannotOpen, Opened

_ROWS = 4
_MEANT = frozenset({"scaling", "softcap", "sliding_window"})
"""What attention layers say about their scores and we heed."""
_HARMLESS = frozenset({"dropout", "is_causal", "position_ids", "use_cache", "cache_position", "layer_idx"})
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's."""

    module: torch.nn.Module
    query: tuple[int, ...]  # [1, heads, rows, size]
    key: tuple[int, ...]
    value: tuple[int, ...]
    mask: object
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Found:
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    value_size: int
    ropes: tuple[Mapping[str, Any], ...]


@dataclass(slots=True)
class _Recorder:
    calls: list[Call] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: object,
        options: dict[str, Any],
    ) -> torch.Tensor:
        shapes = (tuple(query.shape), tuple(key.shape), tuple(value.shape))
        self.calls.append(Call(module, *shapes, mask, dict(options)))
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def probe(family: Any, config: Any, source: str) -> Found:
    """`family` is the class, `config` its configuration. Raises ModelError that names the architecture and what is in
    the way."""
    calls, hidden_size = _run(family, config, source)
    refuse = _Refusal(family.__name__, source)
    if len(calls) != config.num_hidden_layers:
        refuse(f"{len(calls)} of its {config.num_hidden_layers} layers attend by the interface")
    for index, call in enumerate(calls):
        _check_call(call, index, config, refuse)
    shapes = {(call.query[1], call.query[3], call.key, call.value) for call in calls}
    if len(shapes) > 1:
        refuse("its layers differ in their heads")
    ((heads, _, key, value),) = shapes
    if value[3] > key[3] or heads % key[1]:
        refuse(f"it has {heads} heads of keys of {key[3]} and values of {value[3]}")
    return Found(hidden_size, len(calls), heads, key[1], key[3], value[3], ropes(config))


class _Refusal:
    def __init__(self, architecture: str, source: str) -> None:
        self._start = f"{source}: architecture {architecture} is not supported"

    def __call__(self, reason: str) -> None:
        raise ModelError(f"{self._start}: {reason}")


def _run(family: Any, config: Any, source: str) -> tuple[list[Call], int]:
    """The attention calls of one step, and the size of its hidden states."""
    recorder, config = _Recorder(), copy.deepcopy(config)
    for parameters in ropes(config):
        if (
            parameters.get("rope_type") == "dynamic"
        ):  # asks for numbers; up to where sequences end it is the default one
            parameters["rope_type"] = "default"
    try:
        with torch.device("meta"), torch.inference_mode(), attending(recorder):
            model = family._from_config(config, attn_implementation=NAME, experts_implementation="batched_mm").eval()
            opened = Opened(model, config.num_hidden_layers)
            hidden = opened.run(opened.embed(torch.zeros(_ROWS, dtype=torch.int64)), torch.arange(_ROWS))
            logits = opened.logits(hidden)
            if logits.shape != (_ROWS, config.vocab_size):
                raise CannotOpen(f"its logits have shape {list(logits.shape)}")
    except Exception as error:  # whatever somebody else's model raises, it can't be run
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        if not isinstance(error, CannotOpen):
            reason = f"a step with our attention ends in {type(error).__name__}: {reason}"
        raise ModelError(f"{source}: architecture {family.__name__} is not supported: {reason}") from error
    return recorder.calls, hidden.shape[-1]


def _check_call(call: Call, index: int, config: Any, refuse: _Refusal) -> None:
    if call.mask is not None:
        refuse("it masks attention by itself")
    if call.options.get("is_causal") is False or getattr(call.module, "is_causal", True) is False:
        refuse("its attention is not causal")
    if call.query[2] != _ROWS or call.key[2] != _ROWS:
        refuse("its layers don't attend with one query and one key for each token")
    for name, value in call.options.items():
        if name not in _MEANT | _HARMLESS and value is not None and value is not False:
            refuse(f"its attention takes {name}")
    window, types = call.options.get("sliding_window"), getattr(config, "layer_types", None)
    if types is None:
        _check_window(window, config, refuse)
        return
    if types[index] not in _LAYER_TYPES:
        refuse(f"layer_types has {types[index]}")
    if (types[index] == "sliding_attention") != (window is not None):
        refuse(f"layer {index} is of type {types[index]} and has sliding_window {window}")


def _check_window(window: int | None, config: Any, refuse: _Refusal) -> None:
    """Some classes have a window in the masks that they make, of which we see nothing, and not in their layers."""
    meant = getattr(config, "sliding_window", None)
    if window is None and meant is not None and getattr(config, "use_sliding_window", True):
        longest = getattr(config, "max_position_embeddings", None)
        if longest is None or meant < longest:
            refuse(f"its layers don't say what sliding_window {meant} is for")


def ropes(config: Any) -> tuple[dict[str, Any], ...]:
    """The parameters of every rotary embedding: one, or one by type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return tuple(nested) if nested else (parameters,)
