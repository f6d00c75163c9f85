"""The memory of the paged KV cache."""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Sequence
from typing import TypeAlias

import torch

from core.errors import ConfigError
from engine.kv_layout import KVLayout
from engine.parallel.split import WHOLE, Split

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class KVPool:
    """The blocks of one rank. On CPU the memory is a memfd, so that a peer on the same host can map it and copy blocks
    out without a copy in between; `fd` is that descriptor, None elsewhere. The pool owns memory and descriptor.

    The ranks of a group on CPU share one memory, which has the layout of an unsplit cache: `share` gives each a view of
    its layers and heads. So whoever made the memory sees the whole cache, and a peer need not know of the split."""

    def __init__(
        self, layout: KVLayout, num_blocks: int, device: torch.device | str = "cpu", *, memory: int | None = None
    ) -> None:
        """`memory` is the descriptor of an unsplit cache that this pool becomes the owner of; by default a rank has
        memory of its own. All of it is taken here, 1 GiB in less than a second. Raises ConfigError when there is not
        enough."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = torch.device(device)
        self.fd: int | None = None
        dtype = DTYPES[layout.dtype]
        if self.device.type == "cpu":
            whole = layout.of(WHOLE) if memory is not None else layout
            self.fd, mapped = _map(memory, _nbytes(whole, num_blocks))
            self.data = torch.frombuffer(mapped, dtype=dtype).view(self.shape(whole, num_blocks))
            if memory is not None:
                self.data = _share_of(self.data, layout)
            self.data.zero_()  # or the kernel would find a page for each of its parts when a step first writes to it
        else:
            self.data = torch.zeros(self.shape(layout, num_blocks), dtype=dtype, device=self.device)

    @staticmethod
    def shape(layout: KVLayout, num_blocks: int) -> tuple[int, int, int, int, int, int]:
        """[layers, 2 (key, value), blocks, block_size, kv_heads, head_size] of this rank's share."""
        return (
            len(layout.split.layers(layout.num_layers)),
            2,
            num_blocks,
            layout.block_size,
            len(layout.split.kv_heads(layout.num_kv_heads)),
            layout.head_size,
        )

    def close(self) -> None:
        """Close the descriptor. The mapping lives as long as a tensor views it."""
        if self.fd is not None:
            os.close(self.fd)
            self.fd = None


class GroupPool:
    """The blocks of a group whose ranks have memory of their own, as their leader sees them: `shares` says which part
    of the cache each has, in the shape of a KVPool's data. The ranks own the memory."""

    fd = None

    def __init__(self, layout: KVLayout, num_blocks: int, shares: Sequence[tuple[Split, torch.Tensor]]) -> None:
        """`layout` is the whole model's."""
        self.layout = layout
        self.num_blocks = num_blocks
        self.shares = list(shares)
        self.device = self.shares[0][1].device

    def close(self) -> None:
        """Forget the memory, which may go with its ranks then."""
        self.shares.clear()


Pool: TypeAlias = KVPool | GroupPool


def _nbytes(layout: KVLayout, num_blocks: int) -> int:
    return math.prod(KVPool.shape(layout, num_blocks)) * DTYPES[layout.dtype].itemsize


def _map(fd: int | None, nbytes: int) -> tuple[int, mmap.mmap]:
    fresh = fd is None
    fd = os.memfd_create("slipstream-kv", os.MFD_CLOEXEC) if fd is None else fd
    try:
        if fresh:
            os.ftruncate(fd, nbytes)
        return fd, mmap.mmap(fd, nbytes)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"cannot map {nbytes / 2**20:.0f} MiB for the KV cache ({error.strerror}); lower --kv-cache-memory"
        ) from error


def _share_of(cache: torch.Tensor, layout: KVLayout) -> torch.Tensor:
    """The layers and heads of a rank in an unsplit cache. Heads that ranks have in common they all write, alike."""
    layers, heads = layout.split.layers(layout.num_layers), layout.split.kv_heads(layout.num_kv_heads)
    return cache[layers.start : layers.stop, ..., heads.start : heads.stop, :]
