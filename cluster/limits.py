"""How long a sequence may be, from the model, the cache and the configuration. The gateway refuses what workers could
not hold, so both take it from here."""

from __future__ import annotations

from cluster.config import EngineSection, parse_bytes
from core.errors import ConfigError
from engine.model_config import ModelConfig


def max_model_len(config: ModelConfig, engine: EngineSection, dtype: str | None = None) -> int:
    """Longest prompt plus output, in tokens. Raises ConfigError when more was asked for than fits. `dtype` is what a
    worker serves in; without it `auto` is taken for bfloat16, and a worker that has to use float32 has the last word
    on a request that would only fit in bfloat16."""
    token_bytes = config.kv_token_bytes(dtype or ("bfloat16" if engine.dtype == "auto" else engine.dtype))
    cache = parse_bytes(engine.kv_cache_memory) // token_bytes // engine.block_size * engine.block_size
    if cache < 1:
        raise ConfigError(
            f"--kv-cache-memory {engine.kv_cache_memory} holds no block: "
            f"{engine.block_size} tokens of this model need {token_bytes * engine.block_size} bytes"
        )
    limit = min(config.max_position_embeddings, cache)
    wanted = engine.max_model_len
    if wanted is not None and wanted > limit:
        raise ConfigError(
            f"--max-model-len {wanted} is above what can be served: the model takes "
            f"{config.max_position_embeddings} tokens and --kv-cache-memory {engine.kv_cache_memory} holds {cache}"
        )
    return wanted or limit
