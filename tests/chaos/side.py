"""One side of many hand-offs, in a process and on a host of its own. Orders and reports are lines of JSON.

side.py giver HOST LEASE_S   prints {"address"}; gives transfer N for every {"id": N}; prints {"id", "outcome"} when its
                             blocks are released
side.py taker TRANSPORT...   takes transfer N for every {"id": N, "address", "deadline_s"}; prints {"id", "outcome",
                             "fault"} when that has ended

The KV of a transfer follows from its number, so each is told from every other. Blocks that nothing holds are wiped: a
giver's that are read too late, or a taker's that are written too late, show.
"""

from __future__ import annotations

import asyncio
import json
import random
import sys
import time
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from core.errors import SlipstreamError
from core.links import LinkServer
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.giver import Giver
from kv_transfer.messages import SERVICE, SequenceState, ToGiver
from kv_transfer.pieces import Frontier, rows_of
from kv_transfer.taker import Taker

LAYERS, ROW_BYTES, MAX_TOKENS, NUM_BLOCKS, STALL_S = 8, 256, 1200, 600, 5.0
WIPED = 0xEE
_GIVER_BLOCK, _TAKER_BLOCK = 16, 32


class Blocks:
    """A pool and who has which of its blocks."""

    def __init__(self, block_size: int) -> None:
        layout = KVLayout(
            num_layers=LAYERS,
            num_kv_heads=2,
            head_size=64,
            dtype="bfloat16",
            block_size=block_size,
            fingerprint="chaos",
        )
        assert layout.block_bytes == LAYERS * 2 * block_size * ROW_BYTES
        self.pool = KVPool(layout, NUM_BLOCKS)
        self._size = block_size
        self._rows = rows_of(self.pool)  # [layers, 2, slots, row bytes]
        self._rows[:] = WIPED
        self._free = deque(range(NUM_BLOCKS))

    async def take(self, num_tokens: int) -> list[int]:
        count = -(-num_tokens // self._size)
        while len(self._free) < count:
            await asyncio.sleep(0.01)
        return [self._free.popleft() for _ in range(count)]

    def give_back(self, block_ids: list[int]) -> None:
        self._rows[:, :, self._slots(block_ids, len(block_ids) * self._size)] = WIPED
        self._free.extend(block_ids)

    def write(self, block_ids: list[int], kv: NDArray[np.uint8], start: int, stop: int) -> None:
        self._rows[:, :, self._slots(block_ids, stop)[start:]] = kv[:, :, start:stop]

    def read(self, block_ids: list[int], num_tokens: int) -> NDArray[np.uint8]:
        return np.asarray(self._rows[:, :, self._slots(block_ids, num_tokens)])

    def strays(self) -> bool:
        """Whether anything was written to a block that nothing holds."""
        slots = self._slots(list(self._free), len(self._free) * self._size)
        return bool((self._rows[:, :, slots] != WIPED).any())

    def _slots(self, block_ids: list[int], num_tokens: int) -> NDArray[np.int64]:
        token = np.arange(num_tokens)
        return np.asarray(block_ids)[token // self._size] * self._size + token % self._size


def num_tokens_of(number: int) -> int:
    return random.Random(number).randrange(1, MAX_TOKENS)


def kv_of(number: int) -> NDArray[np.uint8]:
    """[layers, 2, tokens, row bytes]"""
    shape = (LAYERS, 2, num_tokens_of(number), ROW_BYTES)
    return np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)


def report(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


async def orders() -> Any:
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield json.loads(line)


async def give(host: str, lease_s: float) -> None:
    blocks = Blocks(_GIVER_BLOCK)
    held: dict[str, list[int]] = {}

    def released(transfer_id: str, outcome: str) -> None:
        blocks.give_back(held.pop(transfer_id))
        report(id=int(transfer_id), outcome=outcome)

    giver = Giver(blocks.pool, lease_s=lease_s, on_released=released, tcp_host=host)

    async def prefill(number: int) -> None:
        """In two chunks, the first of which leaves early."""
        num_tokens, transfer_id, kv = num_tokens_of(number), str(number), kv_of(number)
        held[transfer_id] = await blocks.take(num_tokens)
        giver.open(transfer_id, held[transfer_id], num_tokens)
        half, done = num_tokens // 2, 0
        for stop in (half, num_tokens):
            if transfer_id not in held:
                return
            blocks.write(held[transfer_id], kv, done, stop)
            giver.written(transfer_id, Frontier(stop))
            done = stop
            await asyncio.sleep(0.005)
        giver.complete(transfer_id, SequenceState(token_ids=[number]))

    server = LinkServer()
    server.add_service(SERVICE, ToGiver, giver.on_link)
    report(address=await server.start(host))
    tasks = set()
    async for order in orders():
        tasks.add(asyncio.create_task(prefill(order["id"])))


async def take(*transports: str) -> None:
    blocks = Blocks(_TAKER_BLOCK)
    taker = Taker(blocks.pool, transports=transports, stall_s=STALL_S)

    async def receive(number: int, address: str, deadline_s: float) -> None:
        num_tokens = num_tokens_of(number)
        block_ids = await blocks.take(num_tokens)
        fault, deadline = "", time.time() + deadline_s
        try:
            taken = await taker.take(
                str(number), address, block_ids, start_token=0, num_tokens=num_tokens, deadline=deadline
            )
        except SlipstreamError as error:
            outcome = f"{type(error).__name__}: {error.message}"
        else:
            outcome = "committed"
            state, same = taken.state, np.array_equal(blocks.read(block_ids, num_tokens), kv_of(number))
            fault = "" if same and state.token_ids == [number] else "committed, and not what was given"
        blocks.give_back(block_ids)
        report(id=number, outcome=outcome, fault=fault or ("a free block was written to" if blocks.strays() else ""))

    tasks = set()
    async for order in orders():
        tasks.add(asyncio.create_task(receive(order["id"], order["address"], order["deadline_s"])))


if __name__ == "__main__":
    kind, *rest = sys.argv[1:]
    asyncio.run(give(rest[0], float(rest[1])) if kind == "giver" else take(*rest))
