"""Every order in which workers of a small cluster announce themselves, die, leave, come, and plans change."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator

import pytest

from cluster.membership import MEMBER_TIMEOUT_S, Member, Membership, Plan
from core.types import Role
from engine.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="a")
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
PLANS = ({P: 1, D: 2}, {P: 2, D: 1}, {B: 3}, {P: 1, D: 1}, {P: 0, D: 0, B: 2})
DEPTH = 3
"""Events in a row."""


class World:
    """Workers and the membership they announce themselves to. No time passes but by `forget`."""

    def __init__(self, wanted: dict[Role, int], workers: int) -> None:
        self.now = 0.0
        self.born = 0
        self.alive: dict[str, Member] = {}
        self.membership = Membership(Plan(wanted=wanted))
        for _ in range(workers):
            self.come()

    def come(self) -> None:
        name = f"w{self.born}"
        self.born += 1
        role = self.membership.admit(name, LAYOUT, self.now)
        self.alive[name] = Member(worker_id=name, address=f"{name}:1", role=role, layout=LAYOUT)

    def announce(self, name: str) -> tuple[Role, Role]:
        """The role before and after."""
        member = self.alive[name]
        orders = self.membership.announce(member, self.now)
        self.alive[name] = Member(
            worker_id=name, address=member.address, role=orders.role, layout=LAYOUT, plan=orders.plan
        )
        return member.role, orders.role

    def replan(self, wanted: dict[Role, int]) -> None:
        self.membership.plan = Plan(plan_id=self.membership.plan.plan_id + 1, wanted=wanted)

    def die(self, name: str) -> None:
        del self.alive[name]

    def leave(self, name: str) -> None:
        del self.alive[name]
        self.membership.leave(name)

    def restart(self) -> None:
        """The controller, which begins with the plan of its configuration."""
        self.membership = Membership(Plan(wanted=PLANS[0]))

    def forget(self) -> None:
        """So much time passes that the dead are forgotten."""
        self.now += MEMBER_TIMEOUT_S / 2
        for name in self.alive:
            self.announce(name)
        self.now += MEMBER_TIMEOUT_S / 2 + 0.1

    def counts(self) -> Counter[Role]:
        return Counter(member.role for member in self.alive.values())


def events(world: World) -> Iterator[tuple[str, object]]:
    for name in world.alive:
        yield "announce", name
    if world.alive:
        yield "die", next(iter(world.alive))
        yield "leave", next(reversed(world.alive))
    for wanted in PLANS[1:3]:
        yield "replan", wanted
    if len(world.alive) < 4:
        yield "come", None
    yield "restart", None


def apply(world: World, event: str, argument: object) -> None:
    getattr(world, event)(*([] if argument is None else [argument]))


def explored(world: World, depth: int) -> Iterator[World]:
    yield world
    if depth:
        for event, argument in events(world):
            following = copy.deepcopy(world)
            apply(following, event, argument)
            yield from explored(following, depth - 1)


def settle(world: World) -> list[tuple[Role, Role]]:
    """Nothing happens any more but announcements. Returns the changes of roles."""
    world.forget()
    return [world.announce(name) for _ in range(2) for name in world.alive]


@pytest.mark.parametrize("wanted", PLANS, ids=str)
def test_whatever_has_happened_the_roles_are_those_of_the_plan_in_the_end_and_stay(wanted: dict[Role, int]) -> None:
    for reached in explored(World(wanted, 3), DEPTH):
        world = copy.deepcopy(reached)
        settle(world)
        plan = world.membership.plan.wanted
        while len(world.alive) < sum(plan.values()):  # Serve starts as many as are wanted
            world.come()
        while len(world.alive) > sum(plan.values()):
            world.leave(next(iter(world.alive)))
        settle(world)
        assert world.counts() == Counter({role: count for role, count in plan.items() if count})
        assert all(before is after for before, after in settle(world))


@pytest.mark.parametrize("wanted", PLANS[:2], ids=str)
def test_a_role_is_given_up_only_when_it_has_too_many_for_one_that_has_too_few(wanted: dict[Role, int]) -> None:
    for world in explored(World(wanted, 3), DEPTH):
        for name, member in world.alive.items():
            after = copy.deepcopy(world)
            # What the membership believes, which may count a worker that has died.
            believed = Counter(role for role, _, _ in after.membership._roles.values())
            known = name in after.membership._roles
            before, now = after.announce(name)
            if now is before:
                continue
            plan = after.membership.plan.wanted
            assert believed[before] + (not known) > plan.get(before, 0)
            assert believed[now] < plan[now]
            assert member.role is before


def test_no_two_workers_swap_while_a_plan_is_carried_out() -> None:
    for first in PLANS:
        for second in PLANS:
            world = World(first, sum(first.values()))
            settle(world)
            world.replan(second)
            moves = {(before, after) for before, after in settle(world) if before is not after}
            assert not {(after, before) for before, after in moves} & moves


def test_a_restarted_controller_goes_on_with_the_plan_by_which_the_workers_work() -> None:
    world = World(PLANS[0], 3)
    world.replan(PLANS[1])
    settle(world)
    world.restart()
    changes = settle(world)
    assert world.membership.plan.plan_id == 1
    assert world.counts() == Counter(PLANS[1])
    assert all(before is after for before, after in changes[3:])


def test_a_worker_that_leaves_is_no_member_and_its_role_is_given_on() -> None:
    world = World({P: 1, D: 2}, 3)
    settle(world)
    prefill = next(name for name, member in world.alive.items() if member.role is P)
    world.leave(prefill)
    assert prefill not in {member.worker_id for member in world.membership.members()}
    world.come()
    assert world.counts() == Counter({P: 1, D: 2})
