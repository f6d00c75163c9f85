"""The other side of a hand-off, in a process that a test may kill.

other_process.py giver LEASE_S           prints its address; reads "TRANSFER BLOCKS TOKENS" and offers it;
                                         prints "TRANSFER OUTCOME" for every release
other_process.py taker TRANSPORT ADDRESS TRANSFER BLOCKS TOKENS
                                         prints "pulling" and hangs when the first bytes are there
other_process.py waiter ADDRESS TRANSFER prints "waiting" and waits for blocks that it never gets
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time

from sides import STATE, TIMEOUT_S, layout, pool_of_noise

from core.links import LinkServer
from kv_transfer import pieces
from kv_transfer.giver import Giver
from kv_transfer.messages import SERVICE, ToGiver
from kv_transfer.taker import Reservation, Taker
from kv_transfer.transports import base, batches, tcp, tcp_io, torch_distributed

LAYOUT = layout(num_layers=8)
GIVER_SEED, TAKER_SEED = 1, 2


def many_small_messages() -> None:
    """Both processes must cut alike."""
    pieces.PIECE_BYTES = 1 << 10
    batches.BATCH_BYTES = tcp_io.BATCH_BYTES = 2 << 10
    batches.MESSAGE_BYTES = 1 << 10
    tcp_io.MIN_VECTOR_BYTES = 1


def blocks(text: str) -> list[int]:
    return [int(block) for block in text.split(",")]


async def give(lease_s: float) -> None:
    giver = Giver(
        pool_of_noise(LAYOUT, seed=GIVER_SEED),
        lease_s=lease_s,
        on_released=lambda *end: print(*end, flush=True),
        tcp_host="127.0.0.1",
    )
    server = LinkServer()
    server.add_service(SERVICE, ToGiver, giver.on_link)
    print(await server.start("127.0.0.1"), flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        transfer_id, block_ids, num_tokens = line.split()
        giver.open(transfer_id, blocks(block_ids), int(num_tokens))
        giver.complete(transfer_id, STATE)


async def take(transport: str, address: str, transfer_id: str, block_ids: str, num_tokens: str) -> None:
    def hang(*arguments: object) -> None:
        print("pulling", flush=True)
        threading.Event().wait()

    match transport:
        case "shared_memory":
            base.copy_summed = hang
        case "tcp":
            tcp.land = hang
        case "torch_distributed":
            torch_distributed.land = hang
    taker = Taker(pool_of_noise(LAYOUT, seed=TAKER_SEED), transports=[transport])
    await taker.take(
        transfer_id,
        address,
        blocks(block_ids),
        start_token=0,
        num_tokens=int(num_tokens),
        deadline=time.time() + TIMEOUT_S,
    )


async def wait(address: str, transfer_id: str) -> None:
    print("waiting", flush=True)
    taker = Taker(pool_of_noise(LAYOUT, seed=TAKER_SEED))
    never: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
    await taker.expect(transfer_id, address, never, deadline=time.time() + TIMEOUT_S)


if __name__ == "__main__":
    many_small_messages()
    kind, *rest = sys.argv[1:]
    match kind:
        case "giver":
            asyncio.run(give(float(rest[0])))
        case "taker":
            asyncio.run(take(*rest))
        case "waiter":
            asyncio.run(wait(*rest))
