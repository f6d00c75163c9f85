"""What the machine can do without Slipstream: the bare loops that transports are measured against."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

from bench.hosts.namespaces import LOOPBACK, Host
from kv_transfer.transports.pacing import unpace_within_host


def tcp_loop_rate(
    nbytes: int = 8 << 20,
    rounds: int = 24,
    sender_host: Host = LOOPBACK,
    own_host: Host = LOOPBACK,
    *,
    paced: bool = False,
) -> float:
    """Bytes per second of `sendall` in one process and `recv_into` in another, by default over loopback, from one
    buffer into one buffer of `nbytes`, `rounds` times. Connecting and the first round are not counted. As of the
    transport, the kernel paces it between hosts only, unless it is `paced`: as the system has it for any socket."""
    with socket.create_server((own_host.address, 0)) as listener:
        port = listener.getsockname()[1]
        arguments = [own_host.address, str(port), str(nbytes), str(rounds), str(int(paced))]
        command = sender_host.command(sys.executable, "-m", "bench.transfer.baselines", *arguments)
        with subprocess.Popen(command, cwd=Path(__file__).parents[2]) as sender:  # noqa: S603  this very module
            try:
                listener.settimeout(30)
                connection, _ = listener.accept()
                with connection:
                    return _receive(connection, nbytes, rounds)
            finally:
                sender.kill()


def _receive(connection: socket.socket, nbytes: int, rounds: int) -> float:
    buffer = memoryview(bytearray(nbytes))
    started = 0.0
    for done in range(rounds):
        if done == 1:
            started = time.perf_counter()
        received = 0
        while received < nbytes:
            more = connection.recv_into(buffer[received:])
            if not more:
                raise ConnectionError("the sending process has ended early")
            received += more
    return nbytes * (rounds - 1) / (time.perf_counter() - started)


def _send(address: str, port: int, nbytes: int, rounds: int, paced: int) -> None:
    buffer = bytearray(nbytes)
    with socket.create_connection((address, port)) as connection:
        if not paced:
            unpace_within_host(connection)
        for _ in range(rounds):
            connection.sendall(buffer)
        connection.recv(1)  # until the other end has read it all


if __name__ == "__main__":
    _send(sys.argv[1], *map(int, sys.argv[2:]))
