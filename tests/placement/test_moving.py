"""Workers of one shape give way to workers of another: in every order of events devices are held once only, somebody
serves, and what is wanted comes about."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from core.errors import ConfigError
from placement.moving import Held, Way, ask, way
from placement.worker_shape import WorkerShape, parse_shapes

ONE, TWO, STAGES = WorkerShape(1, 1), WorkerShape(2, 1), WorkerShape(1, 2)
FOUR = WorkerShape(4, 1)

Counts = dict[WorkerShape, int]


class State(NamedTuple):
    """What was asked for, and who is there."""

    asked: tuple[tuple[WorkerShape, int], ...]
    held: tuple[tuple[WorkerShape, Held], ...]
    deaths: int


def state(asked: Counts, held: dict[WorkerShape, Held], deaths: int) -> State:
    return State(tuple(sorted(asked.items())), tuple(sorted(held.items())), deaths)


def devices(held: dict[WorkerShape, Held]) -> int:
    return sum(shape.devices * (one.serving + one.unseen + one.starting + one.leaving) for shape, one in held.items())


def events(at: State) -> Iterator[State]:
    """Whatever a cluster that was asked so may do next: it begins a worker or stops one; one is up, is seen to be,
    has ended, or dies."""
    asked, held = dict(at.asked), dict(at.held)
    for shape, one in held.items():
        there, target = one.serving + one.unseen + one.starting, asked.get(shape, 0)
        if there < target:
            yield state(asked, held | {shape: replace(one, starting=one.starting + 1)}, at.deaths)
        if there > target and one.starting:
            yield state(asked, held | {shape: replace(one, starting=one.starting - 1)}, at.deaths)
        elif there > target and one.unseen:
            yield state(asked, held | {shape: replace(one, unseen=one.unseen - 1, leaving=one.leaving + 1)}, at.deaths)
        elif there > target:
            yield state(
                asked, held | {shape: replace(one, serving=one.serving - 1, leaving=one.leaving + 1)}, at.deaths
            )
        if one.starting:
            up = replace(one, starting=one.starting - 1, unseen=one.unseen + 1)
            yield state(asked, held | {shape: up}, at.deaths)
        if one.unseen:
            seen = replace(one, unseen=one.unseen - 1, serving=one.serving + 1)
            yield state(asked, held | {shape: seen}, at.deaths)
        if one.leaving:
            yield state(asked, held | {shape: replace(one, leaving=one.leaving - 1)}, at.deaths)
        if one.serving and at.deaths:
            yield state(asked, held | {shape: replace(one, serving=one.serving - 1)}, at.deaths - 1)


def fitting(budget: int, shapes: tuple[WorkerShape, ...]) -> list[Counts]:
    every = product(*(range(budget // shape.devices + 1) for shape in shapes))
    found = [dict(zip(shapes, counts, strict=True)) for counts in every]
    return [one for one in found if 0 < sum(shape.devices * count for shape, count in one.items()) <= budget]


def explored(now: Counts, to: Counts, budget: int, deaths: int) -> tuple[set[State], set[State]]:
    """All states that can come about, and those of them in which nothing more happens. Whoever is asked may be asked
    late: the cluster goes on meanwhile, so a state may be left by an event or by the next question."""
    first = state(now, {shape: Held(serving=now.get(shape, 0)) for shape in {*now, *to}}, deaths)
    seen, todo, last = {first}, [first], set()
    while todo:
        at = todo.pop()
        held = dict(at.held)
        asked = ask(to, dict(at.asked), held, budget)
        again = state(asked, held, at.deaths)
        following = [again] if again != at else []
        following += events(at)
        if not [one for one in following if one.deaths == at.deaths]:
            last.add(at)
        new = [one for one in following if one not in seen]
        seen.update(new)
        todo += new
    return seen, last


@pytest.mark.parametrize(
    ("budget", "shapes"), [(3, (ONE, TWO)), (4, (ONE, TWO)), (4, (TWO, STAGES)), (5, (ONE, FOUR)), (6, (TWO, FOUR))]
)
def test_in_every_order_of_events_the_wanted_come_about_within_the_budget_and_somebody_serves(
    budget: int, shapes: tuple[WorkerShape, ...]
) -> None:
    for now, to in product(fitting(budget, shapes), repeat=2):
        if way(now, to, budget) is None:
            continue
        states, ends = explored(now, to, budget, deaths=0)
        assert all(devices(dict(at.held)) <= budget for at in states), (now, to)
        assert all(any(one.serving for one in dict(at.held).values()) for at in states), (now, to)
        wanted = {shape: Held(serving=to.get(shape, 0)) for shape in shapes}
        assert [dict(at.held) for at in ends] == [wanted], (now, to)


@pytest.mark.parametrize(("budget", "shapes"), [(3, (ONE, TWO)), (4, (ONE, TWO)), (4, (TWO, STAGES))])
def test_a_death_in_the_middle_exceeds_no_budget_and_what_is_wanted_still_comes_about(
    budget: int, shapes: tuple[WorkerShape, ...]
) -> None:
    for now, to in product(fitting(budget, shapes), repeat=2):
        if way(now, to, budget) is None:
            continue
        states, ends = explored(now, to, budget, deaths=1)
        assert all(devices(dict(at.held)) <= budget for at in states), (now, to)
        wanted = {shape: Held(serving=to.get(shape, 0)) for shape in shapes}
        assert all(dict(at.held) == wanted for at in ends), (now, to)


@pytest.mark.parametrize(
    ("now", "to", "budget", "expected"),
    [
        ({ONE: 4}, {TWO: 2}, 4, Way(starts=2, share=0.5)),
        ({ONE: 3}, {TWO: 1}, 3, Way(starts=1, share=1 / 3)),
        ({TWO: 1}, {ONE: 3}, 3, Way(starts=2, share=0.5)),
        ({ONE: 2}, {TWO: 1}, 4, Way(starts=1, share=1.0)),
        ({ONE: 2}, {TWO: 1}, 2, None),
        ({TWO: 1}, {STAGES: 1}, 2, None),
        ({ONE: 4}, {FOUR: 1}, 4, None),
        ({ONE: 5}, {FOUR: 1}, 5, Way(starts=1, share=0.2)),
        ({ONE: 2}, {ONE: 2}, 2, Way(starts=0, share=1.0)),
        ({ONE: 2}, {ONE: 1}, 2, Way(starts=0, share=0.5)),
    ],
)
def test_a_way_tells_how_long_it_takes_and_what_it_leaves_at_work(
    now: Counts, to: Counts, budget: int, expected: Way | None
) -> None:
    assert way(now, to, budget) == expected


def test_a_large_cluster_moves_half_at_a_time() -> None:
    found = way({ONE: 64}, {TWO: 32}, 64)
    assert found == Way(starts=2, share=0.5)


def test_who_starts_and_is_no_longer_wanted_is_not_waited_for() -> None:
    held = {ONE: Held(serving=2), TWO: Held(starting=1)}
    assert ask({ONE: 4}, {ONE: 2, TWO: 1}, held, 4) == {ONE: 2, TWO: 0}
    assert ask({ONE: 4}, {ONE: 2, TWO: 0}, held, 4) == {ONE: 2, TWO: 0}, "its devices are not free yet"
    assert ask({ONE: 4}, {ONE: 2, TWO: 0}, {ONE: Held(serving=2)}, 4) == {ONE: 4, TWO: 0}


def test_who_serves_is_not_stopped_before_every_gateway_knows_another() -> None:
    up = {ONE: Held(serving=1), TWO: Held(unseen=1)}
    assert ask({TWO: 1}, {ONE: 1, TWO: 1}, up, 3) == {ONE: 1, TWO: 1}
    assert ask({TWO: 1}, {ONE: 1, TWO: 1}, up | {TWO: Held(serving=1)}, 3) == {ONE: 0, TWO: 1}
    new_gateway = {ONE: Held(unseen=1), TWO: Held(starting=1)}
    assert ask({TWO: 1}, {ONE: 1, TWO: 1}, new_gateway, 3) == {ONE: 1, TWO: 1}, "it knows nobody yet"


def test_shapes_are_read_as_tp_and_pp() -> None:
    assert parse_shapes("1x1, 2x1,1x2") == (ONE, TWO, STAGES)
    for text, message in (("2", "'2' is no TP and PP"), ("0x1", "is no TP"), ("1x1,1x1", "1x1 is named twice")):
        with pytest.raises(ConfigError, match=message):
            parse_shapes(text)
