"""Roles where workers of unlike shapes are there: first to those of the plan's shape, to others while they lack."""

from __future__ import annotations

from itertools import permutations, product

import pytest

from cluster.membership import Member, Membership, Plan
from core.types import Role
from placement.worker_shape import WorkerShape
from tests.cluster.test_membership_explored import LAYOUT

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
ONE, TWO = WorkerShape(1, 1), WorkerShape(2, 1)


class Cluster:
    """Workers that announce themselves; one is named by its shape and a letter."""

    def __init__(self, wanted: dict[Role, int], **shapes: WorkerShape) -> None:
        self.members: dict[str, Member] = {}
        self.membership = Membership(Plan(wanted=wanted, shapes={Role(role): shape for role, shape in shapes.items()}))

    def come(self, name: str, shape: WorkerShape) -> Role:
        role = self.membership.admit(name, LAYOUT, 0.0, shape=shape)
        self.members[name] = Member(worker_id=name, address=name, role=role, layout=LAYOUT, shape=shape)
        return role

    def announce(self) -> dict[str, Role]:
        for name, member in self.members.items():
            orders = self.membership.announce(member, 0.0)
            self.members[name] = Member(
                worker_id=name, address=name, role=orders.role, layout=LAYOUT, shape=member.shape, plan=orders.plan
            )
        return {name: member.role for name, member in self.members.items()}

    def replan(self, wanted: dict[Role, int], **shapes: WorkerShape) -> None:
        named = {Role(role): shape for role, shape in shapes.items()}
        self.membership.plan = Plan(plan_id=self.membership.plan.plan_id + 1, wanted=wanted, shapes=named)


def test_an_old_worker_stands_in_for_one_that_is_to_come_and_gives_way_to_it() -> None:
    cluster = Cluster({P: 1, D: 1}, prefill=ONE, decode=ONE)
    cluster.come("a", ONE)
    cluster.come("b", ONE)
    cluster.replan({P: 1, D: 1}, prefill=ONE, decode=TWO)
    assert sorted(cluster.announce().values()) == [D, P]
    assert cluster.come("new", TWO) is D
    roles = cluster.announce()
    assert roles["new"] is D
    assert P in (roles["a"], roles["b"])


@pytest.mark.parametrize("order", [*permutations("abc")])
def test_all_of_the_right_shapes_get_the_roles_of_the_plan_whoever_speaks_first(
    order: tuple[str, ...],
) -> None:
    """Of one prefill of TP 2, and decodes of TP 1; whatever they were before."""
    shapes = {"a": TWO, "b": ONE, "c": ONE}
    for before in product((P, D, B), repeat=3):
        cluster = Cluster({P: 1, D: 2}, prefill=TWO, decode=ONE)
        for name, role in zip(order, before, strict=True):
            member = Member(worker_id=name, address=name, role=role, layout=LAYOUT, shape=shapes[name])
            cluster.members[name] = member
        cluster.announce()
        assert cluster.announce() == {"a": P, "b": D, "c": D}, before


def test_a_worker_that_only_starts_gets_the_role_of_its_shape_though_another_lacks_more() -> None:
    cluster = Cluster({P: 1, D: 3}, prefill=TWO, decode=ONE)
    assert cluster.come("a", TWO) is P
    assert cluster.come("b", TWO) is D, "it stands in"
    assert cluster.come("c", ONE) is D
