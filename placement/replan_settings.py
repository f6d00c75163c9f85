"""How replanning is done: its targets, its pace, and how far it may go."""

from __future__ import annotations

import math

from msgspec import Struct

from core.errors import ConfigError
from placement.goodput import Goal
from placement.worker_shape import WorkerShape


class ReplanSettings(Struct, frozen=True, kw_only=True):
    """Raises ConfigError for what can't be, by field."""

    goal: Goal
    chunk_tokens: tuple[int, ...]
    """Sizes of steps that may be chosen, ascending."""
    least_workers: int = 1
    """In each role that is used at all."""
    most_workers: int = 0
    """In all; 0 keeps their number as it is. Where there are shapes: 0 keeps all devices in use."""
    shapes: tuple[WorkerShape, ...] = ()
    """Of workers, that may be chosen; none keeps the one that there is."""
    devices: int = 0
    """For all workers, where there are shapes."""
    ending_s: float = 30.0
    """That a worker which is to stop is given to end what it has."""
    reactive_s: float = 5.0
    """Between two looks at queues and attainment."""
    recent_s: float = 20.0
    """Of which these looks take the attainment."""
    predictive_s: float = 30.0
    """Between two forecasts."""
    window_s: float = 300.0
    """Of which the forecast takes requests, at most back to the last change in traffic."""
    horizon_s: float = 120.0
    """Over which a change has to gain more than it costs."""
    settle_s: float = 15.0
    """After a change, until the next."""
    margin: float = 0.05
    """Of attainment, that a change has to gain at the least."""
    startup_s: float = 60.0
    """Until a new worker serves."""
    spare: float = 1.2
    """Times the expected rate that fewer workers have to stand before one is given up, and that decides between changes
    that are about as good at the rate itself."""

    @staticmethod
    def paced(
        interval_s: float,
        *,
        goal: Goal,
        chunk_tokens: tuple[int, ...],
        horizon_s: float,
        least_workers: int,
        most_workers: int,
        shapes: tuple[WorkerShape, ...] = (),
        devices: int = 0,
        ending_s: float = 30.0,
    ) -> ReplanSettings:
        """With all times that are a matter of pace in the proportions of the defaults."""
        return ReplanSettings(
            goal=goal,
            chunk_tokens=chunk_tokens,
            least_workers=least_workers,
            most_workers=most_workers,
            shapes=shapes,
            devices=devices,
            ending_s=ending_s,
            reactive_s=interval_s,
            recent_s=4 * interval_s,
            predictive_s=6 * interval_s,
            window_s=60 * interval_s,
            settle_s=3 * interval_s,
            horizon_s=horizon_s,
        )

    def devices_of(self, used: int) -> tuple[int, int]:
        """That a change takes at the least and at the most, where `used` are used now."""
        if not self.most_workers:
            most = self.devices if self.shapes else used
            return most, most
        return used, max(used, self.devices if self.shapes else self.most_workers)

    def __post_init__(self) -> None:
        for name in ("reactive_s", "recent_s", "predictive_s", "window_s", "horizon_s", "spare"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"replan: {name} is {getattr(self, name)}, not above 0", param=name)
        for name in ("settle_s", "startup_s", "ending_s", "most_workers", "devices"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"replan: {name} is {getattr(self, name)}, not 0 or more", param=name)
        if not 0 < self.margin < 1:
            raise ConfigError(f"replan: margin is {self.margin}, not between 0 and 1", param="margin")
        if self.least_workers < 1:
            raise ConfigError(f"replan: least_workers is {self.least_workers}, not 1 or more", param="least_workers")
        if not self.chunk_tokens or list(self.chunk_tokens) != sorted(set(self.chunk_tokens)):
            raise ConfigError(f"replan: chunk_tokens is {self.chunk_tokens}, not sizes that ascend")
