"""Which tensors a head has, by name. Free of torch, so that a checkpoint is refused before anything is started."""

from __future__ import annotations

from engine.models.tensors import HEAD, Shape
from speculation.heads.config import HeadConfig

LAYER = "layers.0."
_MIDLAYER = "midlayer."
"""What EAGLE-3's authors call it."""
TO_TARGET, IN_TARGET = "d2t", "t2d"
"""How far each token of the head's vocabulary is from its id in the target's, and which of that are in it."""


def shapes(config: HeadConfig) -> dict[str, Shape]:
    """Of those that it is trained by, all of which its checkpoint must have."""
    return _eagle(config) if config.kind == "eagle3" else _heads(config)


def named(name: str) -> str:
    """The name here of a tensor in a checkpoint."""
    return LAYER + name.removeprefix(_MIDLAYER) if name.startswith(_MIDLAYER) else name


def optional(config: HeadConfig) -> dict[str, Shape]:
    """Those that a checkpoint may have besides."""
    tokens: dict[str, Shape] = {TO_TARGET: (config.draft_vocab_size,), IN_TARGET: (config.vocab_size,)}
    if config.kind == "eagle3":
        return tokens | {"embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    return tokens | {HEAD: (config.draft_vocab_size, config.hidden_size)}


def _eagle(config: HeadConfig) -> dict[str, Shape]:
    layer, hidden = config.layer, config.hidden_size
    assert layer is not None
    queries, keys = layer.num_heads * layer.head_size, layer.num_kv_heads * layer.head_size
    own = {
        "hidden_norm": (hidden,),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (queries, 2 * hidden),
        "self_attn.k_proj": (keys, 2 * hidden),
        "self_attn.v_proj": (keys, 2 * hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (layer.intermediate_size, hidden),
        "mlp.up_proj": (layer.intermediate_size, hidden),
        "mlp.down_proj": (hidden, layer.intermediate_size),
    }
    return {
        "fc.weight": (hidden, len(config.taps) * hidden),
        **{f"{LAYER}{name}.weight": shape for name, shape in own.items()},
        "norm.weight": (hidden,),
        HEAD: (config.draft_vocab_size, hidden),
    }


def _heads(config: HeadConfig) -> dict[str, Shape]:
    hidden = config.hidden_size
    found: dict[str, Shape] = {"norm.weight": (hidden,)}
    for depth in range(config.depth):
        seen = depth + 2 if config.kind == "hydra" else 1
        found[f"heads.{depth}.weight"] = (hidden, seen * hidden)
        found[f"heads.{depth}.bias"] = (hidden,)
    return found
