"""What is said of errors that come from elsewhere."""

from __future__ import annotations

import errno
import socket

import pytest

from core.errors import said_by_system


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connect call failed ('127.0.0.1', 1)"), "Connection refused"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known"),
        (OSError("Multiple exceptions: [Errno 111], [Errno 101]"), "Multiple exceptions: [Errno 111], [Errno 101]"),
    ],
)
def test_the_words_are_those_of_the_system(error: OSError, said: str) -> None:
    assert said_by_system(error) == said
