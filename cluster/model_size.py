"""What the planner's roofline asks of a model's configuration."""

from __future__ import annotations

from core.errors import ConfigError
from engine.model_config import DecoderConfig, ModelConfig
from placement.roofline import ModelSize


def size_of(config: ModelConfig) -> ModelSize:
    """Raises ConfigError for a model that we have no layers for: only its class knows how large it is."""
    if not isinstance(config, DecoderConfig):
        raise ConfigError(
            f"a roofline needs layers of ours, and {config.architecture} is run by its class in Transformers: "
            "measure it with slipstream profile"
        )
    width = config.head_size * (2 * config.num_heads + 2 * config.num_kv_heads)
    dense = config.hidden_size * 3 * config.intermediate_size
    total = active = config.num_layers * config.hidden_size * width
    if config.experts is None:
        total, active = total + config.num_layers * dense, active + config.num_layers * dense
    else:
        expert = 3 * config.hidden_size * config.experts.inner_size
        for mixed in config.experts.layers:
            total += config.experts.count * expert if mixed else dense
            active += config.experts.per_token * expert if mixed else dense
    return ModelSize(
        layer_parameters=total,
        active=active,
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_size=config.head_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        max_tokens=config.max_position_embeddings,
    )
