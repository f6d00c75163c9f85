"""Rooflines of a model: what the planner asks of its configuration, which is all that has to be there."""

from __future__ import annotations

from pathlib import Path

from core.errors import ConfigError
from engine.model_config import DecoderConfig, ModelConfig
from engine.parallel.split import check_split
from placement.profile import Profile
from placement.roofline import ModelSize, roofline


def roofline_of(model: str, kind: str, tp: int = 1, link_gb_s: float | None = None) -> Profile:
    """Of MODEL as on a command line, on a device of the table. Raises ConfigError for one that can't be split so."""
    from engine.checkpoints import Silent, resolve

    path = Path(model).expanduser()
    config = ModelConfig.from_folder(path if (path / "config.json").is_file() else resolve(model, progress=Silent()))
    check_split(config, tp, 1)
    return roofline(model, size_of(config), kind, tp, link_gb_s)


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
