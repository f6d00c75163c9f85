"""The two sides of a measured hand-off: a process that gives (bench.transfer.lender), and a pool here that takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from bench.hosts.namespaces import LOOPBACK, Host
from bench.transfer.lender import BLOCK_SIZE, noise
from core.errors import InternalError
from engine.kv_cache import KVPool
from engine.kv_layout import KVLayout


class Lender:
    """The process that gives. Its pool has as many blocks as ours."""

    def __init__(self, layout: KVLayout, num_blocks: int, host: Host) -> None:
        shape = [layout.num_layers, layout.num_kv_heads, layout.head_size, layout.dtype, num_blocks]
        self._process = subprocess.Popen(  # noqa: S603  our own module
            host.command(sys.executable, "-m", "bench.transfer.lender", host.address, *map(str, shape)),
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
def two_sides(layout: KVLayout, num_tokens: int, giver: Host = LOOPBACK) -> Iterator[tuple[Lender, KVPool]]:
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    lender, pool = Lender(layout, num_blocks, giver), noise(layout, num_blocks)
    try:
        yield lender, pool
    finally:
        pool.close()
        lender.close()
