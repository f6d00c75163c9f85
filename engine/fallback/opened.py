"""A causal language model of Transformers taken apart: embedding, layers, output layer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import MoeModelOutputWithPast


class CannotOpen(Exception):
    """The class isn't built as all the others are; says in what."""


class Opened:
    """Raises CannotOpen. The model is used up: its layers are no longer in it."""

    def __init__(self, model: Any, num_layers: int) -> None:
        self.base = model.base_model
        if self.base is model:
            raise CannotOpen("its layers can't be told from its output layer")
        if "position_ids" not in inspect.signature(self.base.forward).parameters:
            raise CannotOpen("it can't be told the positions of its tokens")
        self._layers = _layers(self.base, num_layers)
        self._embedding = model.get_input_embeddings()
        setattr(model, model.base_model_prefix, _Passed())
        self._head = model

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, size of the embeddings]."""
        embedded: torch.Tensor = self._embedding(token_ids)
        return embedded

    def run(self, embedded: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """To what the output layer takes, [tokens, hidden]."""
        output = self.base(inputs_embeds=embedded[None], position_ids=positions[None], use_cache=False)
        hidden: torch.Tensor = output[0][0]
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, hidden] -> [rows, vocab]."""
        logits: torch.Tensor = self._head(inputs_embeds=hidden[None], use_cache=False).logits[0]
        return logits

    @contextmanager
    def tapping(self, wanted: frozenset[int]) -> Iterator[dict[int, torch.Tensor]]:
        """While it runs within, what goes into these layers, or comes out of the last, is put into the dict."""
        tapped: dict[int, torch.Tensor] = {}
        last = len(self._layers)
        hooks = [
            self._layers[index].register_forward_pre_hook(_tap_input(tapped, index), with_kwargs=True)
            for index in wanted - {last}
        ]
        if last in wanted:
            hooks.append(self._layers[-1].register_forward_hook(_tap_output(tapped, last)))
        try:
            yield tapped
        finally:
            for hook in hooks:
                hook.remove()


@dataclass
class _Output(MoeModelOutputWithPast):  # type: ignore[misc]  # Transformers is Any to us
    """With all that the classes ask of what their layers return."""

    cross_attentions: tuple[torch.Tensor, ...] | None = None


class _Passed(nn.Module):
    """In the place of the layers: what was given comes out, so that the class goes on to its output layer."""

    @property
    def decoder(self) -> nn.Module:
        """Some classes call this part of it."""
        return self

    def forward(self, *_inputs: object, inputs_embeds: torch.Tensor, **_options: object) -> _Output:
        return _Output(last_hidden_state=inputs_embeds)


def _layers(base: nn.Module, count: int) -> nn.ModuleList:
    for module in base.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CannotOpen(f"it has no list of {count} layers")


def _tap_input(tapped: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
    def hook(_layer: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        tapped[index] = (args[0] if args else options["hidden_states"])[0]

    return hook


def _tap_output(tapped: dict[int, torch.Tensor], index: int) -> Callable[..., None]:
    def hook(_layer: nn.Module, _args: object, output: Any) -> None:
        tapped[index] = (output if isinstance(output, torch.Tensor) else output[0])[0]

    return hook
