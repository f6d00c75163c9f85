"""What a profile knows beyond the steps, and what a plan makes of it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from core.errors import ConfigError
from placement.arranged import simulated
from placement.candidates import candidates
from placement.latency import Contention
from placement.layout import Role
from placement.outcome import Targets
from placement.profile import Drafting, Serving, Setting, read_profile, write_profile
from placement.shapes import Limits, shapes, space_of
from placement.topology import NodeKind, Topology, Wire
from tests.placement.layouts import STEP
from tests.placement.profiles import points, profile

AROUND = Serving(
    overhead_ms=5.0, prompt_token_ms=0.01, step_ms=1.0, sequence_ms=0.5, handoff_step_ms=8.0, handoff_gap_ms=2.0
)
DRAFTS = Drafting(
    drafter="hybrid",
    prompts="random",
    budget=6,
    acceptance_length=2.2,
    rows=3.4,
    draft_ms=1.5,
    draft_sequence_ms=0.1,
)
HERE = Topology(
    nodes=(NodeKind(name="here", device="cpu", devices=2, memory_gb=64),),
    links=(Wire(within="here", gb_per_s=10, latency_us=200),),
)


def layouts(found):
    limits = Limits(overhead_ms=1.0)
    space = space_of(HERE, shapes([found], limits), limits, frozenset(Role))
    return {candidate.name: candidate.layout for candidate in candidates(space)}


def test_steps_of_a_server_take_what_serving_adds() -> None:
    plain, around = profile(), profile(serving=AROUND)
    assert around.latency == plain.latency
    alone, served = plain.latency, around.served(Role.BOTH)
    assert served.step_ms(0, 0, 100, 4, 4) == pytest.approx(alone.step_ms(0, 0, 100, 4, 4) + 1.0 + 4 * 0.5)
    assert served.step_ms(100, 0, 0, 0, 0) == pytest.approx(alone.step_ms(100, 0, 0, 0, 0) + 1.0)
    handing = around.served(Role.PREFILL)
    assert handing.step_ms(100, 0, 0, 0, 0) == pytest.approx(alone.step_ms(100, 0, 0, 0, 0) + 1.0 + 8.0)
    assert plain.served(Role.PREFILL) == alone


def test_layouts_are_planned_with_what_was_measured_around_the_steps() -> None:
    found = layouts(profile(serving=AROUND))
    apart = found["1 prefill cpu TP1 + 1 decode cpu TP1, together on a node, chunks of 2048"]
    assert [layout.overhead_ms for layout in found.values()] == [6.0] * len(found)
    assert apart.links[0].latency_ms == pytest.approx(0.2 + 2.0)
    prefill, decode = apart.groups
    assert prefill.latency.prompt.a == pytest.approx(decode.latency.prompt.a + 8.0)


def test_groups_on_one_machine_contend_as_they_were_measured_to() -> None:
    beside = tuple(replace(point, ms=1.2 * point.ms) for point in points(STEP))
    measured = {"beside_prompts": points(STEP), "beside_decodes": beside}
    found = layouts(profile(**measured, setting=Setting(device="cpu", beside=1)))
    for layout in found.values():
        assert {group.host for group in layout.groups} == {0}
        assert [group.contention.decode for group in layout.groups] == [pytest.approx((1.0, 1.2))] * len(layout.groups)


def test_what_workers_that_serve_cost_each_other_counts_for_more_than_what_their_steps_do(tmp_path) -> None:
    served = Contention(prompt=(1.03, 1.12), decode=(1.07, 1.26))
    beside = {
        "beside_prompts": points(STEP),
        "beside_decodes": points(STEP),
        "setting": Setting(device="cpu", beside=1),
    }
    measured = profile(**beside, serving=replace(AROUND, contention=served))
    write_profile(measured, tmp_path / "stored.json")
    assert read_profile(tmp_path / "stored.json").contention == served
    assert {group.contention for layout in layouts(measured).values() for group in layout.groups} == {served}
    assert "beside another's decodes prompts take 1.12 times as long, decodes 1.26" in measured.table()


def test_decodes_take_longer_beside_prompts_that_are_handed_over_to_them() -> None:
    served = Contention(prompt=(1.03, 1.12), decode=(1.02, 1.26))
    around = replace(AROUND, contention=served, handoff_decode=1.1)
    name = "1 prefill cpu TP1 + 1 decode cpu TP1, together on a node, chunks of 2048"
    found = layouts(profile(serving=around))
    apart = found[name]
    assert [group.contention for group in apart.groups] == [served, Contention(served.prompt, (1.1, 1.26))]
    assert "handed over to their worker decodes take 1.10 times as long" in profile(serving=around).table()
    replanned = simulated(profile(serving=around), HERE, Limits(), Targets(ttft_ms=1000.0, tpot_ms=100.0))
    prefill, decode, both = replanned.layout_of([Role.PREFILL, Role.DECODE, Role.BOTH], 2048).groups
    assert (prefill.contention, both.contention) == (served, served)
    assert decode.contention == Contention(served.prompt, (1.1, 1.26))
    assert {group.contention for group in found["2 x cpu TP1, chunks of 2048"].groups} == {served}
    apart = layouts(profile(serving=replace(around, handoff_decode=None)))[name]
    assert {group.contention for group in apart.groups} == {served}


def test_how_far_rounds_were_apart_is_stored_and_told(tmp_path) -> None:
    served, low, high = (Contention((1.03, 1.12 + off), (1.07, 1.26 + off)) for off in (0.0, -0.06, 0.08))
    around = replace(AROUND, contention=served, contention_quartiles=(low, high))
    beside = {"beside_prompts": points(STEP), "beside_decodes": points(STEP)}
    measured = profile(**beside, setting=Setting(device="cpu", beside=1), serving=around)
    write_profile(measured, tmp_path / "stored.json")
    told = read_profile(tmp_path / "stored.json").table()
    expected = (
        "prompts take 1.12 (1.06 to 1.20 in half of the rounds) times as long, decodes 1.26 (1.20 to 1.34 in half of"
    )
    assert f"beside another's decodes {expected} the rounds)" in told


def test_a_drafter_is_planned_with_as_it_was_profiled() -> None:
    found = shapes([profile(drafting=(DRAFTS,))], Limits(drafter="hybrid"))
    plain, drafting = (shape.speculation for shape in found)
    assert plain is None
    assert drafting is not None
    assert (drafting.acceptance_length, drafting.rows, drafting.draft_ms) == (2.2, 4, 1.5)
    with pytest.raises(ConfigError, match="profile with --speculation hybrid, or give --acceptance-length"):
        shapes([profile()], Limits(drafter="hybrid"))
