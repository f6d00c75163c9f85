"""Workers that compute beside the one that is measured, as they do when several serve on one machine: they share its
memory bandwidth and caches. Each is a process of its own that runs the same steps over and over."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.profiling.steps import Stepper
from cluster.config.engine import EngineSection
from cluster.worker import load_runner
from core.errors import ConfigError
from placement.grid import Shape

_READY = "ready\n"


class Work(msgspec.Struct):
    folder: str
    engine: dict[str, object]
    threads: int
    shapes: list[Shape]


class Neighbours:
    """They stand still until they are told to compute."""

    def __init__(self, processes: Sequence[subprocess.Popen[str]]) -> None:
        self._processes = processes

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While this is open."""
        for process in self._processes:
            process.send_signal(signal.SIGCONT)
        yield
        self.stand_still()

    def stand_still(self) -> None:
        for process in self._processes:
            process.send_signal(signal.SIGSTOP)


@contextmanager
def neighbours(count: int, work: Work) -> Iterator[Neighbours]:
    """They are there while this is open, and stand still. Raises ConfigError if one does not come up."""
    command = [sys.executable, "-m", "bench.profiling.neighbours", msgspec.json.encode(work).decode()]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]  # noqa: S603
    try:
        for process in started:
            if process.stdout is None or process.stdout.readline() != _READY:
                raise ConfigError("--beside: a worker beside the measured one ended before it was ready; see above")
        found = Neighbours(started)
        found.stand_still()
        yield found
    finally:
        for process in started:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def main() -> None:
    """Until whoever started this is gone, or kills it."""
    parent, work = os.getppid(), msgspec.json.decode(sys.argv[1], type=Work)
    runner = load_runner(Path(work.folder), EngineSection.model_validate(work.engine), work.threads)
    stepper, chosen = Stepper(runner), random.Random(os.getpid())
    sys.stdout.write(_READY)
    sys.stdout.flush()
    while os.getppid() == parent:
        stepper.seconds(chosen.choice(work.shapes))


if __name__ == "__main__":
    main()
