"""The start-up checklist: one line per step, with how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from cluster.signals import Stopped


class Line:
    """The step under way; set `note` to what is worth knowing once it is done."""

    def __init__(self) -> None:
        self.note = ""


class Checklist:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()

    @contextmanager
    def step(self, title: str) -> Iterator[Line]:
        line, started = Line(), time.monotonic()
        try:
            with self._console.status(title):
                yield line
        except BaseException as error:
            note = "stopped" if isinstance(error, (Stopped, KeyboardInterrupt)) else line.note
            self._print("[red]✗[/red]", title, note, started)
            raise
        self._print("[green]✓[/green]", title, line.note, started)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def _print(self, mark: str, title: str, note: str, started: float) -> None:
        took = f"{time.monotonic() - started:6.1f} s"
        self._console.print(f" {mark} {title:<22}{took}  [dim]{note}[/dim]", highlight=False, soft_wrap=True)
