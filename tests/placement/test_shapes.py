"""From a topology and profiles to the space of layouts: which links count for which devices."""

from __future__ import annotations

import pytest

from placement.candidates import Candidate, Space, candidates
from placement.layout import Role
from placement.profile import Setting
from placement.shapes import Limits, most_kv_tokens, shapes, space_of
from placement.topology import NodeKind, Topology, Wire
from tests.placement.profiles import profile

FAST = NodeKind(name="fast", device="H100", devices=4, memory_gb=80, count=2)
CHEAP = NodeKind(name="cheap", device="L40S", devices=4, memory_gb=48)
WIRES = (Wire(within="fast", gb_per_s=450), Wire(between=("fast", "fast"), gb_per_s=50))
SLOW = (Wire(within="cheap", gb_per_s=10), Wire(between=("cheap", "fast"), gb_per_s=1))
ALONE = Topology(nodes=(FAST,), links=WIRES)
MIXED = Topology(nodes=(CHEAP, FAST), links=(*SLOW, *WIRES))


def space(topology: Topology) -> Space:
    profiles = [profile(setting=Setting(device=kind)) for kind in topology.pools]
    limits = Limits(stages=(1, 2), chunk_tokens=(512,))
    return space_of(topology, shapes(profiles, limits), limits, frozenset({Role.PREFILL, Role.DECODE}))


def between(found: Space, giver: str, taker: str) -> list[Candidate]:
    """Layouts that hand KV from the one kind of device to the other."""
    return [one for one in candidates(found) if one.prefill and (one.prefill.pool, one.decode.pool) == (giver, taker)]


def test_devices_of_another_kind_leave_the_links_of_a_kind_as_they_are() -> None:
    alone, mixed = (between(space(topology), "H100", "H100") for topology in (ALONE, MIXED))
    assert {one.near for one in alone} == {True, False}
    assert [(one.name, one.link) for one in mixed] == [(one.name, one.link) for one in alone]
    assert [one.decode.group.hop_ms for one in mixed] == [one.decode.group.hop_ms for one in alone]


@pytest.mark.parametrize(
    ("giver", "taker", "gb_per_s"), [("L40S", "L40S", [10]), ("H100", "L40S", [1]), ("H100", "H100", [50, 450])]
)
def test_the_links_are_those_of_who_gives_and_of_who_takes(giver: str, taker: str, gb_per_s: list[float]) -> None:
    token_mb = profile().model.kv_token_bytes / 1e6
    found = {one.link.ms_per_token for one in between(space(MIXED), giver, taker)}
    assert sorted(token_mb / ms for ms in found) == pytest.approx(gb_per_s)


def test_all_devices_hold_the_kv_that_groups_of_the_best_shapes_hold() -> None:
    """Of 72 GB of an H100 and 43.2 of an L40S weights take 1 GB, of two stages together once; a token takes 100 kB."""
    limits = Limits(stages=(1, 2), chunk_tokens=(512,))
    found = shapes([profile(setting=Setting(device=kind)) for kind in MIXED.pools], limits)
    assert most_kv_tokens(MIXED, found, limits) == 4 * 1_430_000 + 2 * 854_000
    little = Limits(chunk_tokens=(512,), kv_cache_bytes=10**8)
    assert most_kv_tokens(MIXED, found[::2], little) == (8 + 4) * 1000
