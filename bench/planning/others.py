"""What processes of others do on this machine while something is measured."""

from __future__ import annotations

import contextlib
import time

import psutil

_LOOK_S = 0.5
_PATIENCE_S = 60.0


class Others:
    """From when it is made."""

    def __init__(self) -> None:
        self._began, self._busy_s, self._ours = time.monotonic(), _busy_s(), _ours()

    def cores(self) -> float:
        """Processor seconds per second that neither this process nor one that it has started took. Those of a process
        that has ended meanwhile count as others'."""
        ours = sum(seconds - self._ours.get(pid, 0.0) for pid, seconds in _ours().items())
        taken = _busy_s() - self._busy_s - ours
        return max(0.0, taken / (time.monotonic() - self._began))


def wait_for_others(most_cores: float) -> float:
    """Until they take no more than that for half a second, or a minute has passed. How many seconds that took, less the
    first look."""
    began, waited = time.monotonic(), 0.0
    while waited < _PATIENCE_S:
        others = Others()
        time.sleep(_LOOK_S)
        if others.cores() <= most_cores:
            break
        waited = time.monotonic() - began
    return waited


def _busy_s() -> float:
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0))


def _ours() -> dict[int, float]:
    """Processor seconds so far, by process."""
    found = {}
    this = psutil.Process()
    for process in [this, *this.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            found[process.pid] = times.user + times.system
    return found
