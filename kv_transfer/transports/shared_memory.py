"""Shared memory: one copy from the giver's pool into the taker's, on one host.

The giver's pool is a memfd. The taker opens it through /proc/<pid>/fd, maps it read-only once per link, and copies from
there. Whether that works is found out by trying: containers, pid namespaces and ptrace rules all have a say. A memfd
has no name to leak and lives as long as somebody maps it, so the death of the giver can't fault a copy.

If the giver's lease ends during a copy its blocks may change under the taker. The checksum, taken over what was read
to be copied, then differs; a commit can't come of it.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import threading
from concurrent.futures import Executor
from pathlib import Path
from typing import ClassVar

import numpy as np

from core.errors import TransferError
from engine.kv_cache import KVPool, Pool
from kv_transfer.messages import FromGiver, Hello, SharedPool
from kv_transfer.pieces import Rows, as_rows
from kv_transfer.transports.base import PullJob, Unusable, finished

_TOKEN_BYTES = 16
QUICK_PIECES = 1
"""So many are copied sooner than a thread is woken and heard of, and nothing that a peer does can hold them up."""


def host_identity() -> str:
    """Equal for two processes whose pids mean the same."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.readlink('/proc/self/ns/pid')}"


class PoolProbe:
    """The giver's side: a descriptor with a random token, so that a taker can tell that it has found this process."""

    def __init__(self, pool: KVPool) -> None:
        assert pool.fd is not None
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._fd = os.memfd_create("slipstream-kv-probe", os.MFD_CLOEXEC)
        os.write(self._fd, token)
        self.shared_pool = SharedPool(host_identity(), os.getpid(), pool.fd, self._fd, token)

    def close(self) -> None:
        os.close(self._fd)


class SharedMemory:
    """Raises Unusable when the giver's pool can't be mapped here."""

    name: ClassVar[str] = "shared_memory"

    def __init__(self, giver: Hello, pool: Pool, threads: Executor) -> None:
        if giver.shared_pool is None or pool.device.type != "cpu":
            raise Unusable("both pools must be in host memory")
        self._threads = threads
        mapped = _map_pool(giver, giver.shared_pool)
        self._rows: Rows | None = as_rows(np.frombuffer(mapped, dtype=np.uint8), giver.layout)

    async def pull(self, job: PullJob) -> None:
        if self._rows is None:
            raise TransferError("the link to the giver has ended")
        stop = threading.Event()
        work = asyncio.get_running_loop().run_in_executor(self._threads, self._copy, job, self._rows, stop)
        await finished(work, stop.set)

    def pull_at_once(self, job: PullJob) -> bool:
        if self._rows is None or len(job.pieces) > QUICK_PIECES:
            return False
        self._copy(job, self._rows, threading.Event())
        return True

    @staticmethod
    def _copy(job: PullJob, theirs: Rows, stop: threading.Event) -> None:
        job.on_began()
        for index in range(len(job.pieces)):
            if stop.is_set():
                return
            job.read(index, theirs)

    def on_message(self, message: FromGiver) -> None:
        """The giver takes no part in a copy, so it has nothing to say."""

    def forget(self, transfer_id: str) -> None:
        """Nothing is kept of a transfer."""

    def close(self) -> None:
        """The mapping goes with the last copy out of it, which holds it: a dead giver's memory is freed then."""
        self._rows = None


def _map_pool(giver: Hello, shared: SharedPool) -> mmap.mmap:
    if shared.host != host_identity():
        raise Unusable("the giver runs on another host or in another pid namespace")
    try:
        if _read(shared.pid, shared.probe_fd) != shared.token:
            raise Unusable(f"process {shared.pid} here is not the giver")
        size = giver.layout.block_bytes * giver.num_blocks
        with _Opened(shared.pid, shared.pool_fd) as fd:
            if os.fstat(fd).st_size < size:
                raise Unusable(f"the giver's pool has {os.fstat(fd).st_size} bytes, {size} were announced")
            return mmap.mmap(fd, size, prot=mmap.PROT_READ)
    except OSError as error:
        raise Unusable(f"cannot map the pool of process {shared.pid}: {error.strerror}") from error


def _read(pid: int, fd: int) -> bytes:
    with _Opened(pid, fd) as probe:
        return os.pread(probe, _TOKEN_BYTES, 0)


class _Opened:
    """Another process's descriptor, opened read-only for the length of a with block."""

    def __init__(self, pid: int, fd: int) -> None:
        self._path = f"/proc/{pid}/fd/{fd}"

    def __enter__(self) -> int:
        self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        return self._fd

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)
