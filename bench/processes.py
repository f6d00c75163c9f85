"""Processes of our own that something is measured with. Several are started at the same time, as each takes seconds to
load what it needs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import IO

from core.errors import ConfigError

_END_S = 20.0


@dataclass(frozen=True)
class Module:
    """`python -m name argument`, which prints a line once it is ready, and ends when its standard input does or is
    killed. `told`: what it is called in an error."""

    name: str
    argument: str
    told: str
    environment: Mapping[str, str] = field(default_factory=dict)


class Process:
    """It runs."""

    def __init__(self, module: Module) -> None:
        command = [sys.executable, "-m", module.name, module.argument]
        environment, pipe = os.environ | module.environment, subprocess.PIPE
        self._told = module.told
        self._popen = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)  # noqa: S603
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._stdin: IO[str] = self._popen.stdin
        self._stdout: IO[str] = self._popen.stdout
        self.ready = ""
        """The line it printed."""

    def wait_ready(self) -> None:
        """Raises ConfigError if it ends before it is."""
        self.ready = self._stdout.readline().strip()
        if not self.ready:
            raise ConfigError(f"{self._told} ended before it was ready; see above")

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def close(self) -> None:
        """Have it end."""
        self._stdin.close()

    def end(self, within_s: float) -> None:
        """Wait for it, and kill it if it takes longer."""
        try:
            self._popen.wait(within_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
        self._stdout.close()


@contextmanager
def running(modules: Sequence[Module], end_s: float = _END_S) -> Iterator[list[Process]]:
    """All of them, ready. They end with this; what has not ended `end_s` after it was told to is killed. Raises
    ConfigError if one does not come up."""
    started: list[Process] = []
    try:
        started.extend(map(Process, modules))
        for process in started:
            process.wait_ready()
        yield started
    finally:
        for process in started:
            process.close()
        ends = time.monotonic() + end_s
        for process in started:
            process.end(max(0.0, ends - time.monotonic()))
