"""More workers than cores, or than were measured beside each other: what is foretold of them, and what is said."""

from __future__ import annotations

from typing import Any

from placement.arranged import Simulated, simulated
from placement.arrangement import Arrangement
from placement.crowding import crowded
from placement.outcome import Targets
from placement.profile import Setting
from placement.shapes import Limits
from placement.topology import NodeKind, Topology, Wire, of_device
from tests.placement.pipelines import azure_like
from tests.placement.profiles import profile

TARGETS = Targets(ttft_ms=1500.0, tpot_ms=30.0)
TWO_CORES = Topology(
    nodes=(NodeKind(name="here", device="cpu", devices=2, memory_gb=32),), links=(Wire(within="here", gb_per_s=10),)
)


def on_two_cores(**changes: Any) -> Simulated:
    limits = Limits(chunk_tokens=(512,), max_sequences=16, kv_cache_bytes=10**9)
    return simulated(profile(), TWO_CORES, limits, TARGETS, **changes)


def test_workers_beyond_the_cores_share_them() -> None:
    layout = on_two_cores().layout(Arrangement(2, 1, 0, 512))
    assert {(one.host, one.cores) for one in layout.groups} == {(0, 0.5)}
    assert set(layout.links) == {on_two_cores().inside}
    both = on_two_cores().layout(Arrangement(1, 1, 0, 512))
    assert {(one.host, one.cores) for one in both.groups} == {(0, 0.0)}


def test_a_third_worker_on_two_cores_is_not_foretold_to_bring_what_it_would_on_a_core_of_its_own() -> None:
    requests, rate = azure_like(300).scaled(0.5, 0.5), 16.0
    two, three = Arrangement(0, 0, 2, 512), Arrangement(0, 0, 3, 512)
    here, elsewhere = on_two_cores(), on_two_cores(further_nodes=True)
    assert here.attainment(two, requests, rate) == elsewhere.attainment(two, requests, rate) < 0.8
    assert here.attainment(three, requests, rate) < here.attainment(two, requests, rate)
    assert elsewhere.attainment(three, requests, rate) > 0.95


def test_devices_that_nobody_shares_are_not_extrapolated() -> None:
    limits = Limits(chunk_tokens=(512,), max_sequences=16, kv_cache_bytes=10**9)
    workers = simulated(profile(setting=Setting(device="H100")), of_device("H100", 2), limits, TARGETS)
    assert workers.why_not(Arrangement(1, 2, 0, 512)) == "3 workers, and there are devices for 2"
    assert workers.attainment(Arrangement(1, 1, 0, 512), azure_like(50), 0.1) > 0


def test_what_was_not_measured_beside_each_other_is_said() -> None:
    one, two = (profile(setting=Setting(device="cpu", beside=beside)) for beside in (0, 1))
    assert crowded(two, 2, 2) is None
    assert "no more than 2 were measured at a time, and a further one is taken to cost as much" in crowded(two, 3, 4)
    assert "cost nothing; profile with --beside 1" in crowded(one, 2, 4)
    assert "3 threads on 2 cores, and are taken to get turns there, so that each takes 1.5 times" in crowded(two, 3, 2)
    assert crowded(profile(setting=Setting(device="H100")), 9, 8) is None
