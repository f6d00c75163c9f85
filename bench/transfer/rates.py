"""How fast KV moves between two processes of this machine, beside bare loops of the same primitives."""

from __future__ import annotations

import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from bench.transfer.baselines import tcp_loop_rate
from bench.transfer.gloo_loop import gloo_loop_rate, memcpy_rate
from bench.transfer.lender import BLOCK_SIZE, layout_of, noise, scattered
from core.errors import InternalError
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout
from kv_transfer.coding import Coding
from kv_transfer.messages import Hello
from kv_transfer.pieces import Extent, Rows, Runs, copy, cut, layers_of, rows_of, seal, slots_of
from kv_transfer.taker import Taker
from kv_transfer.transports.base import PullJob
from kv_transfer.transports.names import TransportName
from kv_transfer.transports.shared_memory import PoolProbe, SharedMemory

TRANSPORTS: tuple[TransportName, ...] = ("shared_memory", "tcp", "torch_distributed")
MIB = 2**20
TAKE_S = 60.0
BARE_BYTES = 1 << 30
"""Moved by a bare loop over large buffers."""
COMPUTE_FACTOR = 3.0
"""A prefill that takes this many times as long as the transfer of its KV: the compute is longer than the wire."""


class Unchecked(PullJob):
    """Pieces are taken as they come, to see what their checksums cost."""

    def read(self, index: int, theirs: Rows, pairs: Runs) -> None:
        piece = self.pieces[index]
        copy(layers_of(self.rows, piece), layers_of(theirs, piece), pairs, streamed=True)
        self.on_verified(index)


class Lender:
    """The process that gives (bench.transfer.lender). Its pool has as many blocks as ours."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        shape = [layout.num_layers, layout.num_kv_heads, layout.head_size, layout.dtype, num_blocks]
        self._process = subprocess.Popen(  # noqa: S603  our own module
            [sys.executable, "-m", "bench.transfer.lender", *map(str, shape)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.address = self._line()

    def lend(self, transfer_id: str, num_tokens: int, compute_s: float = 0.0) -> None:
        assert self._process.stdin is not None
        print(transfer_id, num_tokens, compute_s, file=self._process.stdin, flush=True)

    def computed_at(self) -> float:
        """When the KV of the transfer lent last was complete, by time.monotonic()."""
        return float(self._line().removeprefix("at "))

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        status = self._process.wait(10)
        self._process.stdout.close()
        if status:
            raise InternalError("the lending process ended with an error")

    def _line(self) -> str:
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise InternalError("the lending process ended early")
        return line.strip()


@contextmanager
def _two_sides(layout: KVLayout, num_tokens: int) -> Iterator[tuple[Lender, KVPool]]:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    lender, pool = Lender(layout, num_blocks), noise(layout, num_blocks)
    try:
        yield lender, pool
    finally:
        pool.close()
        lender.close()


def measure_rates(sizes_mib: list[int], rounds: int, layout: KVLayout | None = None) -> dict[str, Any]:
    """Bytes per second, medians of `rounds`. Rates of transfers are from the word that the KV is complete to the
    commit, everything included. Bare loops of TCP and gloo are measured twice: over one buffer of 8 MiB, which stays in
    the cache (`share_of_tcp`), and over one as large as the transfer, so that as much memory is read and written
    (`share_of_tcp_same_size`). `layout` is the demo model's by default."""
    layout = layout or layout_of(30, 3, 64, "bfloat16")
    sizes = {mib: max(1, mib * MIB // layout.token_bytes) for mib in sizes_mib}
    bare = {"memcpy": memcpy_rate(), "tcp": tcp_loop_rate(), "gloo": gloo_loop_rate()}
    same_size = {mib: _loop_rates(mib * MIB) for mib in sizes_mib}
    report: dict[str, Any] = {"bare_bytes_per_s": bare, "transports": {}, "copy": {}}
    report["bare_same_size_bytes_per_s"] = {str(mib): rates for mib, rates in same_size.items()}
    with _two_sides(layout, max(sizes.values())) as (lender, pool):
        for name in TRANSPORTS:
            found = asyncio.run(_take_all(lender, pool, name, list(sizes.values()), rounds))
            report["transports"][name] = {
                str(mib): _summary(layout, sizes[mib], took, overlapped, bare | same_size[mib])
                for mib, (took, overlapped) in zip(sizes, found, strict=True)
            }
    for checked in (True, False):
        rate = asyncio.run(_copy_rate(layout, max(sizes.values()), rounds, checked=checked))
        report["copy"]["checksum" if checked else "no_checksum"] = {
            "bytes_per_s": rate,
            "share_of_memcpy": rate / bare["memcpy"],
        }
    return report


def _loop_rates(nbytes: int) -> dict[str, float]:
    rounds = max(4, min(24, BARE_BYTES // nbytes))
    return {"tcp_same_size": tcp_loop_rate(nbytes, rounds), "gloo_same_size": gloo_loop_rate(nbytes, rounds)}


def _summary(
    layout: KVLayout, num_tokens: int, took: list[float], overlapped: list[float], bare: dict[str, float]
) -> dict[str, float]:
    """`hidden`: the part of a transfer's time of which a prefill COMPUTE_FACTOR times as long leaves nothing to see."""
    seconds, left = statistics.median(took), statistics.median(overlapped)
    rate = num_tokens * layout.token_bytes / seconds
    return {
        "bytes": num_tokens * layout.token_bytes,
        "ms": 1e3 * seconds,
        "bytes_per_s": rate,
        **{f"share_of_{name}": rate / other for name, other in bare.items()},
        "overlapped_ms": 1e3 * left,
        "hidden": 1 - left / seconds,
    }


async def _take_all(
    lender: Lender, pool: KVPool, transport: TransportName, sizes: list[int], rounds: int
) -> list[tuple[list[float], list[float]]]:
    """For each number of tokens the seconds of every round, without and with a prefill to overlap with."""
    taker = Taker(pool, transports=[transport])
    try:
        await _take(taker, lender, f"{transport}-warm-up", max(sizes), 0.0)
        found = []
        for num_tokens in sizes:
            took = [await _take(taker, lender, f"{transport}-{num_tokens}-{n}", num_tokens, 0.0) for n in range(rounds)]
            compute_s = COMPUTE_FACTOR * statistics.median(took)
            names = [f"{transport}-{num_tokens}-{n}-overlapped" for n in range(rounds)]
            found.append((took, [await _take(taker, lender, name, num_tokens, compute_s) for name in names]))
        return found
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


async def _copy_rate(layout: KVLayout, num_tokens: int, rounds: int, *, checked: bool) -> float:
    """Bytes per second of the shared-memory transport alone, from one pool of this process into another."""
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    source, target = noise(layout, num_blocks), noise(layout, num_blocks)
    probe, threads = PoolProbe(source), ThreadPoolExecutor(1)
    hello = Hello(layout=layout, num_blocks=num_blocks, device="cpu", shared_pool=probe.shared_pool)
    transport = SharedMemory(hello, target, threads)
    theirs = slots_of(scattered(num_blocks, 1), BLOCK_SIZE, num_tokens)
    pieces = seal(rows_of(source), theirs, list(cut(layout, Extent(0, num_tokens, 0, layout.num_layers))))
    job = (PullJob if checked else Unchecked)(
        transfer_id="copy",
        first=0,
        pieces=pieces,
        rows=rows_of(target),
        giver_slots=theirs,
        taker_slots=slots_of(scattered(num_blocks, 2), BLOCK_SIZE, num_tokens),
        coding=Coding("none", layout),
        on_began=lambda: None,
        on_verified=lambda _: None,
        on_decoded=lambda _: None,
    )
    took = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        await transport.pull(job)
        took.append(time.perf_counter() - started)
    transport.close()
    threads.shutdown()
    probe.close()
    for pool in (source, target):
        pool.close()
    return num_tokens * layout.token_bytes / statistics.median(took[1:])
