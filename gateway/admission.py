"""Who may come in. Nothing is parked: a request has a place at once or is refused.

Also the drain of a shutdown: `close` refuses what comes, `idle` waits for what runs, `end_all` ends what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

from core.errors import Overloaded, SlipstreamError, Unavailable

P = ParamSpec("P")
R = TypeVar("R")

End = Callable[[SlipstreamError], None]
"""Ends a request early with an error."""


class Admission:
    """`capacity` sequences at most. Belongs to one event loop."""

    def __init__(self, capacity: int, retry_after_s: float = 1.0) -> None:
        self._capacity = capacity
        self._retry_after_s = retry_after_s
        self._taken: dict[End, int] = {}
        self._num_taken = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    @property
    def num_in_flight(self) -> int:
        return self._num_taken

    @contextmanager
    def admit(self, places: int, end: End) -> Iterator[None]:
        """Hold `places` for the body. Raises Overloaded when they are not free, Unavailable while draining."""
        if self.draining:
            raise Unavailable("the server is shutting down; retry elsewhere", retry_after=self._retry_after_s)
        if self._num_taken + places > self._capacity:
            raise Overloaded(
                f"{self._num_taken} of {self._capacity} requests in flight; retry later",
                retry_after=self._retry_after_s,
            )
        self._num_taken += places
        self._taken[end] = places
        self._idle.clear()
        try:
            yield
        finally:
            self._num_taken -= self._taken.pop(end)
            if not self._taken:
                self._idle.set()

    def close(self) -> None:
        """Refuse every new request from now on."""
        self.draining = True

    async def idle(self) -> None:
        """Return once no request is in flight."""
        await self._idle.wait()

    def end_all(self, error: SlipstreamError) -> None:
        for end in list(self._taken):
            end(error)


class OneByOne:
    """Work in a thread, one piece after the other; `capacity` pieces at most run or wait. Belongs to one event loop."""

    def __init__(self, capacity: int, retry_after_s: float = 1.0) -> None:
        self._capacity = capacity
        self._retry_after_s = retry_after_s
        self._num_held = 0
        self._turn = asyncio.Lock()

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """work(*args, **kwargs). Raises Overloaded when too many wait."""
        if self._num_held >= self._capacity:
            raise Overloaded(f"{self._num_held} texts are waiting; retry later", retry_after=self._retry_after_s)
        self._num_held += 1
        try:
            async with self._turn:
                return await asyncio.to_thread(work, *args, **kwargs)
        finally:
            self._num_held -= 1
