"""In which order workers of some shapes give way to workers of others. A pure decider: who holds devices comes in, how
many workers of each shape there are to be for now goes out; asked again whenever that has changed, it comes to what is
wanted.

Devices are never promised twice: one that a worker holds, as it starts, serves or ends what it has, is not another's.
Workers that are not wanted go when their devices are needed, and as long as it gets on so no more of them than leave
half of the wanted devices at work. Somebody always serves: where that can't be, there is no way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from msgspec import Struct

from placement.worker_shape import WorkerShape

Counts = Mapping[WorkerShape, int]


class Held(Struct, frozen=True, kw_only=True):
    """Workers of a shape that hold devices."""

    serving: int = 0
    starting: int = 0
    unseen: int = 0
    """They are up, and not all gateways know it."""
    leaving: int = 0
    """They end what they have."""


NOBODY = Held()


def ask(wanted: Counts, asked: Counts, held: Mapping[WorkerShape, Held], budget: int) -> dict[WorkerShape, int]:
    """How many workers of each shape to ask for next, where `asked` was asked for last and `budget` devices are for
    all. Stays at `asked` until something has come of it."""
    shapes = sorted({*wanted, *asked, *held})
    having = {shape: held.get(shape, NOBODY) for shape in shapes}
    target = {shape: asked.get(shape, 0) for shape in shapes}
    for shape in shapes:  # of those that are not wanted, who does not serve yet is not waited for
        up = having[shape].serving + having[shape].unseen
        unused = min(target[shape] - wanted.get(shape, 0), target[shape] - up)
        target[shape] -= max(0, unused)
    free = budget - sum(shape.devices * _taking(target[shape], having[shape]) for shape in shapes)
    lacking = {shape: wanted.get(shape, 0) - target[shape] for shape in shapes if wanted.get(shape, 0) > target[shape]}
    started = _startable(lacking, free)
    if started or any(target[shape] != having[shape].serving or having[shape].leaving for shape in shapes):
        return {shape: target[shape] + started.get(shape, 0) for shape in shapes}
    stopped = _stopped(wanted, target, lacking, free)
    return {shape: target[shape] - stopped.get(shape, 0) for shape in shapes}


@dataclass(frozen=True)
class Way:
    """From some shapes to others: so many times workers start, one after the other, and at the worst this `share` of
    the devices that were at work still is."""

    starts: int
    share: float


def way(now: Counts, to: Counts, budget: int) -> Way | None:
    """None if there is none on which somebody always serves."""
    asked, starts = dict(now), 0
    before = at_work = _devices(asked)
    while True:
        then = ask(to, asked, {shape: Held(serving=count) for shape, count in asked.items()}, budget)
        if then == {shape: asked.get(shape, 0) for shape in then}:
            done = all(then.get(shape, 0) == to.get(shape, 0) for shape in {*then, *to})
            return Way(starts, at_work / before if before else 1.0) if done else None
        starts += any(count > asked.get(shape, 0) for shape, count in then.items())
        at_work = min(at_work, _devices({shape: min(count, asked.get(shape, 0)) for shape, count in then.items()}))
        asked = then


def _taking(target: int, held: Held) -> int:
    return max(target, held.serving + held.unseen + held.starting) + held.leaving


def _devices(counts: Counts) -> int:
    return sum(shape.devices * count for shape, count in counts.items())


def _startable(lacking: Counts, free: int) -> dict[WorkerShape, int]:
    """Of those that are lacking, the largest first."""
    found = {}
    for shape in sorted(lacking, key=lambda shape: (shape.devices, shape), reverse=True):
        if count := min(lacking[shape], free // shape.devices):
            found[shape] = count
            free -= count * shape.devices
    return found


def _stopped(wanted: Counts, serving: Counts, lacking: Counts, free: int) -> dict[WorkerShape, int]:
    """How many of each shape end, where all others serve and nobody can start."""
    surplus = {shape: count - wanted.get(shape, 0) for shape, count in serving.items()}
    if not lacking:
        return {shape: count for shape, count in surplus.items() if count > 0}
    going = list(_one_by_one(serving, surplus, -(-_devices(wanted) // 2), smallest_first=True))
    if not _startable(lacking, free + _sum(going)):
        going = list(_one_by_one(serving, surplus, 1, smallest_first=False))
    while going and _startable(lacking, free + _sum(going[:-1])) == _startable(lacking, free + _sum(going)):
        going.pop()
    return {shape: going.count(shape) for shape in going}


def _one_by_one(serving: Counts, surplus: Counts, least: int, *, smallest_first: bool) -> Iterator[WorkerShape]:
    """Workers that can go, so that `least` devices stay at work."""
    left = _devices(serving)
    for shape in sorted(surplus, key=lambda shape: (shape.devices, shape), reverse=not smallest_first):
        for _ in range(surplus[shape]):
            if left - shape.devices >= least:
                left -= shape.devices
                yield shape


def _sum(shapes: list[WorkerShape]) -> int:
    return sum(shape.devices for shape in shapes)
