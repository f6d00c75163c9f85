"""The paged KV cache: its layout, as other processes must know it, and its memory."""

from __future__ import annotations

import mmap
import os

import torch
from msgspec import Struct

from core.errors import ConfigError, LayoutMismatch

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class KVLayout(Struct, frozen=True, kw_only=True):
    """Everything another group must know to use KV computed here.

    `num_layers` and `num_kv_heads` are the model's; a rank holds the share that its TP and PP coordinates give it.
    `fingerprint` identifies the weights: KV of one model means nothing to another.
    """

    num_layers: int
    num_kv_heads: int
    head_size: int
    dtype: str
    block_size: int
    fingerprint: str
    tp_size: int = 1
    tp_rank: int = 0
    pp_size: int = 1
    pp_rank: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of KV per token over all layers and heads."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_size * DTYPES[self.dtype].itemsize

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


class KVPool:
    """The blocks of one rank. On CPU the memory is a memfd, so that a peer on the same host can map it and copy blocks
    out without a copy in between; `fd` is that descriptor, None elsewhere. The pool owns memory and descriptor."""

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.fd: int | None = None
        self._map: mmap.mmap | None = None
        shape = self.shape(layout, num_blocks)
        dtype = DTYPES[layout.dtype]
        if self.device.type == "cpu":
            nbytes = layout.block_bytes * num_blocks
            self.fd = os.memfd_create("slipstream-kv", os.MFD_CLOEXEC)
            try:
                os.ftruncate(self.fd, nbytes)
                self._map = mmap.mmap(self.fd, nbytes)
            except OSError as error:
                os.close(self.fd)
                raise ConfigError(
                    f"cannot map {nbytes / 2**20:.0f} MiB for the KV cache ({error.strerror}); lower --kv-cache-memory"
                ) from error
            self.data = torch.frombuffer(self._map, dtype=dtype).view(shape)
        else:
            self.data = torch.zeros(shape, dtype=dtype, device=self.device)

    @staticmethod
    def shape(layout: KVLayout, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """[layers, 2 (key, value), blocks, block_size, kv_heads, head_size] of this rank's share."""
        return (
            layout.num_layers // layout.pp_size,
            2,
            num_blocks,
            layout.block_size,
            max(1, layout.num_kv_heads // layout.tp_size),
            layout.head_size,
        )

    def close(self) -> None:
        """Close the descriptor. The mapping lives as long as a tensor views it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None
