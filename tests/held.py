"""A worker whose steps wait until a test says so."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import pytest

from engine.step import Runner, StepBatch, StepOutput

TIMEOUT_S = 60.0


class Held:
    """From here on no step of the runner is computed before `go_on` is set. `begun`: one is waiting for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, runner: Runner) -> None:
        self.begun, self.go_on, submit = threading.Event(), threading.Event(), runner.submit

        def held_up(batch: StepBatch) -> Future[StepOutput]:
            self.begun.set()
            assert self.go_on.wait(TIMEOUT_S)
            return submit(batch)

        monkeypatch.setattr(runner, "submit", held_up)
