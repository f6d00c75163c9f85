"""A giver of KV in a process of its own, for `bench transfer`.

    python -m bench.transfer.lender ADDRESS LAYERS KV_HEADS HEAD_SIZE DTYPE BLOCKS

prints the address of its link, at ADDRESS. A line "TRANSFER TOKENS COMPUTE_S" on standard input opens a transfer of so
many tokens, writes its layers within COMPUTE_S and says so as a prefill worker would, and completes it. "at TIME", on
the clock that all processes of a machine share, is said a little later: saying so takes a tenth of a millisecond.
"""

from __future__ import annotations

import asyncio
import sys
import time

import torch
import uvloop

from core.links import LinkServer
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.giver import Giver
from kv_transfer.messages import SERVICE, SequenceState, ToGiver
from kv_transfer.pieces import Frontier, layers_told

BLOCK_SIZE = 16
SAID_AFTER_S = 0.02


def layout_of(num_layers: int, num_kv_heads: int, head_size: int, dtype: str) -> KVLayout:
    return KVLayout(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_size=head_size,
        dtype=dtype,
        block_size=BLOCK_SIZE,
        fingerprint="bench",
    )


def scattered(num_blocks: int, seed: int) -> list[int]:
    """A block table as it is after a while: in no order."""
    table: list[int] = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed)).tolist()
    return table


def noise(layout: KVLayout, num_blocks: int) -> KVPool:
    pool = KVPool(layout, num_blocks)
    pool.data.view(torch.uint8).random_(0, 256)
    return pool


async def lend(address: str, layout: KVLayout, num_blocks: int) -> None:
    pool = noise(layout, num_blocks)
    giver = Giver(pool, on_released=lambda *_: None, tcp_host=address)
    server = LinkServer()
    server.add_service(SERVICE, ToGiver, giver.on_link)  # type: ignore[arg-type]
    print(await server.start(address), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        transfer_id, num_tokens, compute_s = line.split()
        blocks = scattered(num_blocks, 1)[: -(-int(num_tokens) // BLOCK_SIZE)]
        await _prefill(giver, pool, transfer_id, blocks, int(num_tokens), float(compute_s))
    await server.stop()
    await giver.close()
    pool.close()


async def _prefill(
    giver: Giver, pool: KVPool, transfer_id: str, blocks: list[int], num_tokens: int, compute_s: float
) -> None:
    giver.open(transfer_id, blocks, num_tokens)
    if compute_s:
        started, layout = time.monotonic(), pool.layout
        told = layers_told(layout, num_tokens, last=True)
        for layer in range(1, layout.num_layers + 1):
            await asyncio.sleep(max(0.0, started + compute_s * layer / layout.num_layers - time.monotonic()))
            # As a prefill does: what is summed next is in the processor's cache.
            pool.data[layer - 1, :, blocks] = layer
            if layer in told:  # as a prefill worker says it
                giver.written(transfer_id, Frontier(0, num_tokens, layer))
    completed = time.monotonic()
    giver.complete(transfer_id, SequenceState(token_ids=[0]))
    await asyncio.sleep(SAID_AFTER_S)
    print("at", completed, flush=True)


if __name__ == "__main__":
    address, layers, heads, size, dtype, blocks = sys.argv[1:]
    uvloop.run(lend(address, layout_of(int(layers), int(heads), int(size), dtype), int(blocks)))
