"""What may be spent on learning from steps that nobody drafted for: a small share of their time."""

from __future__ import annotations

SHARE = 0.005


class Allowance:
    """In seconds. It may be overdrawn by what is spent at a time, and then there is nothing until that is earned."""

    def __init__(self) -> None:
        self._owed = 0.0

    @property
    def left(self) -> bool:
        return self._owed <= 0.0

    def earn(self, seconds: float) -> None:
        """By the time of a step. Nothing is saved up."""
        self._owed = max(0.0, self._owed - SHARE * seconds)

    def spend(self, seconds: float) -> None:
        self._owed += seconds
