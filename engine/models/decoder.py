"""The decoder that all our families share; DecoderConfig says in what they differ. Equal to their classes in
Transformers in float32. Differences are settled when the model is built: a running layer asks nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from typing import Any

import torch

from core.errors import InternalError, ModelError
from engine.attention import Attention
from engine.fusion import PreNormed, bare, gated_mlp, normed, rotation, wide_head
from engine.layers import Branch, GatedMLP, Norm, OffsetNorm, PostNormed, RMSNorm
from engine.linears import Linears, Projection, Sizes
from engine.model_config import DecoderConfig
from engine.models.experts import MixtureOfExperts
from engine.models.registry import FAMILIES
from engine.native.layer import fuse
from engine.rope import Angles, Rope, make_rope
from engine.weights import Weights

Layer = Callable[[torch.Tensor, Sequence[Angles], Any], torch.Tensor]
"""[rows, hidden] to the same, with the angles of each rope and the attention of the step."""


class DecoderLayer:
    __slots__ = (
        "_heads",
        "_index",
        "_mlp",
        "_out",
        "_qkv",
        "_rope",
        "_rotate_",
        "_scoring",
        "_split",
    )

    def __init__(
        self, index: int, config: DecoderConfig, ropes: Sequence[Rope], weights: Weights, linears: Linears
    ) -> None:
        prefix, hidden = f"model.layers.{index}.", config.hidden_size
        queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
        self._index = index
        self._scoring = (config.windows[index], config.attention_scale, config.attention_softcap)
        self._heads = (config.num_heads, config.num_kv_heads, config.head_size)
        self._split = (queries, queries + keys)
        attention, after = prefix + "self_attn.", prefix + "post_attention_layernorm"
        sizes = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        qkv: Sizes = {"qkv_proj": sizes} if config.fused else sizes
        self._qkv = normed(
            _norm(weights, prefix + "input_layernorm", config),
            linears.columns(attention, qkv, hidden, config.qkv_bias),
        )
        out: Branch = linears.row(attention + "o_proj", queries, hidden, config.out_bias)
        if config.gemma:
            out = PostNormed(out, _norm(weights, after, config))
            after = prefix + "pre_feedforward_layernorm"
        mlp = _mlp(index, config, weights, linears, _norm(weights, after, config))
        if config.gemma:
            mlp = PostNormed(mlp, _norm(weights, prefix + "post_feedforward_layernorm", config))
        self._out, self._mlp = out, mlp
        rope = config.ropes.of_layers[index]
        self._rope = rope or 0
        scales = _head_scales(weights, attention, config) if config.head_norms else None
        own_rope = None if rope is None else ropes[rope]
        self._rotate_ = rotation(own_rope, scales, config.rms_norm_eps, linears.native)

    def fused(self) -> Layer:
        """The same layer for steps that name no adapter: as one operator, where all of its parts are native."""
        other = copy(self)
        other._qkv, other._out, other._mlp = bare(self._qkv), bare(self._out), bare(self._mlp)
        mlp = other._mlp
        gated, down = (mlp.gated, mlp.down) if isinstance(mlp, GatedMLP) else (None, None)
        parts = (other._qkv, self._rotate_, other._out, gated, down)
        return fuse(self._index, *parts, self._heads[0], self._rope, self._scoring) or other

    def __call__(self, hidden: torch.Tensor, angles: Sequence[Angles], attention: Attention) -> torch.Tensor:
        heads, kv_heads, head_size = self._heads
        queries, rotated = self._split
        qkv = self._qkv(hidden)  # [tokens, (heads + 2 kv_heads) * head_size]
        self._rotate_(qkv[:, :rotated].view(-1, heads + kv_heads, head_size), angles[self._rope])
        mixed = attention(
            self._index,
            qkv[:, :queries].view(-1, heads, head_size),
            qkv[:, queries:].view(-1, 2, kv_heads, head_size),
            *self._scoring,
        )
        hidden = self._out.add(mixed, hidden)
        return self._mlp.add(hidden, hidden)


class Decoder:
    """Implements engine.models.registry.Model."""

    def __init__(self, config: DecoderConfig, weights: Weights, linears: Linears) -> None:
        own = linears.split.layers(config.num_layers)
        for index in set(range(config.num_layers)).difference(own):
            weights.leave(f"model.layers.{index}.")
        self._num_layers = config.num_layers
        self._embed, embedding = _embedding(config, weights, linears)
        self.embedding = embedding if linears.split.tp_size == 1 else None
        """[vocab, hidden], where this is the whole of it."""
        self._scale = float(torch.tensor(config.hidden_size**0.5, dtype=weights.dtype)) if config.gemma else 1.0
        self._ropes = [make_rope(rope, config, weights.device, weights.dtype) for rope in config.ropes.kinds]
        self._layers = {i: DecoderLayer(i, config, self._ropes, weights, linears) for i in own}
        self._fused = {i: layer.fused() for i, layer in self._layers.items()}
        self._rows = linears.rows
        self._logits = _head(config, weights, linears, embedding)

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        hidden = self._embed(token_ids)
        return hidden if self._scale == 1.0 else hidden.mul_(self._scale)

    def run_layers(
        self, hidden: torch.Tensor, positions: torch.Tensor, attention: Attention, taps: Iterable[int] = ()
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        angles = [rope.angles(positions) for rope in self._ropes]
        wanted, tapped = frozenset(taps), {}
        layers: Mapping[int, Layer] = self._layers if self._rows.groups else self._fused
        for index, layer in layers.items():
            if index in wanted:
                tapped[index] = hidden
            hidden = layer(hidden, angles, attention)
        if self._num_layers in wanted and self._num_layers - 1 in self._layers:
            tapped[self._num_layers] = hidden
        return hidden, tapped

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._logits(hidden)


class Head:
    """The last norm and the output layer: [rows, hidden] -> [rows, vocab]."""

    __slots__ = ("_head", "_softcap")

    def __init__(self, norm: Norm, head: Projection, softcap: float | None) -> None:
        self._head = wide_head(norm, head)
        self._softcap = softcap

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = self._head(hidden)
        return logits if self._softcap is None else logits.div_(self._softcap).tanh_().mul_(self._softcap)


def build(config: DecoderConfig, weights: Weights, linears: Linears) -> Decoder:
    model = Decoder(config, weights, linears)
    weights.check_all_taken()
    return model


def _embedding(config: DecoderConfig, weights: Weights, linears: Linears) -> tuple[Projection, torch.Tensor | None]:
    """The embedding, of the first stage, and its weight, which the last stage wants too where it is the head's."""
    name, split = "model.embed_tokens.weight", linears.split
    if not split.first and not (split.last and config.tie_word_embeddings):
        weights.leave(name)
        return _elsewhere, None
    weight = linears.vocabulary(name, config.vocab_size, config.hidden_size)
    return linears.embedding(weight, config.vocab_size) if split.first else _elsewhere, weight


def _head(config: DecoderConfig, weights: Weights, linears: Linears, embedding: torch.Tensor | None) -> Projection:
    name, norm = "lm_head.weight", "model.norm"
    if not linears.split.last:
        for prefix in (name, norm):
            weights.leave(prefix)
        return _elsewhere
    if config.tie_word_embeddings and name not in weights:
        assert embedding is not None
        weight = embedding
    else:
        weight = linears.vocabulary(name, config.vocab_size, config.hidden_size)
        if config.tie_word_embeddings and embedding is not None and not torch.equal(weight, embedding):
            raise ModelError(f"config.json says tie_word_embeddings, but {name} differs from the embeddings")
    return Head(_norm(weights, norm, config), linears.head(weight, config.vocab_size), config.logit_softcap)


def _elsewhere(_rows: torch.Tensor) -> torch.Tensor:
    raise InternalError("this part of the model belongs to another stage of the pipeline")


def _norm(weights: Weights, name: str, config: DecoderConfig) -> Norm:
    weight = weights.take(f"{name}.weight", config.hidden_size)
    return (OffsetNorm if config.gemma else RMSNorm)(weight, config.rms_norm_eps)


def _head_scales(weights: Weights, prefix: str, config: DecoderConfig) -> torch.Tensor:
    """Of the RMSNorms of query and key heads: [heads, head_size]."""
    query, key = (weights.take(f"{prefix}{name}.weight", config.head_size) for name in ("q_norm", "k_norm"))
    scales = torch.cat((query.expand(config.num_heads, -1), key.expand(config.num_kv_heads, -1)))
    return scales.float() + 1.0 if config.gemma else scales


def _mlp(index: int, config: DecoderConfig, weights: Weights, linears: Linears, norm: Norm) -> Branch:
    prefix, names = f"model.layers.{index}.", FAMILIES[config.architecture].experts
    if config.experts is not None and names is not None and config.experts.layers[index]:
        return PreNormed(norm, MixtureOfExperts(prefix + names.prefix, names, config, weights, linears))
    hidden, inner, prefix = config.hidden_size, config.intermediate_size, prefix + "mlp."
    sizes = {"gate_proj": inner, "up_proj": inner}
    gate_up: Sizes = {"gate_up_proj": sizes} if config.fused else sizes
    return gated_mlp(
        norm,
        linears.columns(prefix, gate_up, hidden, config.mlp_bias),
        linears.row(prefix + "down_proj", inner, hidden, config.mlp_bias),
        config.activation,
    )
