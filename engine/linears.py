"""Builds the linear layers of a model from its weights. What a deployment chooses (precision, the split over devices,
adapters) is settled here, so that models only say which projections they have."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.linear import Linear, make_linear
from engine.weights import Weights


class Linears:
    """One per model. A layer is asked for once: that takes its tensors."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights

    def columns(self, prefix: str, sizes: Mapping[str, int], inputs: int, bias: bool) -> Linear:
        """Projections of the same input as one layer: `sizes` has the outputs of each by its name after `prefix`, and
        the outputs follow each other in that order. Split over devices, each has its share of every projection."""
        return self._make([prefix + name for name in sizes], list(sizes.values()), inputs, bias)

    def row(self, name: str, inputs: int, outputs: int, bias: bool) -> Linear:
        """A projection back to the hidden size. Split over devices, each has a share of the inputs, and the outputs are
        summed."""
        return self._make([name], [outputs], inputs, bias)

    def head(self, weight: torch.Tensor) -> Linear:
        """The output layer, `weight` [vocab, hidden], which may be the embedding."""
        return make_linear(weight)

    def _make(self, names: list[str], outputs: list[int], inputs: int, bias: bool) -> Linear:
        weight = self._weights.take_stacked([f"{n}.weight" for n in names], *[(count, inputs) for count in outputs])
        biases = [f"{n}.bias" for n in names]
        return make_linear(weight, self._weights.take_stacked(biases, *[(c,) for c in outputs]) if bias else None)
