"""How fast KV moves between two processes of this machine, beside bare loops of the same primitives."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import uvloop

from bench.transfer.baselines import tcp_loop_rate
from bench.transfer.gloo_loop import gloo_loop_rate, memcpy_rate
from bench.transfer.lender import BLOCK_SIZE, layout_of, scattered
from bench.transfer.sides import Lender, two_sides
from bench.transfer.wire import measure_wire
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.taker import Taker
from kv_transfer.transports.names import TransportName

PRIMITIVE: dict[TransportName, Callable[[int, int], float]] = {
    "shared_memory": lambda _nbytes, _rounds: memcpy_rate(),
    "tcp": tcp_loop_rate,
    "torch_distributed": gloo_loop_rate,
}
"""What each transport is made of: bytes per second of a bare loop over so many bytes."""
MIB = 2**20
TAKE_S = 60.0
CACHED_BYTES = 8 * MIB
"""A bare loop over one buffer of this size has it in the processor's cache."""
BARE_BYTES = 1 << 30
"""Moved by a bare loop over large buffers."""
_SHARES = {"cached": "share", "same_size": "share_same_size", "paced": "share_paced"}
COMPUTE_FACTOR = 3.0
"""A prefill that takes this many times as long as the transfer of its KV: the compute is longer than the wire."""


def measure_rates(sizes_mib: list[float], rounds: int, layout: KVLayout | None = None) -> dict[str, Any]:
    """For each transport and size in MiB, medians of `rounds`: bytes per second from the word that the KV is complete
    to the commit, everything included, and of the transport `alone`. `share` is of the bare loop of the transport's
    primitive over one buffer that stays in the cache, `share_same_size` of one over as many bytes as the transfer has,
    so that as much memory is read and written (both are the same for shared memory, whose loop is over large buffers),
    `share_paced` of the same over TCP as the system paces any socket; the loops run right before and
    after. `layout` is the demo model's by default."""
    layout = layout or layout_of(30, 3, 64, "bfloat16")
    sizes = {f"{mib:g}": max(1, int(mib * MIB) // layout.token_bytes) for mib in sizes_mib}
    with two_sides(layout, max(sizes.values())) as (lender, pool):
        return {"transports": uvloop.run(_measure_all(lender, pool, sizes, rounds))}


async def _measure_all(lender: Lender, pool: KVPool, sizes: dict[str, int], rounds: int) -> dict[str, Any]:
    return {
        name: {mib: await _measure(lender, pool, name, num_tokens, rounds) for mib, num_tokens in sizes.items()}
        for name in PRIMITIVE
    }


async def _measure(lender: Lender, pool: KVPool, name: TransportName, num_tokens: int, rounds: int) -> dict[str, Any]:
    nbytes = num_tokens * pool.layout.token_bytes
    before = _bare(name, nbytes)
    took, overlapped = await _take_all(lender, pool, name, num_tokens, rounds)
    alone = await measure_wire(lender, pool, name, num_tokens, rounds)
    after = _bare(name, nbytes)
    bare = {loop: statistics.mean((before[loop], after[loop])) for loop in before}

    def rates(seconds: float) -> dict[str, float]:
        rate = nbytes / seconds
        shares = {_SHARES[loop]: rate / bare_rate for loop, bare_rate in bare.items()}
        return {"ms": 1e3 * seconds, "bytes_per_s": rate, **shares}

    return {
        "bytes": nbytes,
        "bare_bytes_per_s": bare,
        **rates(took),
        "overlapped_ms": 1e3 * overlapped,
        "hidden": 1 - overlapped / took,
        "alone": {kind: rates(seconds) for kind, seconds in alone.items()},
    }


def _bare(name: TransportName, nbytes: int) -> dict[str, float]:
    """Bytes per second of the bare loop."""
    loop = PRIMITIVE[name]
    sizes = {"cached": CACHED_BYTES, "same_size": nbytes}
    found = {key: loop(size, _bare_rounds(size)) for key, size in sizes.items()}
    return found | ({"paced": tcp_loop_rate(nbytes, _bare_rounds(nbytes), paced=True)} if name == "tcp" else {})


def _bare_rounds(nbytes: int) -> int:
    return max(4, min(24, BARE_BYTES // nbytes))


async def _take_all(
    lender: Lender, pool: KVPool, transport: TransportName, num_tokens: int, rounds: int
) -> tuple[float, float]:
    """Seconds of a transfer, and what is left to see of one beside a prefill COMPUTE_FACTOR times as long."""
    taker = Taker(pool, transports=[transport])

    async def median(label: str, compute_s: float) -> float:
        names = [f"{transport}-{num_tokens}-{rounds}-{n}{label}" for n in range(rounds)]
        return statistics.median([await _take(taker, lender, name, num_tokens, compute_s) for name in names])

    try:
        await _take(taker, lender, f"{transport}-{num_tokens}-{rounds}-warm-up", num_tokens, 0.0)
        took = await median("", 0.0)
        return took, await median("-overlapped", COMPUTE_FACTOR * took)
    finally:
        await taker.close()


async def _take(taker: Taker, lender: Lender, name: str, num_tokens: int, compute_s: float) -> float:
    """Seconds from the KV being complete to the commit."""
    blocks = scattered(-(-num_tokens // BLOCK_SIZE), 2)
    taking = asyncio.ensure_future(
        taker.take(name, lender.address, blocks, start_token=0, num_tokens=num_tokens, deadline=time.time() + TAKE_S)
    )
    await asyncio.sleep(0.02)  # so that both sides are ready, as they are when a prompt ends
    lender.lend(name, num_tokens, compute_s)
    await taking
    return time.monotonic() - lender.computed_at()
