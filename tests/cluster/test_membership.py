from __future__ import annotations

import msgspec
import pytest

from cluster.membership import MEMBER_TIMEOUT_S, Member, Membership, Plan
from core.errors import LayoutMismatch
from core.types import Role
from engine.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="a")


def join(membership: Membership, name: str, now: float = 0.0) -> Role:
    role = membership.admit(name, LAYOUT, now)
    membership.announce(Member(worker_id=name, address=f"{name}:1", role=role, layout=LAYOUT), now)
    return role


def test_roles_are_given_until_each_has_its_number() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 2}))
    assert sorted(join(membership, name) for name in "abc") == [Role.DECODE, Role.DECODE, Role.PREFILL]


def test_the_role_of_a_silent_worker_goes_to_its_replacement() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    roles = {name: join(membership, name) for name in "ab"}
    prefill = next(name for name, role in roles.items() if role is Role.PREFILL)
    other = next(name for name in roles if name != prefill)
    later = MEMBER_TIMEOUT_S + 1
    membership.announce(Member(worker_id=other, address="x:1", role=roles[other], layout=LAYOUT), later)
    assert join(membership, "c", later) is Role.PREFILL
    assert {m.worker_id for m in membership.members()} == {other, "c"}


def test_a_restarted_controller_takes_the_workers_word_for_their_roles() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    membership.announce(Member(worker_id="a", address="a:1", role=Role.PREFILL, layout=LAYOUT), 0.0)
    assert join(membership, "b") is Role.DECODE


@pytest.mark.parametrize(("field", "value"), [("dtype", "bfloat16"), ("fingerprint", "b"), ("head_size", 4)])
def test_a_cache_that_cannot_be_joined_is_refused_at_start_up_by_the_field_that_differs(
    field: str, value: object
) -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    join(membership, "a")
    with pytest.raises(LayoutMismatch) as caught:
        membership.admit("b", msgspec.structs.replace(LAYOUT, **{field: value}), 0.0)
    assert caught.value.field == field


def test_block_sizes_may_differ() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    join(membership, "a")
    membership.admit("b", msgspec.structs.replace(LAYOUT, block_size=32), 0.0)


def test_a_replacement_that_comes_before_the_death_is_noticed_gets_the_right_role_in_the_end() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    roles = {name: join(membership, name) for name in "ab"}
    prefill = next(name for name, role in roles.items() if role is Role.PREFILL)
    roles = {prefill: Role.PREFILL, "c": membership.admit("c", LAYOUT, 1.0)}
    now = 1.0
    while now < MEMBER_TIMEOUT_S + 2:  # the decode worker is dead and says nothing
        now += 1.0
        for name, role in roles.items():
            member = Member(worker_id=name, address=f"{name}:1", role=role, layout=LAYOUT)
            roles[name] = membership.announce(member, now).role
    assert sorted(roles.values()) == [Role.DECODE, Role.PREFILL]
    assert {m.worker_id: m.role for m in membership.members()} == roles


def test_a_worker_gets_only_roles_that_its_shape_is_for() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    shapes = {"d1": (Role.DECODE,), "d2": (Role.DECODE,), "p1": (Role.PREFILL,)}
    roles = {name: membership.admit(name, LAYOUT, 0.0, able=able) for name, able in shapes.items()}
    assert roles == {name: able[0] for name, able in shapes.items()}
    for wanted in ({Role.PREFILL: 3}, {Role.BOTH: 3}, {Role.DECODE: 1, Role.PREFILL: 2}):
        membership.plan = Plan(plan_id=membership.plan.plan_id + 1, wanted=wanted)
        for name, able in shapes.items():
            member = Member(worker_id=name, address=f"{name}:1", role=roles[name], layout=LAYOUT, roles=able)
            assert membership.announce(member, 1.0).role is roles[name]
    assert membership.admit("late", LAYOUT, 1.0, able=(Role.DECODE,)) is Role.DECODE


def test_a_new_controller_learns_from_the_workers_what_their_shapes_are_for() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 1}))
    for name in "ab":  # two for decode, and the worker for prefill is dead
        told = Member(worker_id=name, address=f"{name}:1", role=Role.DECODE, layout=LAYOUT, roles=(Role.DECODE,))
        assert membership.announce(told, 0.0).role is Role.DECODE
    assert membership.admit("c", LAYOUT, 0.0, able=(Role.PREFILL,)) is Role.PREFILL


def test_roles_do_not_flap() -> None:
    membership = Membership(Plan(wanted={Role.PREFILL: 1, Role.DECODE: 2}))
    roles = {name: join(membership, name) for name in "abc"}
    for now in range(1, 10):
        for name, role in roles.items():
            member = Member(worker_id=name, address=f"{name}:1", role=role, layout=LAYOUT)
            assert membership.announce(member, float(now)).role is role
