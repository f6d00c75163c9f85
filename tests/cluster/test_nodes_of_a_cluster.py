"""Workers on the nodes that a plan wants them on."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.break_even import BreakEven
from cluster.config.loading import load
from cluster.membership import Member, Membership, Plan
from cluster.ray_nodes import RayNode, nodes_of
from cluster.resources import share_on
from cluster.router import Candidate, Prompt, choose
from core.errors import ConfigError
from core.types import Role
from core.wire import WorkerCounters, WorkerStatus
from engine.kv_layout import KVLayout

LAYOUT = KVLayout(num_layers=1, num_kv_heads=1, head_size=16, dtype="float32", block_size=16, fingerprint="f")


def node(name: str, cpus: float = 4.0, gpus: float = 0.0, **labels: str) -> RayNode:
    return RayNode(name, "10.0.0.1", cpus, gpus, 2**33, labels)


def test_nodes_are_those_that_are_alive_with_what_ray_knows_of_them() -> None:
    resources = {"CPU": 8.0, "GPU": 2.0, "accelerator_type:H100": 1.0, "memory": 1e9, "node:10.0.0.2": 1.0}
    listed = [
        {"NodeID": "b", "NodeManagerAddress": "10.0.0.2", "Alive": True, "Resources": resources, "Labels": {"p": "1"}},
        {"NodeID": "a", "NodeManagerAddress": "10.0.0.1", "Alive": True, "Resources": {}},
        {"NodeID": "c", "NodeManagerAddress": "10.0.0.3", "Alive": False, "Resources": resources},
    ]
    assert nodes_of(listed) == [
        RayNode("a", "10.0.0.1", 0.0, 0.0, 0, {}),
        RayNode("b", "10.0.0.2", 8.0, 2.0, 10**9, {"p": "1"}, "H100"),
    ]


@given(st.lists(st.integers(1, 64), min_size=1, max_size=5), st.integers(1, 8))
def test_no_node_has_room_for_more_workers_than_it_may_have(cores: list[int], most: int) -> None:
    config = load(None, {"colocated": True, "decode_replicas": 1, "workers_per_node": most, "cpus_per_worker": 0.1})
    (share,) = share_on(config, [node(str(number), count) for number, count in enumerate(cores)])
    assert max(int(count / share.bundle["CPU"] + 1e-9) for count in cores) <= most
    assert share.cpus == 0.1


def test_as_many_workers_as_wanted_fit_on_nodes_alike() -> None:
    config = load(None, {"workers_per_node": 2, "prefill_replicas": 2, "decode_replicas": 2})
    (share,) = share_on(config, [node("a"), node("b")])
    assert share.cpus == 2.0
    assert int(4 / share.bundle["CPU"]) == 2


@pytest.mark.parametrize(
    ("settings", "nodes", "message"),
    [
        (
            {"workers_per_node": 1, "cpus_per_worker": 1.0},
            [node("a")],
            "workers_per_node 1: the 1 nodes have room for 1 workers, and there are 2",
        ),
        (
            {"workers_per_node": 2, "handoff_within_node": True},
            [node("a"), node("b")],
            "handoff_within_node: 2 workers, 2 on a node, leave nodes over",
        ),
        ({"node_labels": {"pool": "fast"}}, [node("a", pool="slow")], "node_labels pool=fast: no node of the cluster"),
        (
            {"node_labels": {"pool": "fast"}, "cpus_per_worker": 3.0},
            [node("a", pool="fast"), node("b")],
            "do not fit on 4",
        ),
    ],
)
def test_nodes_that_do_not_hold_the_plan_are_refused(settings: dict[str, Any], nodes: list[RayNode], message) -> None:
    with pytest.raises(ConfigError, match=message):
        share_on(load(None, settings), nodes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"handoff_within_node": True, "colocated": True}, "handoff_within_node has no meaning with colocated"),
        ({"handoff_within_node": True}, "handoff_within_node needs workers_per_node"),
        (
            {"workers_per_node": 2, "prefill_pipeline_parallel_size": 2},
            "workers_per_node is of workers that are alike, and prefill and decode workers differ in shape",
        ),
        ({"node_labels": ("fast",)}, "'?fast'? is not name=value"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(None, settings)
    assert load(None, {"node_labels": ("pool=fast",)}).cluster.node_labels == {"pool": "fast"}


@given(st.permutations(["a", "a", "a", "b", "b", "b"]))
def test_every_node_gets_its_share_of_each_role(order: list[str]) -> None:
    members = Membership(Plan(wanted={Role.PREFILL: 4, Role.DECODE: 2}))
    given = [(place, members.admit(str(number), LAYOUT, 0.0, place)) for number, place in enumerate(order)]
    for place in "ab":
        assert sorted(role for where, role in given if where == place) == [Role.DECODE, Role.PREFILL, Role.PREFILL]
    for number, (place, role) in enumerate(given):
        told = Member(worker_id=str(number), address="", role=role, layout=LAYOUT, node=place)
        assert members.announce(told, 1.0).role is role, "nobody changes"


def worker(name: str, role: Role, place: str, waiting: int = 0) -> Candidate:
    status = WorkerStatus(
        worker_id=name,
        role=role,
        num_running=0,
        num_waiting=0,
        num_waiting_tokens=waiting,
        num_free_blocks=100,
        num_blocks=100,
        block_size=16,
        max_num_seqs=8,
        counters=WorkerCounters(),
    )
    return Candidate(name, "", status, node=place)


@pytest.mark.parametrize(("near", "prefill"), [(True, "p1"), (False, "p2")])
def test_kv_stays_on_a_node_if_that_is_wanted(near: bool, prefill: str) -> None:
    workers = [worker("p1", Role.PREFILL, "a", 500), worker("p2", Role.PREFILL, "b"), worker("d", Role.DECODE, "a")]
    route = choose(Prompt(200, near=near), workers, 10, BreakEven(0, 512))
    assert route.prefill is not None
    assert route.prefill.worker_id == prefill


def test_kv_leaves_the_node_when_nobody_prefills_there() -> None:
    workers = [worker("p2", Role.PREFILL, "b"), worker("d", Role.DECODE, "a")]
    route = choose(Prompt(200, near=True), workers, 10, BreakEven(0, 512))
    assert route.prefill is not None
