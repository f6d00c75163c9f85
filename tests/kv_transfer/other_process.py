"""The other side of a hand-off, in a process that a test may kill. It is told and tells by a pipe:

giver LEASE_S                              says its address; hears "TRANSFER BLOCKS TOKENS" and offers it;
                                           says "TRANSFER OUTCOME" for every release
taker TRANSPORT ADDRESS TRANSFER BLOCKS TOKENS
                                           says "pulling" and hangs when the first bytes are there
waiter ADDRESS TRANSFER                    says "waiting" and waits for blocks that it never gets
"""

from __future__ import annotations

import asyncio
import threading
import time
from multiprocessing.connection import Connection

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


async def give(test: Connection, lease_s: str) -> None:
    giver = Giver(
        pool_of_noise(LAYOUT, seed=GIVER_SEED),
        lease_s=float(lease_s),
        on_released=lambda *end: test.send(" ".join(end)),
        tcp_host="127.0.0.1",
    )
    server = LinkServer()
    server.add_service(SERVICE, ToGiver, giver.on_link)
    test.send(await server.start("127.0.0.1"))
    while True:
        transfer_id, block_ids, num_tokens = (await asyncio.to_thread(test.recv)).split()
        giver.open(transfer_id, blocks(block_ids), int(num_tokens))
        giver.complete(transfer_id, STATE)


async def take(
    test: Connection, transport: str, address: str, transfer_id: str, block_ids: str, num_tokens: str
) -> None:
    def hang(*arguments: object) -> None:
        test.send("pulling")
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


async def wait(test: Connection, address: str, transfer_id: str) -> None:
    test.send("waiting")
    taker = Taker(pool_of_noise(LAYOUT, seed=TAKER_SEED))
    never: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
    await taker.expect(transfer_id, address, never, deadline=time.time() + TIMEOUT_S)


KINDS = {"giver": give, "taker": take, "waiter": wait}


def run(test: Connection, kind: str, *arguments: str) -> None:
    many_small_messages()
    asyncio.run(KINDS[kind](test, *arguments))
