"""Both sides of a hand-off for tests: pools with known bytes, a giver behind a link server, a taker."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from core.links import LinkServer
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.codecs.names import CodecSetting
from kv_transfer.codecs.policy import CodecPolicy
from kv_transfer.giver import Giver
from kv_transfer.messages import SERVICE, SequenceState, ToGiver
from kv_transfer.pieces import Rows, rows_of, slots_of
from kv_transfer.taker import Reservation, Taker
from tests.loop_clock import LoopClock, loop_clock

STATE = SequenceState(token_ids=[42])
TIMEOUT_S = 60.0


def layout(block_size: int = 16, **changes: Any) -> KVLayout:
    fields = {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_size": 8,
        "dtype": "bfloat16",
        "block_size": block_size,
        "fingerprint": "tiny",
    }
    return KVLayout(**(fields | changes))


def pool_of_noise(of: KVLayout, num_blocks: int = 64, seed: int = 0, device: str = "cpu") -> KVPool:
    pool = KVPool(of, num_blocks, device)
    raw = pool.data.view(torch.uint8)
    raw.copy_(torch.from_numpy(np.random.default_rng(seed).integers(0, 256, raw.shape, dtype=np.uint8)))
    return pool


def tokens(pool: KVPool, block_ids: Sequence[int], start: int, stop: int) -> Rows:
    """A copy of the KV of some tokens: [layers, 2, tokens, row bytes]."""
    part = rows_of(pool)[:, :, slots_of(block_ids, pool.layout.block_size, stop)[start:]]
    return part.cpu().numpy() if isinstance(part, torch.Tensor) else part.copy()


class Gate:
    """Holds the threads that call a function until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> None:
        self.reached = asyncio.Event()
        self.opened = threading.Event()
        loop, original = asyncio.get_running_loop(), getattr(module, name)

        def gated(*arguments: Any) -> Any:
            loop.call_soon_threadsafe(self.reached.set)
            assert self.opened.wait(TIMEOUT_S)
            return original(*arguments)

        monkeypatch.setattr(module, name, gated)


def time_of_hand_offs() -> AbstractAsyncContextManager[LoopClock]:
    """Of leases, stalls and deadlines, for tests in which they are short."""
    return loop_clock(*(f"kv_transfer.{module}" for module in ("alarm", "counters", "giving", "taker", "taking")))


@dataclass
class Sides:
    giver_pool: KVPool
    taker_pool: KVPool
    giver: Giver
    taker: Taker
    address: str
    server: LinkServer
    ends: asyncio.Queue[tuple[str, str]]
    """What on_released was called with."""
    exact: list[bool] = field(default_factory=list)
    """Whether what was taken is, transfer by transfer."""

    def offer(self, transfer_id: str, block_ids: Sequence[int], num_tokens: int) -> None:
        """A prompt that is computed already."""
        self.giver.open(transfer_id, block_ids, num_tokens)
        self.giver.complete(transfer_id, STATE)

    async def end(self) -> tuple[str, str]:
        """The next release at the giver."""
        return await asyncio.wait_for(self.ends.get(), TIMEOUT_S)

    async def take(
        self, transfer_id: str, block_ids: Sequence[int], stop: int, start: int = 0, wait_s: float = TIMEOUT_S
    ) -> SequenceState:
        taken = await self.taker.take(
            transfer_id, self.address, block_ids, start_token=start, num_tokens=stop, deadline=time.time() + wait_s
        )
        self.exact.append(taken.exact)
        return taken.state

    def expect(
        self, transfer_id: str, wait_s: float = TIMEOUT_S
    ) -> tuple[asyncio.Future[Reservation], asyncio.Task[SequenceState]]:
        """Where the blocks go, and the transfer that waits for them."""
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        expecting = self.taker.expect(transfer_id, self.address, reserved, deadline=time.time() + wait_s)

        async def state() -> SequenceState:
            return (await expecting).state

        return reserved, asyncio.create_task(state())


def assert_same(sides: Sides, theirs: list[int], ours: list[int], start: int, stop: int) -> None:
    """The KV of these tokens is the same on both sides, bit for bit."""
    np.testing.assert_array_equal(
        tokens(sides.taker_pool, ours, start, stop), tokens(sides.giver_pool, theirs, start, stop)
    )


async def wanted(sides: Sides, transfer_id: str) -> None:
    """Returns when the giver has heard of a transfer."""
    while transfer_id not in sides.giver._live:
        await asyncio.sleep(0.001)


@asynccontextmanager
async def connected(
    giver_layout: KVLayout | None = None,
    taker_layout: KVLayout | None = None,
    *,
    lease_s: float = 10.0,
    num_blocks: int = 64,
    devices: tuple[str, str] = ("cpu", "cpu"),
    nixl: bool = False,
    codec: CodecSetting = "none",
    **taker_options: Any,
) -> AsyncIterator[Sides]:
    giver_pool = pool_of_noise(giver_layout or layout(), num_blocks, seed=1, device=devices[0])
    taker_pool = pool_of_noise(taker_layout or layout(), num_blocks, seed=2, device=devices[1])
    ends: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    giver = Giver(
        giver_pool,
        lease_s=lease_s,
        on_released=lambda *end: ends.put_nowait(end),
        tcp_host="127.0.0.1",
        nixl=nixl,
        codecs=CodecPolicy(codec, giver_pool.layout, giver_pool.device),
    )
    taker = Taker(taker_pool, codecs=CodecPolicy(codec, taker_pool.layout, taker_pool.device), **taker_options)
    server = LinkServer()
    server.add_service(SERVICE, ToGiver, giver.on_link)
    address = await server.start("127.0.0.1")
    sides = Sides(giver_pool, taker_pool, giver, taker, address, server, ends)
    try:
        yield sides
    finally:
        await taker.close()
        await server.stop()
        await giver.close()
        giver_pool.close()
        taker_pool.close()
    assert ends.empty(), f"released and not expected: {ends}"
