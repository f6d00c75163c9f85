"""How the kernel paces a connection within a host. Loads no torch."""

from __future__ import annotations

import socket

UNPACED = b"reno"
"""Every Linux has it and lets every process choose it."""


def unpace_within_host(connection: socket.socket) -> None:
    """Where both ends have one address, there is no path to share and no queue to keep short. A congestion control that
    paces by what it measured, such as BBR, then only has the sender wait for timers: that took a third of the rate.
    Between hosts the system's choice stands. Raises OSError if it is not connected."""
    if connection.getsockname()[0] == connection.getpeername()[0]:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, UNPACED)
