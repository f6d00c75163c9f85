"""Who is paced by the kernel."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tcp_ends import Taken, serving, taking

from kv_transfer.transports import tcp_io
from kv_transfer.transports.pacing import UNPACED

ALLOWED = Path("/proc/sys/net/ipv4/tcp_allowed_congestion_control").read_text().encode().split()
OTHER = next((name for name in ALLOWED if name != UNPACED), None)


def control(connection: socket.socket) -> bytes:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


@contextmanager
def paced(own_address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """Both ends of a connection to 127.0.0.1 from an address of this host, with another congestion control."""
    assert OTHER is not None
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname(), source_address=(own_address, 0))
        with closing(one), closing(listener.accept()[0]) as two:
            for end in (one, two):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, OTHER)
            yield one, two


@pytest.mark.skipif(OTHER is None, reason="this kernel lets processes choose one congestion control only")
@pytest.mark.parametrize(("own_address", "expected"), [("127.0.0.1", UNPACED), ("127.0.0.2", OTHER)])
def test_nothing_is_paced_within_a_host_and_between_hosts_the_systems_choice_stands(
    own_address: str, expected: bytes
) -> None:
    with paced(own_address) as ends:
        for end in ends:
            tcp_io.prepare(end)
            assert control(end) == expected


@pytest.mark.asyncio(loop_scope="module")
async def test_neither_end_of_a_pull_is_paced(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(taken.job)
        (theirs,) = server._connections
        (ours,) = transport._idle
        assert (control(theirs.socket), control(ours.socket)) == (UNPACED, UNPACED)
