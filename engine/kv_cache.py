"""The memory of the paged KV cache."""

from __future__ import annotations

import mmap
import os

import torch

from core.errors import ConfigError
from engine.kv_layout import KVLayout

DTYPES: dict[str, torch.dtype] = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


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
