"""Workers that compute beside the one that is measured, as they do when several serve on one machine: they share its
memory bandwidth and caches. Each is a process of its own that runs the same steps over and over."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec

from bench.processes import Module, Process, running
from bench.profiling.steps import Stepper
from cluster.config.engine import EngineSection
from cluster.worker import load_runner
from placement.grid import Shape


class Work(msgspec.Struct):
    folder: str
    engine: dict[str, object]
    threads: int
    shapes: list[Shape]


class Neighbours:
    """They stand still until they are told to compute."""

    def __init__(self, processes: Sequence[Process]) -> None:
        self._processes = processes

    @contextmanager
    def computing(self) -> Iterator[None]:
        """While this is open."""
        for process in self._processes:
            process.signal(signal.SIGCONT)
        yield
        self.stand_still()

    def stand_still(self) -> None:
        for process in self._processes:
            process.signal(signal.SIGSTOP)


@contextmanager
def neighbours(count: int, works: Sequence[Work]) -> Iterator[list[Neighbours]]:
    """So many for each of the works. They are there while this is open, and stand still. Raises ConfigError if one does
    not come up."""
    told = "--beside: a worker beside the measured one"
    asked = [Module("bench.profiling.neighbours", msgspec.json.encode(work).decode(), told) for work in works]
    with running([module for module in asked for _ in range(count)], end_s=0.0) as started:
        found = [Neighbours(started[n * count : (n + 1) * count]) for n in range(len(works))]
        for some in found:
            some.stand_still()
        yield found


def main() -> None:
    """Until whoever started this is gone, or kills it."""
    parent, work = os.getppid(), msgspec.json.decode(sys.argv[1], type=Work)
    runner = load_runner(Path(work.folder), EngineSection.model_validate(work.engine), work.threads)
    stepper, chosen = Stepper(runner), random.Random(os.getpid())
    print("ready", flush=True)
    while os.getppid() == parent:
        stepper.seconds(chosen.choice(work.shapes))


if __name__ == "__main__":
    main()
