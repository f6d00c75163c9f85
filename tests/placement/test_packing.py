"""Layouts on nodes: groups are never split, and what is to be near shares a node."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from placement.candidates import Candidate, Fabric, Option, Space
from placement.layout import Group, Link, Role
from placement.packing import Seat, packed
from placement.topology import NodeKind, Topology, Wire
from tests.placement.layouts import PLAIN


def option(tp: int) -> Option:
    return Option(f"TP{tp}", tp, Group(Role.BOTH, PLAIN, 1000), pool="H100")


def cluster(count: int, devices: int = 8) -> Topology:
    node = NodeKind(name="n", device="H100", devices=devices, memory_gb=80, count=count)
    links = (Wire(within="n", gb_per_s=100), Wire(between=("n", "n"), gb_per_s=10))
    return Topology(nodes=(node,), links=links)


def layout(
    prefills: int, decodes: int, tps: tuple[int, int] = (2, 2), *, near: bool = False, nodes: int = 1
) -> Candidate:
    space = Space((option(1),), {"H100": 64}, {"H100": 8}, Fabric(Link(0.0), Link(0.0)))
    prefill = option(tps[0]) if prefills else None
    return Candidate(space, prefill, option(tps[1]), prefills, decodes, 512, near, nodes)


def test_near_groups_share_a_node_and_the_nodes_are_alike() -> None:
    assert packed(layout(1, 2, near=True, nodes=3), cluster(4)) == [Seat("n", "H100", 3, 6, prefill=1, decode=2)]


def test_others_fill_one_node_after_the_other() -> None:
    assert packed(layout(0, 5), cluster(2)) == [
        Seat("n", "H100", 1, 8, both=4),
        Seat("n", "H100", 1, 2, both=1),
    ]


def test_what_has_no_room_in_a_node_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match="no node of H100 has 16 devices left for 1 both TP16"):
        packed(layout(0, 1, (1, 16)), cluster(2))
    with pytest.raises(ConfigError, match=r"no node of H100 has 6 devices left for 2 prefill TP2 \+ 1 decode TP2"):
        packed(layout(2, 1, near=True, nodes=2), cluster(1))


@given(st.integers(1, 6), st.integers(1, 6), st.sampled_from([(1, 2), (2, 4), (4, 1), (2, 2)]))
def test_every_group_has_a_place_and_no_node_is_overfull(prefills: int, decodes: int, tps: tuple[int, int]) -> None:
    seats = packed(layout(prefills, decodes, tps), cluster(8))
    held = Counter[str]()
    for seat in seats:
        assert seat.devices == seat.prefill * tps[0] + seat.decode * tps[1] <= 8
        held.update({"prefill": seat.prefill * seat.count, "decode": seat.decode * seat.count})
    assert held == {"prefill": prefills, "decode": decodes}
    assert sum(seat.count for seat in seats) <= 8
