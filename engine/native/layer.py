"""A whole decoder layer as one operator: at batch 1 the calls between its parts would cost as much as its attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.native.attention import NativeAttention
from engine.native.linear import GatedLinear, NativeLinear
from engine.native.pages import enlarge
from engine.native.rope import NativeRotate
from engine.rope import Angles

Scoring = tuple[int | None, float | None, float | None]
"""Window, scale and soft-cap, as engine.attention.Attention takes them."""


class NativeLayer:
    """Called as a DecoderLayer is. `qkv` and `gated` have the norms before them; `rope` is which of the model's angles
    `rotate` turns by."""

    __slots__ = ("_fixed", "_index", "_rope", "_run", "_scoring")

    def __init__(
        self,
        index: int,
        qkv: NativeLinear,
        rotate: NativeRotate,
        out: NativeLinear,
        gated: GatedLinear,
        down: NativeLinear,
        *,
        heads: int,
        rope: int,
        scoring: Scoring,
    ) -> None:
        parts = (qkv, out, gated, down)
        self._index = index
        self._rope = rope
        self._scoring = scoring
        self._fixed = (
            [part.packed for part in parts],
            [part.bias for part in parts],
            [qkv.norm, gated.norm],
            rotate.scales,
            qkv.eps,
            heads,
            gated.outputs,
            gated.activation,
        )
        enlarge(part.packed for part in parts)
        self._run = torch.ops.slipstream.decoder_layer.default

    def __call__(self, hidden: torch.Tensor, angles: Sequence[Angles], attention: NativeAttention) -> torch.Tensor:
        window, scale, softcap = self._scoring
        after: torch.Tensor = self._run(
            hidden, *self._fixed, *angles[self._rope], *attention.arguments(self._index, window, scale, softcap)
        )
        attention.written(self._index)
        return after


def fuse(
    index: int,
    qkv: object,
    rotate: object,
    out: object,
    gated: object,
    down: object,
    heads: int,
    rope: int,
    scoring: Scoring,
) -> NativeLayer | None:
    """The layer of these parts, if all are native, with norms of one epsilon."""
    if (
        isinstance(qkv, NativeLinear)
        and isinstance(rotate, NativeRotate)
        and isinstance(out, NativeLinear)
        and isinstance(gated, GatedLinear)
        and isinstance(down, NativeLinear)
        and qkv.norm is not None
        and gated.norm is not None
        and qkv.eps == gated.eps
        and (rotate.scales is None or rotate.eps == qkv.eps)
    ):
        return NativeLayer(index, qkv, rotate, out, gated, down, heads=heads, rope=rope, scoring=scoring)
    return None
