"""Visits the states of a world (handoff_world.py), or walks through them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator

from handoff_world import World


def walk(start: World, *names: str) -> list[World]:
    """The worlds passed on the way of these moves, `start` included."""
    worlds = [start]
    for name in names:
        worlds.append(next(after for move, after in worlds[-1].moves() if move.startswith(name)))
    return worlds


Step = tuple[World, tuple[str, ...]]
"""A world and the moves that led to it."""


class Explorer:
    """Judges worlds, each once."""

    def __init__(self) -> None:
        self._seen: set[tuple[object, ...]] = set()
        self._ended: set[tuple[object, ...]] = set()

    def explore(self, starts: Iterable[World], depth: int) -> int:
        """Visit every state within `depth` moves of `starts`, nearest first; returns how many there were. An
        AssertionError carries the moves that led to it."""
        gc.disable()  # nothing here is cyclic, and looking for cycles takes half of the time
        try:
            frontier: list[Step] = [(start, ()) for start in starts if self._is_new(start, ())]
            for _ in range(depth):
                frontier = [new for world, path in frontier for new in self._after(world, path)]
        finally:
            gc.enable()
        return len(self._seen)

    def wander(self, start: World, steps: int, choose: Callable[[list[Step]], Step]) -> None:
        """One run, `choose` picking among the worlds that may follow."""
        world, path = start, ()
        for _ in range(steps):
            following = [(after, (*path, name)) for name, after in _moves(world, path)]
            if not following:
                return
            world, path = choose(following)
            self._is_new(world, path)

    def _after(self, world: World, path: tuple[str, ...]) -> Iterator[Step]:
        for name, after in _moves(world, path):
            if self._is_new(after, trace := (*path, name)):
                yield after, trace

    def _is_new(self, world: World, trace: tuple[str, ...]) -> bool:
        """Whether it was not seen before; if so its laws hold."""
        if (key := world.key()) in self._seen:
            return False
        self._seen.add(key)
        try:
            world.check()
            alone = world.alone()
            if (end := alone.key()) not in self._ended:
                self._ended.add(end)
                alone.wind_down()
        except AssertionError as error:
            raise AssertionError(f"{error}, after: " + "; ".join(trace)) from error
        return True


def _moves(world: World, path: tuple[str, ...]) -> Iterator[tuple[str, World]]:
    try:
        yield from world.moves()
    except AssertionError as error:
        raise AssertionError(f"{error}, a move after: " + "; ".join(path)) from error
