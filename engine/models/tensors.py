"""Which tensors a checkpoint of one of our families must hold, by name. Free of torch, so that a checkpoint is refused
before a process is started for it; engine.models.decoder takes the same ones."""

from __future__ import annotations

from collections.abc import Iterator

from engine.model_config import DecoderConfig
from engine.models.registry import FAMILIES

Shape = tuple[int, ...]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def needed(config: DecoderConfig) -> dict[str, Shape]:
    """Shapes by name, of the whole model. With tied embeddings the output layer is not among them."""
    vocabulary = (config.vocab_size, config.hidden_size)
    tensors: dict[str, Shape] = {EMBEDDING: vocabulary, "model.norm.weight": (config.hidden_size,)}
    if not config.tie_word_embeddings:
        tensors[HEAD] = vocabulary
    for layer in range(config.num_layers):
        tensors |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(layer, config)}
    return tensors


def _layer(layer: int, config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    norms = ["input", "post_attention"] + (["pre_feedforward", "post_feedforward"] if config.gemma else [])
    for norm in norms:
        yield f"{norm}_layernorm.weight", (config.hidden_size,)
    queries, keys = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
    projections = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    if config.fused:
        projections = {"qkv_proj": queries + 2 * keys}
    for name, outputs in projections.items():
        yield from _linear(f"self_attn.{name}", config.hidden_size, outputs, config.qkv_bias)
    yield from _linear("self_attn.o_proj", queries, config.hidden_size, config.out_bias)
    if config.head_norms:
        yield "self_attn.q_norm.weight", (config.head_size,)
        yield "self_attn.k_norm.weight", (config.head_size,)
    yield from _mlp(layer, config)


def _mlp(layer: int, config: DecoderConfig) -> Iterator[tuple[str, Shape]]:
    hidden, experts, names = config.hidden_size, config.experts, FAMILIES[config.architecture].experts
    if experts is not None and names is not None and experts.layers[layer]:
        yield f"{names.prefix}gate.weight", (experts.count, hidden)
        for expert in range(experts.count):
            own = f"{names.prefix}experts.{expert}."
            yield from _linear(own + names.gate, hidden, experts.inner_size)
            yield from _linear(own + names.up, hidden, experts.inner_size)
            yield from _linear(own + names.down, experts.inner_size, hidden)
        return
    inner, bias = config.intermediate_size, config.mlp_bias
    for name, outputs in (
        {"gate_up_proj": 2 * inner} if config.fused else {"gate_proj": inner, "up_proj": inner}
    ).items():
        yield from _linear(f"mlp.{name}", hidden, outputs, bias)
    yield from _linear("mlp.down_proj", inner, hidden, bias)


def _linear(name: str, inputs: int, outputs: int, bias: bool = False) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (outputs, inputs)
    if bias:
        yield f"{name}.bias", (outputs,)
