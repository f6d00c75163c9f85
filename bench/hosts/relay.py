"""Two hosts in network namespaces, and the wire between them: a relay in user space that delays, throttles, drops or is
cut. Every end of the wire is a TUN device that lives in one namespace while its packets are read and written here, so
loss and delay happen to IP packets and the kernel's TCP deals with them, whether it has netem or not. Needs root.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from bench.hosts import namespaces
from bench.hosts.namespaces import Host, bring_up, device_name, must, two_namespaces

_TUN = "/dev/net/tun"
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_PACKET_BYTES = 1 << 16
QUEUE_S = 0.5
"""A throttled wire drops what would wait longer, as a router with a short queue does."""


@dataclass(frozen=True)
class Condition:
    """What the wire does to a packet, in each direction."""

    delay_s: float = 0.0
    bytes_per_s: float = float("inf")
    loss: float = 0.0
    cut: bool = False


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


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    return namespaces.missing() or ("" if os.access(_TUN, os.R_OK | os.W_OK) else f"needs {_TUN}")


@contextmanager
def two_hosts(seed: int = 0, *, mtu: int = 1500) -> Iterator[tuple[Host, Host, Wire]]:
    """Made, and removed in any case, with every process that is still in them. `mtu`: bytes of a packet, at most; the
    relay's work is by the packet."""
    with two_namespaces() as hosts:
        ends: list[int] = []
        wire: Wire | None = None
        try:
            ends.extend(_device(host, mtu) for host in hosts)
            wire = Wire((ends[0], ends[1]), seed)
            yield *hosts, wire
        finally:
            if wire is not None:
                wire.close()
            for end in ends:
                os.close(end)  # the device goes with it


def _device(host: Host, mtu: int) -> int:
    """A TUN device in the namespace, and the descriptor of its other side."""
    end, name = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC), device_name(host)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TUN | _IFF_NO_PI))
    must("ip", "link", "set", name, "mtu", str(mtu))
    bring_up(host, name)
    return end
