"""Layouts on nodes: groups are never split, and what is to be near shares a node."""

from __future__ import annotations

from collections import Counter
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from placement.candidates import Candidate, Option, Space
from placement.layout import Group, Link, Role
from placement.packing import Seat, packed
from placement.room import most_beside, shared_out
from placement.topology import NodeKind, Topology, Wire
from tests.placement.layouts import PLAIN
from tests.placement.spaces import alike


def option(tp: int) -> Option:
    return Option(f"TP{tp}", tp, Group(Role.BOTH, PLAIN, 1000), pool="H100")


def cluster(count: int, devices: int = 8) -> Topology:
    node = NodeKind(name="n", device="H100", devices=devices, memory_gb=80, count=count)
    links = (Wire(within="n", gb_per_s=100), Wire(between=("n", "n"), gb_per_s=10))
    return Topology(nodes=(node,), links=links)


def layout(
    prefills: int, decodes: int, tps: tuple[int, int] = (2, 2), *, near: bool = False, nodes: int = 1
) -> Candidate:
    space = Space((option(1),), {"H100": (8,) * 8}, alike(Link(0.0), Link(0.0), ("H100",)))
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
    with pytest.raises(ConfigError, match=r"2 nodes of up to 8 H100 have no room for 1 x \(1 both TP16\)"):
        packed(layout(0, 1, (1, 16)), cluster(2))
    with pytest.raises(
        ConfigError, match=r"1 nodes of up to 8 H100 have no room for 2 x \(2 prefill TP2 \+ 1 decode TP2\)"
    ):
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


def test_a_layout_that_fits_is_placed_though_the_largest_first_would_not_do() -> None:
    """Two of 3 and three of 2 devices: 3 + 2 + 2 on one node and 3 + 2 on the other."""
    nodes = tuple(NodeKind(name=str(n), device="H100", devices=n, memory_gb=80) for n in (7, 5))
    links = tuple(Wire(within=str(n), gb_per_s=100) for n in (7, 5))
    topology = Topology(nodes=nodes, links=(*links, Wire(between=("7", "5"), gb_per_s=10)))
    assert packed(layout(2, 3, (3, 2)), topology) == [
        Seat("7", "H100", 1, 7, prefill=1, decode=2),
        Seat("5", "H100", 1, 5, prefill=1, decode=1),
    ]


_sizes = st.lists(st.integers(1, 8), min_size=1, max_size=3)


@given(_sizes, st.integers(1, 5), st.integers(1, 5))
def test_as_many_fit_as_any_way_to_place_them_shows(nodes: list[int], one: int, other: int) -> None:
    ways = list(product(*(range(size // one + 1) for size in nodes)))
    most = most_beside(nodes, one, other)
    for ones in range(sum(size // one for size in nodes) + 1):
        rest = [
            sum((size - n * one) // other for size, n in zip(nodes, way, strict=True))
            for way in ways
            if sum(way) == ones
        ]
        assert most[ones] == max(rest)
        given = shared_out(nodes, one, other, ones, max(rest))
        assert given is not None
        assert [sum(of) for of in zip(*given, strict=True)] == [ones, max(rest)]
        assert all(n * one + m * other <= size for size, (n, m) in zip(nodes, given, strict=True))
        assert shared_out(nodes, one, other, ones, max(rest) + 1) is None
    assert len(most) == sum(size // one for size in nodes) + 1
