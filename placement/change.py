"""What replanning says."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from placement.arrangement import Arrangement


class Change(Struct, frozen=True, kw_only=True):
    """Use the workers as `to` says. `before` and `after`: attainment that is predicted without the change and with it.
    Over the horizon `gain` more requests meet their targets, and up to `cost` fewer while it is carried out."""

    to: Arrangement
    by: Literal["reactive", "predictive"]
    why: str
    gain: float
    cost: float
    before: float
    after: float
