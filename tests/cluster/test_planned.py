"""Which layouts of a plan `slipstream serve` can run, and what it is told of them."""

from __future__ import annotations

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cluster.config.loading import validated
from cluster.groups import groups_of
from cluster.planned import config_of, on_devices_alike, why_not
from cluster.planned_shapes import Stored, replan_section
from cluster.planning import planned, workload_of
from core.errors import ConfigError
from placement.candidates import Candidate
from placement.goodput import Goal
from placement.latency import Coefficients, StepLatency
from placement.layout import Role
from placement.profile import Profile, Setting
from placement.shapes import Limits, shapes, space_of
from placement.slo import parse_slo
from placement.topology import NodeKind, Topology, Wire
from tests.placement.layouts import STEP
from tests.placement.profiles import profile

LIMITS = Limits(stages=(1, 2), kv_cache_bytes=2**30)


def topology(*devices: str, count: int = 1) -> Topology:
    nodes = tuple(NodeKind(name=device, device=device, devices=8, memory_gb=8.0, count=count) for device in devices)
    inside = [Wire(within=device, gb_per_s=10.0) for device in devices]
    across = [Wire(between=pair, gb_per_s=1.0) for pair in product(devices, devices)]
    return Topology(nodes=nodes, links=(*inside, *across))


class Planning:
    """Of workers with the settings on the devices of a topology; layouts are of two shapes by their names."""

    def __init__(self, there: Topology, *settings: Setting) -> None:
        self.profiles = [profile(setting=setting) for setting in settings]
        found = shapes(self.profiles, LIMITS)
        self.topology = there
        self.shapes = {shape.name: shape for shape in found}
        self.space = space_of(there, found, LIMITS, frozenset(Role))
        self.options = {option.name: option for option in self.space.options}

    def layout(self, prefill: str, decode: str, **place: Any) -> Candidate:
        return Candidate(self.space, self.options[prefill], self.options[decode], 1, 2, 512, **place)

    def why_not(self, layout: Candidate) -> str | None:
        return why_not(layout, self.shapes, self.topology)

    def config_of(self, layout: Candidate) -> dict[str, Any]:
        return config_of(layout, self.shapes, LIMITS, self.topology, None)

    def alike(self, one: str, other: str) -> bool:
        return on_devices_alike(self.shapes[one], self.shapes[other])

    def replan_of(self, layout: Candidate, *in_no_file: int, further: tuple[Profile, ...] = ()) -> dict[str, Any]:
        """The files of profiles have their numbers for names."""
        stored = [
            Stored(each, None if number in in_no_file else Path(f"/{number}"))
            for number, each in enumerate([*self.profiles, *further])
        ]
        return replan_section(layout, self.shapes, stored, LIMITS, self.topology)


def test_what_prefill_workers_have_of_their_own_is_told_and_no_more() -> None:
    cores = partial(Setting, device="cpu")
    planning = Planning(topology("cpu"), cores(), cores(threads=2), cores(tp=2))
    alike = planning.config_of(planning.layout("cpu TP1", "cpu TP1", near=True))["cluster"]
    assert not [name for name in alike if name.startswith("prefill_") and name != "prefill_replicas"]
    apart = planning.config_of(planning.layout("cpu TP1 of 2 cores", "cpu TP1", near=True))["cluster"]
    assert apart == alike | {"prefill_cpus_per_worker": 2.0}
    split = planning.config_of(planning.layout("cpu TP2", "cpu TP1 PP2"))
    assert split["cluster"] == alike | {
        "cpus_per_worker": 2.0,
        "prefill_tensor_parallel_size": 2,
        "prefill_pipeline_parallel_size": 1,
    }
    assert [group.name for group in groups_of(validated(split))] == ["worker-tp2-pp1-prefill", "worker-tp1-pp2-decode"]


def test_shapes_of_gpus_differ_in_their_split() -> None:
    planning = Planning(topology("H100"), Setting(device="H100"), Setting(device="H100", tp=2))
    layout = planning.layout("H100 TP2", "H100 TP1", near=True)
    assert planning.config_of(layout)["cluster"] == {
        "prefill_replicas": 1,
        "decode_replicas": 2,
        "handoff_min_tokens": 0,
        "prefill_tensor_parallel_size": 2,
    }


def test_a_profile_of_the_same_shape_on_other_software_is_no_other_shape() -> None:
    settings = Setting(device="cpu", versions={"torch": "1"}, beside=1), Setting(device="cpu", threads=2)
    planning = Planning(topology("cpu"), *settings)
    same = planning.config_of(planning.layout("cpu TP1", "cpu TP1"))["cluster"]
    assert "prefill_cpus_per_worker" not in same


def test_devices_are_alike_whatever_the_split_but_not_with_other_cores() -> None:
    planning = Planning(topology("cpu"), Setting(device="cpu"), Setting(device="cpu", threads=2))
    assert planning.alike("cpu TP1", "cpu TP1 PP2")
    assert not planning.alike("cpu TP1", "cpu TP1 of 2 cores")


def test_replanning_goes_by_the_profiles_of_a_plan_and_changes_to_the_shapes_that_it_knew() -> None:
    gpu = partial(Setting, device="H100")
    planning = Planning(topology("H100"), gpu(), gpu(tp=2), gpu(tp=16))
    assert planning.replan_of(planning.layout("H100 TP2", "H100 TP2")) == {
        "profile": "/1",
        "shapes": ["2x1", "1x1", "1x2", "2x2"],
        "further_profiles": ["/0"],
    }, "and no node has 16 devices"
    unlike = planning.replan_of(planning.layout("H100 TP2", "H100 TP1 PP2"))
    assert (unlike["profile"], unlike["shapes"][:2]) == ("/0", ["1x2", "2x1"]), "first those that it begins with"
    further = profile(setting=gpu(tp=4))
    assert "4x1" in planning.replan_of(planning.layout("H100 TP1", "H100 TP1"), further=(further,))["shapes"]
    assert planning.replan_of(planning.layout("H100 TP1", "H100 TP1"), 1) == {}, "reckoned, and in no file"


def test_replanning_changes_no_shapes_where_the_plan_knew_no_other_on_such_devices() -> None:
    cores = partial(Setting, device="cpu")
    two = Planning(topology("cpu"), cores(), cores(threads=2))
    assert two.replan_of(two.layout("cpu TP1 of 2 cores", "cpu TP1 of 2 cores"))["shapes"] == ["1x1", "1x2"]
    nodes = Planning(topology("cpu", count=2), cores(), cores(tp=2))
    kept = nodes.replan_of(nodes.layout("cpu TP1", "cpu TP1", near=True, nodes=2))
    assert kept == {"profile": "/0"}, "workers that are kept together on nodes are of one shape"
    assert "shapes" in nodes.replan_of(nodes.layout("cpu TP1", "cpu TP1"))


def test_workers_of_two_shapes_are_served_where_it_does_not_matter_which_of_several_nodes_they_are_on() -> None:
    several = Planning(topology("cpu", count=2), Setting(device="cpu"), Setting(device="cpu", threads=2))
    unlike, alike = ("cpu TP1 of 2 cores", "cpu TP1"), ("cpu TP1", "cpu TP1")
    assert several.why_not(several.layout(*unlike)) is None
    assert several.why_not(several.layout(*alike, near=True, nodes=2)) is None
    near = several.layout(*unlike, near=True, nodes=2)
    with pytest.raises(ConfigError, match="keeps only workers of one shape together on each of several nodes, not cpu"):
        several.config_of(near)


def test_where_roles_are_to_change_the_best_layout_of_workers_alike_is_served() -> None:
    slow = StepLatency(Coefficients(50.0, 1.0, 0.0), STEP.decode, STEP.large_decode, STEP.large_rows)
    known = profile(slow, setting=Setting(device="cpu")), profile(setting=Setting(device="cpu", threads=2))
    workload, goal = workload_of(None, "prompt=200,output=20,cv=0.3"), Goal(parse_slo("ttft=100,tpot=20"))
    stored = [Stored(each, None) for each in known]
    asked = (stored, topology("cpu"), Limits(kv_cache_bytes=2**30), workload, goal, "per-device", None)
    for any_role in (False, True):
        found = planned(*asked, any_role=any_role)
        able = found.settle()
        assert able is not None
        prefill = able.prefill or able.decode
        assert on_devices_alike(found.shapes[prefill.name], found.shapes[able.decode.name]) == any_role
        assert any("replanning changes roles, and" in said for said in found.made.plan.warnings) == any_role


def test_workers_on_two_kinds_of_devices_are_planned_and_not_served() -> None:
    planning = Planning(topology("H100", "L40S"), Setting(device="H100"), Setting(device="L40S"))
    why = planning.why_not(planning.layout("H100 TP1", "L40S TP1"))
    assert why == "serve gives all workers one kind of device, not H100 TP1 for prefill and L40S TP1 for decode"
