"""How the pieces of one transfer travel: as they lie in the cache, or as frames of a codec (kv_transfer.codecs).

A piece goes as a frame if that is the smaller of the two, which its shape alone settles: few tokens of many layers have
more scales than numbers. Both sides compute it alike, so nothing on the wire says so. A frame of codec "none" never is
the smaller one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
import xxhash

from engine.kv_layout import KVLayout
from kv_transfer.codecs.base import PieceShape
from kv_transfer.codecs.names import CodecName
from kv_transfer.codecs.registry import CODECS
from kv_transfer.messages import Piece
from kv_transfer.pieces import Extent, Rows, Slots, copy, is_tensor, layers_of, runs
from kv_transfer.split_rows import Memory, SplitRows


@dataclass(frozen=True)
class Coding:
    """`layout` is that of either side: they are the same in all that a frame depends on."""

    codec: CodecName
    layout: KVLayout

    def is_framed(self, piece: Piece | Extent) -> bool:
        return self.wire_bytes(piece) < self._shape(piece).nbytes

    def wire_bytes(self, piece: Piece | Extent) -> int:
        """Of the piece on its way."""
        return _wire_bytes(self.codec, self._shape(piece))

    def encode(self, rows: Rows, slots: Slots, piece: Piece | Extent) -> torch.Tensor:
        """The frame of a framed piece, [bytes] uint8 in host memory. `slots` are the piece's own."""
        own = layers_of(rows, piece)
        whole = _new_rows(own, len(slots))
        copy(whole, own, runs(slots, np.arange(len(slots))))
        shape = self._shape(piece)
        return CODECS[self.codec].encode(torch.as_tensor(whole).view(shape.dtype).view(shape.size)).cpu()

    def decode(self, frame: torch.Tensor, rows: Rows, slots: Slots, piece: Piece) -> None:
        """The other way, into the slots, where it is on return. Raises TransferError for what is no frame of this
        piece."""
        own = layers_of(rows, piece)
        device = torch.as_tensor(_new_rows(own, 0)).device
        decoded = CODECS[self.codec].decode(frame.to(device), self._shape(piece)).contiguous()
        whole = decoded.flatten(3).view(torch.uint8)  # [layers, 2, tokens, row bytes]
        copy(own, whole if is_tensor(own) else whole.numpy(), runs(np.arange(len(slots)), slots))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # who hears of the piece may use another stream

    def _shape(self, piece: Piece | Extent) -> PieceShape:
        return PieceShape.in_layout(self.layout, piece.num_layers, piece.num_tokens)


def checksum_of(frame: torch.Tensor) -> int:
    """xxh3-64 of a frame: what Piece.checksum is for a framed piece."""
    return int(xxhash.xxh3_64_intdigest(frame.cpu().numpy().data))


@lru_cache(maxsize=1024)
def _wire_bytes(codec: CodecName, shape: PieceShape) -> int:
    return min(CODECS[codec].encoded_bytes(shape), shape.nbytes)


def _new_rows(rows: Rows, num_tokens: int) -> Memory:
    """Contiguous rows of the kind and the layers of `rows`."""
    if isinstance(rows, SplitRows):
        return rows.new_rows(num_tokens)
    layers, planes, _, width = rows.shape
    if isinstance(rows, torch.Tensor):
        return rows.new_empty((layers, planes, num_tokens, width))
    return np.empty((layers, planes, num_tokens, width), np.uint8)
