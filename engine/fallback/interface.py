"""Where Transformers' models call us: their attention layers ask for the implementation of this name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "slipstream"


Attend = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, object, dict[str, Any]], torch.Tensor]
"""Takes the place of one attention layer after the other: the layer; query, [1, heads, rows, size], key and value,
[1, kv_heads, rows, size], after whatever the layer does to them; the mask that the model made, here none; and what else
it says. Returns [1, rows, heads, size of the values]."""

_current: ContextVar[Attend] = ContextVar("attend")


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: object = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    return _current.get()(module, query, key, value, attention_mask, options), None


AttentionInterface.register(NAME, _attention)


@contextmanager
def attending(attend: Attend) -> Iterator[None]:
    """Attention layers that run within call `attend`. Not every model passes keywords of ours down to its layers, so it
    goes past the model."""
    token = _current.set(attend)
    try:
        yield
    finally:
        _current.reset(token)
