"""A bare loop of gloo's send and receive between two processes, and of a copy within one."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch._C._distributed_c10d import FileStore, ProcessGroupGloo

from bench.hosts.namespaces import LOOPBACK, Host
from kv_transfer.transports.pairs import Group

TIMEOUT = timedelta(seconds=60)


def gloo_loop_rate(
    nbytes: int = 8 << 20, rounds: int = 24, sender_host: Host = LOOPBACK, own_host: Host = LOOPBACK
) -> float:
    """Bytes per second from one buffer of `nbytes` into another, by default over loopback. The first round is not
    counted."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = Path(folder) / "meeting"
        arguments = [str(meeting), sender_host.address, str(nbytes), str(rounds)]
        command = sender_host.command(sys.executable, "-m", "bench.transfer.gloo_loop", *arguments)
        with subprocess.Popen(command) as sender:  # noqa: S603  our own module
            try:
                group, buffer = _join(meeting, 1, own_host.address), torch.empty(nbytes, dtype=torch.uint8)
                group.recv([buffer], 0, 0).wait(TIMEOUT)
                started = time.perf_counter()
                for _ in range(rounds - 1):
                    group.recv([buffer], 0, 0).wait(TIMEOUT)
                return nbytes * (rounds - 1) / (time.perf_counter() - started)
            finally:
                sender.kill()


def memcpy_rate(nbytes: int = 64 << 20, rounds: int = 12) -> float:
    """Bytes per second of one thread that copies `nbytes` from one place in memory to another: the median of `rounds`,
    as of a transport."""
    source, target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        np.copyto(target, source)
        took.append(time.perf_counter() - started)
    return nbytes / statistics.median(took)


def _join(meeting: Path, rank: int, address: str) -> Group:
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = TIMEOUT
    options._threads = 1
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    return cast("Group", ProcessGroupGloo(FileStore(str(meeting), 2), rank, 2, options))


def _send(meeting: Path, address: str, nbytes: int, rounds: int) -> None:
    group, buffer = _join(meeting, 0, address), torch.ones(nbytes, dtype=torch.uint8)
    for _ in range(rounds):
        group.send([buffer], 1, 0).wait(TIMEOUT)


if __name__ == "__main__":
    _send(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
