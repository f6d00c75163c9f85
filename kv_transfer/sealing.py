"""Sealing: what is final of a giver's KV becomes pieces, and frames where the transfer is in a codec."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.kv_cache import Pool
from kv_transfer import native_rows
from kv_transfer.coding import Coding, checksum_of
from kv_transfer.messages import Piece
from kv_transfer.pieces import Extent, Rows, Slots, rows_of, seal, tokens_of


class SealedPiece(NamedTuple):
    piece: Piece
    frame: torch.Tensor | None = None
    encode_seconds: float = 0.0


@dataclass(frozen=True)
class Source:
    """The giver's pool, and the threads that read it."""

    pool: Pool
    rows: Rows
    threads: Executor

    @staticmethod
    def of(pool: Pool, threads: Executor) -> Source:
        native_rows.load()  # as by the taker
        return Source(pool, rows_of(pool), threads)

    def is_quick(self, extents: Sequence[Extent], coding: Coding) -> bool:
        """Whether to seal them takes no longer than to wake a thread and to hear of it: one sum over host memory."""
        return len(extents) <= 1 and isinstance(self.rows, np.ndarray) and not any(map(coding.is_framed, extents))

    def seal(
        self, slots: Slots, extents: Sequence[Extent], coding: Coding, ready: torch.cuda.Event | None
    ) -> list[SealedPiece]:
        """In a thread, unless it `is_quick`. On CUDA `ready` says when the KV is written: a stream beside the model's
        waits for it."""
        if ready is None:
            return [self._sealed(slots, extent, coding) for extent in extents]
        with torch.cuda.stream(torch.cuda.Stream(self.pool.device)):  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().wait_event(ready)
            return [self._sealed(slots, extent, coding) for extent in extents]

    def written_by_now(self) -> torch.cuda.Event | None:
        """When what is enqueued on the caller's stream will have been written; None where nothing is enqueued."""
        if self.pool.device.type != "cuda":
            return None
        event: torch.cuda.Event = torch.cuda.current_stream(self.pool.device).record_event()
        return event

    def _sealed(self, slots: Slots, extent: Extent, coding: Coding) -> SealedPiece:
        if not coding.is_framed(extent):
            (piece,) = seal(self.rows, slots, [extent])
            return SealedPiece(piece)
        started = time.perf_counter()
        frame = coding.encode(self.rows, tokens_of(slots, extent), extent)
        took = time.perf_counter() - started
        return SealedPiece(Piece(*extent, checksum_of(frame)), frame, took)
