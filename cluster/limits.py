"""How long a sequence may be, from the model, the cache and the configuration. The gateway refuses what workers could
not hold, so both take it from here."""

from __future__ import annotations

from cluster.config.engine import EngineSection
from core.errors import ConfigError
from engine.model_config import ModelConfig


def max_model_len(
    config: ModelConfig, engine: EngineSection, *, dtype: str | None = None, cache_tokens: int | None = None
) -> int:
    """Longest prompt plus output, in tokens. Raises ConfigError when more was asked for than fits.

    A worker knows its cache: `cache_tokens`. Others work it out of --kv-cache-memory and `dtype`, where `auto` is taken
    for bfloat16; a worker that has to use float32, or whose GPU says how much there is, has the last word on a request
    that is too long for its cache only."""
    held = _cache_tokens(config, engine, dtype) if cache_tokens is None else cache_tokens
    limit = config.max_position_embeddings if held is None else min(config.max_position_embeddings, held)
    wanted = engine.max_model_len
    if wanted is not None and wanted > limit:
        holds = "" if held is None else f" and the KV cache ({_flag(engine)}) holds {held}"
        raise ConfigError(
            f"--max-model-len {wanted} is above what can be served: the model takes "
            f"{config.max_position_embeddings} tokens{holds}"
        )
    return wanted or limit


def _cache_tokens(config: ModelConfig, engine: EngineSection, dtype: str | None) -> int | None:
    """None where only the worker can tell."""
    if (nbytes := engine.kv_cache_bytes) is None:
        return None
    token_bytes = config.kv_token_bytes(dtype or ("bfloat16" if engine.dtype == "auto" else engine.dtype))
    tokens = nbytes // token_bytes // engine.block_size * engine.block_size
    if tokens < 1:
        raise ConfigError(
            f"{_flag(engine)} holds no block: "
            f"{engine.block_size} tokens of this model need {token_bytes * engine.block_size} bytes"
        )
    return tokens


def _flag(engine: EngineSection) -> str:
    """What sets the size of the cache."""
    if engine.kv_cache_memory is not None:
        return f"--kv-cache-memory {engine.kv_cache_memory}"
    return "--kv-cache-memory" if engine.device == "cpu" else "--gpu-memory-utilization"
