"""The processes of a group, as the leader starts and ends them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

from engine.parallel.split import Split
from engine.parallel.wire import Channel

_GRACE_S = 2.0
"""How long a rank that has lost its leader may take to end."""


class RankProcess:
    """One rank and the channel to it. Nobody but its leader holds the other end: when the leader dies, so does it."""

    def __init__(self, split: Split, *, threads: int, keep: Sequence[int] = ()) -> None:
        """`keep`: descriptors that the process gets too, with the numbers they have here."""
        self.split = split
        own, other = socket.socketpair()
        with other:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "engine.parallel.rank", str(other.fileno())],
                pass_fds=(other.fileno(), *keep),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path()},
                start_new_session=True,  # Ctrl-C is the leader's to hear
            )
        self.channel = Channel(own)

    def __str__(self) -> str:
        return f"rank {self.split.rank} (tp {self.split.tp_rank}, pp {self.split.pp_rank})"

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_end(self, seconds: float) -> str | None:
        """How it has ended, None if it is still there after so long."""
        with suppress(subprocess.TimeoutExpired):
            status = self._process.wait(seconds)
            return f"was killed by signal {-status}" if status < 0 else f"has ended with status {status}"
        return None

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        """Hang up and wait until the process is gone."""
        self.channel.close()
        if self.wait_end(_GRACE_S) is None:
            self._process.kill()
            self._process.wait()


def _python_path() -> str:
    """So that the rank finds our packages where we did."""
    return os.pathsep.join(path or os.getcwd() for path in sys.path)
