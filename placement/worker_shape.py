"""How the devices of one worker are used: what replanning may change of a worker only by starting another."""

from __future__ import annotations

import re

from msgspec import Struct

from core.errors import ConfigError

_MOST = 1024


class WorkerShape(Struct, frozen=True, order=True):
    """Its stages, each on `tp` devices; on a CPU a device is what a process computes on, whatever its threads."""

    tp: int
    pp: int

    @property
    def devices(self) -> int:
        return self.tp * self.pp

    def __str__(self) -> str:
        return f"{self.tp}x{self.pp}"


def devices_of(shape: WorkerShape | None) -> int:
    """Of a worker; where shapes don't change, None, each counts as one."""
    return 1 if shape is None else shape.devices


def parse_shapes(text: str) -> tuple[WorkerShape, ...]:
    """ "1x1,2x1" is TP 1 and TP 2, each with PP 1. Raises ConfigError."""
    found = tuple(map(_parse, text.split(",")))
    if twice := [shape for shape in found if found.count(shape) > 1]:
        raise ConfigError(f"{twice[0]} is named twice", param="shapes")
    return found


def _parse(part: str) -> WorkerShape:
    match = re.fullmatch(r"\s*([0-9]{1,4})x([0-9]{1,4})\s*", part)
    sizes = (0, 0) if match is None else (int(match[1]), int(match[2]))
    if not all(1 <= size <= _MOST for size in sizes):
        raise ConfigError(f"{part.strip()!r} is no TP and PP; write them as 1x1,2x1", param="shapes")
    return WorkerShape(*sizes)
