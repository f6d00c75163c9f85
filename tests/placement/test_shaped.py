"""What workers of unlike shapes will do: a profile of each TP, and devices that are shared out among them."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from placement.arranged import simulated
from placement.arrangement import Arrangement
from placement.latency import Coefficients, StepLatency
from placement.layout import Role
from placement.load import RoleLoad
from placement.outcome import Targets
from placement.profile import Setting
from placement.seen import Seen
from placement.shaped import Shaped, shaped
from placement.shapes import Limits
from placement.topology import NodeKind, Topology, Wire
from placement.worker_shape import WorkerShape
from tests.placement.pipelines import azure_like
from tests.placement.profiles import profile

TARGETS = Targets(ttft_ms=1500.0, tpot_ms=30.0)
ONE, TWO, STAGES = WorkerShape(1, 1), WorkerShape(2, 1), WorkerShape(1, 2)
HALF = StepLatency(
    Coefficients(7.4, 0.0343, 2e-6), Coefficients(6.7, 0.00017, 0.015), Coefficients(5.3, 0.00016, 0.03), 6
)
LIMITS = Limits(chunk_tokens=(512,), max_sequences=16, kv_cache_bytes=10**9)


def cluster(
    devices: int = 4, count: int = 2, kind: str = "H100", shapes: tuple[WorkerShape, ...] = (ONE, TWO)
) -> Shaped:
    nodes = (NodeKind(name="here", device=kind, devices=devices, memory_gb=80, count=count),)
    wires = (Wire(within="here", gb_per_s=100), Wire(between=("here", "here"), gb_per_s=1))
    topology = Topology(nodes=nodes, links=wires if count > 1 else wires[:1])
    known = profile(setting=Setting(device=kind)), profile(HALF, setting=Setting(device=kind, tp=2))
    return shaped(known, shapes, topology, LIMITS, TARGETS)


def test_workers_of_unlike_shapes_fill_one_node_after_the_other() -> None:
    layout = cluster().layout(Arrangement(2, 2, 0, 512, ONE, TWO))
    assert [(group.role, group.host) for group in layout.groups] == [
        (Role.PREFILL, 0), (Role.PREFILL, 0), (Role.DECODE, 0), (Role.DECODE, 1),
    ]  # fmt: skip
    assert layout.groups[0].latency.prompt.a > layout.groups[2].latency.prompt.a
    across, inside = layout.links[0].ms_per_token, cluster().layout(Arrangement(1, 1, 0, 512, ONE, TWO)).links[0]
    assert across > 50 * inside.ms_per_token


def test_a_shape_of_stages_has_them_and_the_memory_of_all_its_devices() -> None:
    staged = cluster(shapes=(ONE, STAGES)).layout(Arrangement(0, 0, 2, 512, STAGES, STAGES))
    assert [(group.stages, group.host) for group in staged.groups] == [(2, 0), (2, 0)]
    assert len(staged.lanes) == 4


def test_more_devices_than_there_are_cannot_be_had_but_cores_are_shared() -> None:
    assert cluster(2, 1).why_not(Arrangement(0, 0, 1, 512, TWO, TWO)) is None
    why = cluster(2, 1).why_not(Arrangement(1, 1, 0, 512, ONE, TWO))
    assert why == "2 workers on 3 devices, and there are 1 nodes with 2"
    on_cores = cluster(2, 1, kind="cpu").layout(Arrangement(1, 1, 0, 512, ONE, TWO))
    assert [group.cores for group in on_cores.groups] == [0.5, 1.0]
    assert {group.cores for group in cluster(2, 1, kind="cpu").layout(Arrangement(0, 0, 1, 512, TWO, TWO)).groups} == {
        0
    }


def test_a_shape_alone_is_foretold_as_workers_that_never_change() -> None:
    requests, two = azure_like(200), Arrangement(0, 0, 2, 512)
    plain = simulated(profile(setting=Setting(device="H100")), cluster_topology(), LIMITS, TARGETS)
    single = shaped((profile(setting=Setting(device="H100")),), (ONE,), cluster_topology(), LIMITS, TARGETS)
    named = Arrangement(0, 0, 2, 512, ONE, ONE)
    for rate in (1.0, 4.0, 9.0):
        assert single.attainment(named, requests, rate) == plain.attainment(two, requests, rate)
    assert single.prompt_ms(1000.0, named) == plain.prompt_ms(1000.0, two)
    load = RoleLoad(workers=2, running=8, free_kv_tokens=10_000)
    assert single.token_ms(load, 2, named) == plain.token_ms(load, 2, two)


def cluster_topology() -> Topology:
    return Topology(
        nodes=(NodeKind(name="here", device="H100", devices=4, memory_gb=80),),
        links=(Wire(within="here", gb_per_s=100),),
    )


def test_what_serving_shows_corrects_every_shape() -> None:
    slow = cluster().as_seen(Seen(prompts=2.0, decodes=2.0))
    for shape in (ONE, TWO):
        used = Arrangement(0, 0, 1, 512, shape, shape)
        assert slow.prompt_ms(512, used) == pytest.approx(2 * cluster().prompt_ms(512, used))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ((ONE, WorkerShape(4, 1)), "shape 4x1: no profile is of TP 4, only of 1, 2; make one with slipstream profile"),
        ((ONE, WorkerShape(1, 8)), "shape 1x8: .*8 stages, and 4 layers"),
    ],
)
def test_shapes_that_cannot_be_are_refused_by_name(shapes: tuple[WorkerShape, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster(shapes=shapes)


def test_two_profiles_of_a_tp_are_refused() -> None:
    alike = profile(setting=Setting(device="H100"))
    with pytest.raises(ConfigError, match="two profiles are of TP 1: leave one out"):
        shaped((alike, alike), (ONE,), cluster_topology(), LIMITS, TARGETS)
