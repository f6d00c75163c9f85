"""How a long pull tells its user where it stands."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["bytes", "steps"]


class Progress(Protocol):
    """One task at a time, in order. `update` may come from any thread; no call may raise."""

    def begin(self, label: str, total: int | None = None, unit: Unit = "steps") -> None:
        """The next task starts and the one before it is done. `total` None: how long it takes is not known."""

    def update(self, done: int, total: int | None = None) -> None:
        """The task at hand has got to `done`, in its unit; `total` replaces the one it began with."""

    def note(self, text: str) -> None:
        """Something the user should know that is not an error."""


class Silent:
    """Progress for callers with no one to tell."""

    def begin(self, label: str, total: int | None = None, unit: Unit = "steps") -> None:
        pass

    def update(self, done: int, total: int | None = None) -> None:
        pass

    def note(self, text: str) -> None:
        pass
