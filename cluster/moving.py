"""Workers of some shapes give way to workers of others, one step a second: what is there is asked, and what is to be
there next is said. A new controller sees all of it again, and goes on where the last was."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from msgspec.structs import replace

from placement.moving import NOBODY, Held, ask
from placement.worker_shape import WorkerShape


class Fleet(Protocol):
    """Workers by shape, wherever they run."""

    async def held(self) -> Mapping[WorkerShape, Held]:
        """Who holds devices. Raises Unavailable."""
        ...

    async def ask(self, counts: Mapping[WorkerShape, int]) -> None:
        """Have so many of each shape from now on, without waiting for them; one that is too many ends what it has
        before it goes. Raises Unavailable."""
        ...


class Moving:
    """`budget`: devices for all."""

    def __init__(self, fleet: Fleet, budget: int) -> None:
        self._fleet, self._budget = fleet, budget
        self._asked: dict[WorkerShape, int] | None = None
        self._since: dict[WorkerShape, float] = {}
        """When more of a shape were asked for than serve."""

    async def step(self, wanted: Mapping[WorkerShape, int], now: float, seen: Mapping[WorkerShape, int]) -> list[float]:
        """At a monotonic `now`. `seen`: how many every gateway knows; nobody stops before all are seen. Returns what
        starts took that have ended since the last step, seconds. Raises Unavailable."""
        held = {shape: _known(one, seen.get(shape, 0)) for shape, one in (await self._fleet.held()).items()}
        if not any(seen.values()):  # nor has a new controller heard of the plan then
            await self._fleet.ask(self._asked or {})
            return []
        if self._asked is None:
            self._asked = {shape: one.serving + one.unseen + one.starting for shape, one in held.items()}
        before, self._asked = self._asked, ask(wanted, self._asked, held, self._budget)
        await self._fleet.ask(self._asked)
        for shape, count in self._asked.items():
            if count > before.get(shape, 0):
                self._since[shape] = now
            elif count < before.get(shape, 0):
                self._since.pop(shape, None)
        up = [shape for shape in self._since if held.get(shape, NOBODY).serving >= self._asked.get(shape, 0)]
        return [now - self._since.pop(shape) for shape in up if self._since[shape] < now]


def _known(held: Held, seen: int) -> Held:
    known = min(held.serving, seen)
    return replace(held, serving=known, unseen=held.serving - known)
