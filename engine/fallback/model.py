"""A model of Transformers as engine.models.registry.Model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from core.errors import InternalError, ModelError
from engine.attention import Attention
from engine.fallback.config import TransformersConfig
from engine.fallback.interface import attending
from engine.fallback.load import load, remake_linears
from engine.fallback.opened import Opened
from engine.fallback.trial import error_of, expected_logits, tolerance
from engine.linears import Linears
from engine.weights import Weights


class TransformersModel:
    """`hidden` of run_layers and logits is what the class puts into its output layer: after the last norm."""

    def __init__(self, config: TransformersConfig, model: Any) -> None:
        self._config = config
        self._model = Opened(model, config.num_layers)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self._model.embed(token_ids)

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        step = _Step(attention, self._config)
        with self._model.tapping(frozenset(taps)) as tapped, attending(step):
            hidden = self._model.run(hidden, positions)
        if step.layer != self._config.num_layers:
            raise InternalError(f"{step.layer} of {self._config.num_layers} layers have attended")
        return hidden, tapped

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


class _Step:
    """Attends for the layers of one step, in their order."""

    def __init__(self, attention: Attention, config: TransformersConfig) -> None:
        self.layer = 0
        self._attention = attention
        self._value_size = config.value_size

    def __call__(
        self,
        _module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: object,
        options: dict[str, Any],
    ) -> torch.Tensor:
        heads, rows, size = query.shape[1:]
        if self._value_size < size:
            value = F.pad(value, (0, size - self._value_size))
        mixed = self._attention(
            self.layer,
            query[0].transpose(0, 1).contiguous(),
            torch.stack((key[0].transpose(0, 1), value[0].transpose(0, 1)), 1),
            options.get("sliding_window"),
            options.get("scaling"),
            options.get("softcap"),
        )
        self.layer += 1
        return mixed.view(1, rows, heads, size)[..., : self._value_size]


def build(config: TransformersConfig, weights: Weights, linears: Linears) -> TransformersModel:
    """Raises ModelError for weights that don't fit, and for a class that does not compute the same with our attention
    as with its own."""
    model = load(weights.folder, config, weights.device, weights.dtype)
    weights.leave("")
    try:
        remake_linears(model, linears)
        expected = expected_logits(model, config)
        built = TransformersModel(config, model)
        off = error_of(built, config, expected)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"architecture {config.architecture} is not supported: its class fails: {reason}") from error
    if not off <= tolerance(weights.dtype):
        raise ModelError(
            f"architecture {config.architecture} is not supported: over a paged cache its class in Transformers "
            f"computes logits that are {off:.1%} off"
        )
    return built
