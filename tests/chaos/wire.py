"""Two hosts in network namespaces, and the wire between them: a relay in user space that delays, throttles, drops or is
cut. Every end of the wire is a TUN device that lives in one namespace while its packets are read and written here, so
loss and delay happen to IP packets and the kernel's TCP deals with them, whether it has netem or not. Needs root.
"""

from __future__ import annotations

import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_PACKET_BYTES = 1 << 16
_pairs = itertools.count()
QUEUE_S = 0.5
"""A throttled wire drops what would wait longer, as a router with a short queue does."""


@dataclass(frozen=True)
class Condition:
    """What the wire does to a packet, in each direction."""

    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    loss: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class Host:
    namespace: str
    address: str

    def command(self, *arguments: str) -> list[str]:
        """What runs these in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *arguments]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The sockets and processes that this thread makes are on the host."""
        with (
            Path("/proc/thread-self/ns/net").open() as before,
            Path(f"/run/netns/{self.namespace}").open() as namespace,
        ):
            _set_namespace(namespace.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())


class Wire:
    """Relays between two devices in a thread until it is closed. `condition` may be changed at any time; packets under
    way keep theirs."""

    def __init__(self, ends: tuple[int, int], seed: int) -> None:
        self.condition = Condition()
        self._ends = ends
        self._rng = random.Random(seed)
        self._due: list[tuple[float, int, int, bytes]] = []  # when, a tie-break, to which end, the packet
        self._busy_until = [0.0, 0.0]
        self._num_packets = 0
        self._closed = False
        self._thread = threading.Thread(target=self._relay, name="wire", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closed = True
        self._thread.join()

    def _relay(self) -> None:
        while not self._closed:
            wait = min(0.1, max(0.0, self._due[0][0] - time.monotonic())) if self._due else 0.1
            readable, _, _ = select.select(self._ends, [], [], wait)
            for end in readable:
                self._take(os.read(end, _PACKET_BYTES), to=1 - self._ends.index(end))
            while self._due and self._due[0][0] <= time.monotonic():
                _, _, to, packet = heapq.heappop(self._due)
                os.write(self._ends[to], packet)

    def _take(self, packet: bytes, to: int) -> None:
        condition, now = self.condition, time.monotonic()
        if condition.cut or self._rng.random() < condition.loss:
            return
        started = max(now, self._busy_until[to])
        if started - now > QUEUE_S:
            return
        self._busy_until[to] = started + len(packet) / condition.bytes_per_s
        self._num_packets += 1
        heapq.heappush(self._due, (self._busy_until[to] + condition.delay_s, self._num_packets, to, packet))


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def missing() -> str:
    """Why namespaces can't be made here; empty if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if shutil.which("ip") is None:
        return "needs ip(8)"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"needs {_TUN}"
    name = f"slipstream-{os.getpid()}-probe"
    if subprocess.run(["ip", "netns", "add", name], capture_output=True, check=False).returncode:
        return "may not make network namespaces"
    _ip("netns", "del", name)
    return ""


@contextmanager
def two_hosts(seed: int = 0) -> Iterator[tuple[Host, Host, Wire]]:
    """Made, and removed in any case, with every process that is still in them. There may be several pairs at a time,
    with the same addresses, none of which hears of another."""
    _remove_stale()
    pair = next(_pairs)
    hosts = tuple(Host(f"slipstream-{os.getpid()}-{name}{pair}", f"10.199.0.{n}") for n, name in ((1, "a"), (2, "b")))
    ends: list[int] = []
    wire: Wire | None = None
    try:
        for index, host in enumerate(hosts):
            _ip("netns", "add", host.namespace)
            ends.append(_device(host, f"sl{os.getpid() % 10**6}{'ab'[index]}{pair}"))
        wire = Wire((ends[0], ends[1]), seed)
        yield hosts[0], hosts[1], wire
    finally:
        if wire is not None:
            wire.close()
        for end in ends:
            os.close(end)  # the device goes with it
        for host in hosts:
            _remove(host.namespace)


def _device(host: Host, name: str) -> int:
    """A TUN device in the namespace, and the descriptor of its other side."""
    end = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    _ip("link", "set", name, "netns", host.namespace)
    inside = ("-n", host.namespace)
    _ip(*inside, "addr", "add", f"{host.address}/24", "dev", name)
    _ip(*inside, "link", "set", name, "up")
    _ip(*inside, "link", "set", "lo", "up")
    return end


def _remove_stale() -> None:
    """Namespaces of a run that was killed."""
    for path in Path("/run/netns").glob("slipstream-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    if not Path(f"/run/netns/{namespace}").exists():
        return
    listed = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=False)
    for pid in listed.stdout.split():
        subprocess.run(["kill", "-9", pid], capture_output=True, check=False)
    _ip("netns", "del", namespace)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)
