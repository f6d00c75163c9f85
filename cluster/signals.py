"""How a signal stops the launcher: at once while nothing runs that needs an orderly end, in order afterwards."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """A signal asked to stop before the server was ready."""


class Stop:
    """Set by the first SIGINT, SIGTERM or SIGHUP. It interrupts at once unless `in_order`; a second one always does."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._ignored = {number for number in SIGNALS if signal.getsignal(number) is signal.SIG_IGN}
        self.in_order = False
        self.signum = signal.SIGINT

    def install(self) -> None:
        """Take the signals; again after a library has put its own handlers there. Under nohup SIGHUP stays ignored."""
        for number in SIGNALS:
            if number is not signal.SIGHUP or number not in self._ignored:
                signal.signal(number, self._handle)

    def check(self) -> None:
        """Raises Stopped once a signal has come."""
        if self._event.is_set():
            raise Stopped

    def wait(self, seconds: float) -> bool:
        return self._event.wait(seconds)

    @property
    def exit_status(self) -> int:
        """What a shell reports for a process that ended by the signal."""
        return 128 + self.signum

    def _handle(self, number: int, _frame: object) -> None:
        second = self._event.is_set()
        self.signum = signal.Signals(number)
        self._event.set()
        if second or not self.in_order:
            raise KeyboardInterrupt


@contextmanager
def stop_signals() -> Iterator[Stop]:
    """A Stop with its handlers in place; those from before come back at the end."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stop = Stop()
    stop.install()
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
