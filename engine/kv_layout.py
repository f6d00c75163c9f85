"""The layout of a KV cache, as other processes must know it. Free of torch: the controller compares layouts."""

from __future__ import annotations

from msgspec import Struct, structs

from core.errors import LayoutMismatch
from engine.config_fields import Count, Index
from engine.parallel.split import Split

DEFAULT_KV_CACHE_BYTES = 2**30
"""On the CPU."""
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


class KVLayout(Struct, frozen=True, kw_only=True):
    """Everything another group must know to use KV computed here.

    `num_layers` and `num_kv_heads` are the model's; a rank holds the share that its TP and PP coordinates give it.
    `fingerprint` identifies the weights: KV of one model means nothing to another.
    """

    num_layers: Count
    num_kv_heads: Count
    head_size: Count
    dtype: str
    block_size: Count
    fingerprint: str
    tp_size: Count = 1
    tp_rank: Index = 0
    pp_size: Count = 1
    pp_rank: Index = 0

    @property
    def split(self) -> Split:
        return Split(self.tp_size, self.pp_size, self.tp_rank, self.pp_rank)

    def of(self, split: Split) -> KVLayout:
        """The layout of a rank's share."""
        return structs.replace(
            self, tp_size=split.tp_size, tp_rank=split.tp_rank, pp_size=split.pp_size, pp_rank=split.pp_rank
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_size

    def check_same_cache(self, other: KVLayout) -> None:
        """Raise LayoutMismatch, naming the field, unless KV can move between the two unchanged. Block size, TP and PP
        may differ; what the numbers mean may not."""
        for name in ("fingerprint", "dtype", "num_layers", "num_kv_heads", "head_size"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                raise LayoutMismatch(
                    f"KV caches differ in {name}: {ours} here, {theirs} there; "
                    "serve both groups from the same model and dtype",
                    field=name,
                )
