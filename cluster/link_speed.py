"""How fast bytes go from one node to another by TCP, and how long the way takes."""

from __future__ import annotations

import socket
import statistics
import time
from dataclasses import dataclass

_PINGS = 20
_ROUNDS = 3
_BYTES = 2**26
_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Speed:
    """One way."""

    gb_per_s: float
    latency_us: float


class Echo:
    """The far end. `answer` serves one who measures, and returns."""

    def __init__(self, host: str) -> None:
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(_TIMEOUT_S)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]

    def where(self) -> tuple[str, int]:
        return self.address

    def answer(self) -> None:
        """Raises OSError when nobody comes in time, or who came is gone."""
        with self._listener:
            connection, _ = self._listener.accept()
        with connection:
            _prepare(connection)
            for _ in range(_PINGS):
                connection.sendall(_read(connection, 1))
            for _ in range(_ROUNDS):
                _drain(connection, _BYTES)
                connection.sendall(b".")


def measure(address: tuple[str, int]) -> Speed:
    """Of the way to an Echo that answers: the best of some rounds, and half of the median way there and back. Raises
    OSError."""
    payload = bytes(_BYTES)
    with socket.create_connection(address, timeout=_TIMEOUT_S) as connection:
        _prepare(connection)
        trips = [_timed(connection, b".") for _ in range(_PINGS)]
        latency = statistics.median(trips) / 2
        seconds = min(_timed(connection, payload) for _ in range(_ROUNDS)) - latency
    return Speed(_BYTES / seconds / 1e9, latency * 1e6)


def _timed(connection: socket.socket, payload: bytes) -> float:
    """Seconds from the first byte sent to the answer."""
    started = time.perf_counter()
    connection.sendall(payload)
    _read(connection, 1)
    return time.perf_counter() - started


def _prepare(connection: socket.socket) -> None:
    connection.settimeout(_TIMEOUT_S)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _read(connection: socket.socket, count: int) -> bytes:
    found = connection.recv(count)
    if not found:
        raise ConnectionError("the other side is gone")
    return found


def _drain(connection: socket.socket, count: int) -> None:
    buffer = bytearray(2**20)
    while count:
        taken = connection.recv_into(buffer, min(count, len(buffer)))
        if not taken:
            raise ConnectionError("the other side is gone")
        count -= taken
