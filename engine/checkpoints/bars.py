"""Progress bars on a terminal; one line per task where standard error is a file or a pipe."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from engine.checkpoints.progress import Unit


class _Amount(ProgressColumn):
    """Bytes as bytes, steps as steps, and nothing for a task of unknown length."""

    def __init__(self) -> None:
        super().__init__()
        self._columns: dict[str, ProgressColumn] = {"bytes": DownloadColumn(), "steps": MofNCompleteColumn()}

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None else Text(str(self._columns[task.fields["unit"]].render(task)))


class Bars:
    """`Progress` for people: `with Bars() as progress: resolve(model, progress=progress)`."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True)
        self._live = self._console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeElapsedColumn())
        self._bars = RichProgress(*columns, console=self._console)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._live:
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if kind is None:
            self._finish()
        if self._live:
            self._bars.stop()

    def begin(self, label: str, total: int | None = None, unit: Unit = "steps") -> None:
        if not self._live:
            self._console.print(label, markup=False, highlight=False, soft_wrap=True)
            return
        self._finish()
        self._task = self._bars.add_task(label, total=total, unit=unit)

    def update(self, done: int, total: int | None = None) -> None:
        if self._task is not None:
            self._bars.update(self._task, completed=done, total=total)

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _finish(self) -> None:
        if self._task is None:
            return
        total = self._bars.tasks[self._task].total
        self._bars.update(self._task, completed=1 if total is None else total, total=total or 1)
        self._bars.stop_task(self._task)
        self._task = None
