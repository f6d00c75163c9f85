"""The search: the layout that an exhaustive one finds, what it leaves out, and what it says when nothing will do."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from core.errors import ConfigError
from placement.candidates import Candidate, Objective, Option, Space, candidates
from placement.goodput import Goal, attains, draws, goodput, goodput_near
from placement.lasting import Evaluated, Ranked, best_of_kinds, ranking
from placement.latency import Speculation
from placement.layout import Layout, Link, Role
from placement.lengths import parse_lengths
from placement.native import serve
from placement.outcome import Targets
from placement.packing import packed
from placement.search import Found, Looked, Nothing, cheapest, exhaustive, look, search
from placement.serving import Served
from placement.topology import NodeKind, Topology, Wire
from placement.workload import Workload
from tests.placement.pipelines import azure_like
from tests.placement.spaces import alike, option, space

REQUESTS = azure_like(2000)
GOAL = Goal(Targets(500.0, 50.0), 0.9)


@cache
def searched(goal: Goal = GOAL) -> Found:
    return search(space(), REQUESTS, goal)


@cache
def searched_exhaustively(goal: Goal = GOAL) -> list[Evaluated]:
    return exhaustive(space(), REQUESTS, goal)


@pytest.mark.parametrize(
    "goal",
    [
        GOAL,
        Goal(Targets(3000.0, 25.0)),
        Goal(Targets(500.0, 50.0, e2e_ms=12_000.0)),
        Goal(Targets(800.0, 50.0, 4000.0, shares=(("ttft", 0.97), ("e2e", 0.5)))),
    ],
)
def test_it_finds_what_an_exhaustive_search_finds(goal: Goal) -> None:
    best, found = ranking([lambda _: searched_exhaustively(goal)], REQUESTS, goal, "per-device")[0], searched(goal)
    assert found.ranked[0].candidate == best.candidate
    assert found.ranked[0].score == best.score
    assert found.pruned > 0
    assert len(found.evaluated) + found.pruned == len(list(candidates(space())))


@pytest.mark.parametrize(
    ("lengths", "burstiness", "changes", "goal"),
    [
        ("prompt=100,output=4,cv=0.3", 0.3, {"chunk_tokens": (300,)}, Goal(Targets(29.906, 18.9604))),
        ("prompt=1000,output=4,cv=1.0", 0.3, {"chunk_tokens": (300, 512)}, Goal(Targets(315.694, 80.0))),
        ("prompt=1000,output=20,cv=0.3", 1.0, {}, Goal(Targets(119.632, 19.3423), 0.5)),
    ],
)
def test_where_a_target_is_at_the_edge_of_reach_it_finds_what_an_exhaustive_search_finds(
    lengths: str, burstiness: float, changes: dict[str, Any], goal: Goal
) -> None:
    """Attainment comes and goes with the rate there."""
    requests, few = parse_lengths(lengths, burstiness=burstiness), space(**changes)
    found = best_scores(search(few, requests, goal).evaluated)
    assert found == best_scores(exhaustive(few, requests, goal))


def best_scores(evaluated: list[Evaluated]) -> list[float]:
    """Scores of the five best."""
    best: dict[tuple[object, ...], float] = {}
    for one in evaluated:
        best[one.candidate.kinds] = max(best.get(one.candidate.kinds, 0.0), one.score if one.exact else 0.0)
    return sorted(best.values())[-5:]


def test_no_bound_is_below_what_a_layout_reaches_whose_prefill_keeps_bursts_from_its_decodes() -> None:
    requests = parse_lengths("prompt=1000,output=150,cv=0.05", burstiness=0.3)
    goal = Goal(Targets(5000.0, 20.5985), 0.99)
    few = space(nodes={"default": (3,)}, options=(option(1), option(2)), chunk_tokens=(300, 512))
    candidate = next(c for c in candidates(few) if c.name.startswith("1 prefill TP1 PP1 + 1 decode TP2 PP1"))
    found = goodput(candidate.layout, requests.of_length(2000), goal, ceiling=20.0)
    evaluated = {one.candidate.name: one for one in exhaustive(few, requests, goal)}
    assert evaluated[candidate.name].goodput == found > 4.0


def two_pools() -> Space:
    """Six devices, two of them of a cheaper and slower kind."""
    fast = tuple(replace(option(tp), pool="fast", dollars_per_hour=3.0 * tp) for tp in (1, 2))
    slow = replace(option(1, name="slow TP1", pool="slow"), dollars_per_hour=1.0)
    slow = replace(slow, group=replace(slow.group, latency=slow.group.latency.times(2.0)))
    return space(options=(*fast, slow), nodes={"fast": (2, 2), "slow": (2,)})


@pytest.mark.parametrize(
    ("targets", "objective"),
    [
        (Targets(250.0, 60.0), "per-device"),
        (Targets(600.0, 30.0), "per-dollar"),
        (Targets(250.0, 60.0), "total"),
    ],
)
def test_of_pools_with_prices_it_finds_what_an_exhaustive_search_finds(targets: Targets, objective: Objective) -> None:
    """The same kinds of layouts, each as good as the best of its kind is."""
    goal = Goal(targets)
    found = search(two_pools(), REQUESTS, goal, objective)
    every = exhaustive(two_pools(), REQUESTS, goal, objective)
    best = ranking([lambda _: every], REQUESTS, goal, objective)
    assert found.ranked[0].candidate == best[0].candidate
    assert [(one.candidate.kinds, one.score) for one in found.ranked] == [
        (one.candidate.kinds, one.score) for one in best
    ]
    assert found.pruned > 0


def test_the_ranking_is_of_kinds_with_intervals() -> None:
    found = searched()
    scores = [ranked.score for ranked in found.ranked]
    assert scores == sorted(scores, reverse=True)
    assert len({ranked.candidate.kinds for ranked in found.ranked}) == len(found.ranked) == 5
    assert all(ranked.interval.low <= ranked.interval.mean <= ranked.interval.high for ranked in found.ranked)
    assert all(ranked.steady for ranked in found.ranked)


def quick() -> Space:
    """Eight groups that are so fast that 2000 requests come and go before a queue keeps anybody from a target."""
    plain = option(1)
    fast = replace(plain, group=replace(plain.group, latency=plain.group.latency.times(0.02)))
    return space(nodes={"default": (8,)}, options=(fast,))


PATIENT = Goal(Targets(5000.0, 50.0))
LONG = REQUESTS.of_length(200_000)


def test_a_run_is_not_long_enough_because_its_goodput_is_the_bound() -> None:
    for ranked in search(quick(), REQUESTS, PATIENT).ranked:
        layout = ranked.candidate.layout
        assert ranked.goodput < 1.1 * goodput_near(layout, LONG, PATIENT, ranked.goodput)


def test_the_cheapest_layout_for_a_rate_attains_it_for_as_long_as_the_target_hides_a_queue() -> None:
    most = {ranked.candidate.devices: ranked.goodput for ranked in search(quick(), REQUESTS, PATIENT).ranked}
    rate = 1.15 * max(goodput / devices for devices, goodput in most.items())
    assert attains(cheapest(quick(), REQUESTS, PATIENT, rate).layout, LONG, rate, PATIENT)


def test_sizes_of_a_kind_are_told_of_runs_as_long_as_those_of_its_best() -> None:
    found = search(quick(), REQUESTS, GOAL)
    best = {ranked.candidate.kinds: ranked for ranked in found.ranked}
    assert all(ranked.steady and ranked.requests > len(REQUESTS) for ranked in found.ranked)
    sizes = [one for ranked in found.ranked for one in ranked.sizes]
    assert len({one.candidate.devices for one in sizes}) > 5
    for one in sizes:
        assert one.goodput / one.candidate.devices < 1.1 * best[one.candidate.kinds].score


APART = frozenset({Role.PREFILL, Role.DECODE})


def test_of_kinds_with_many_layouts_round_numbers_are_looked_at_and_then_what_is_next_to_the_best() -> None:
    many = space(24, options=(option(1),), roles=APART, chunk_tokens=(2048,))
    found = search(many, REQUESTS, GOAL)
    shares = [one.candidate for one in found.evaluated]
    assert found.between > 0 < found.pruned
    assert len(found.evaluated) + found.pruned + found.between == len(list(candidates(many)))
    assert all(count in {*range(1, 9), 10, 12, 14, 16, 20} for one in shares for count in (one.prefills, one.decodes))
    best = found.ranked[0]
    around = [one for one in candidates(many) if distance(one, best.candidate) <= 1]
    assert len(around) > 2
    requests = REQUESTS.of_length(best.requests)
    near = goodput_near(best.candidate.layout, requests, GOAL, best.goodput)
    for one in around:
        alike = goodput_near(one.layout, requests, GOAL, best.goodput)
        assert alike / one.devices < 1.02 * near / best.candidate.devices


def distance(one: Candidate, other: Candidate) -> int:
    return sum(abs(a - b) for a, b in zip(one.totals, other.totals, strict=True))


def test_beside_another_search_only_kinds_that_may_be_ranked_are_bisected_and_a_few() -> None:
    """Four kinds apart are told whatever the other search found, as a plan says which way is better."""
    apart = space(8, options=(option(1), option(2)), roles=APART, chunk_tokens=(512, 2048))
    alone = look(apart, REQUESTS, GOAL)
    assert isinstance(alone, Looked)
    dreams = [replace(one, score=1e3) for one in best_of_kinds(alone.evaluated)]
    beside = look(apart, REQUESTS, GOAL, beside=dreams)
    assert isinstance(beside, Looked)
    assert sum(one.exact for one in beside.evaluated) < sum(one.exact for one in alone.evaluated)
    assert best_scores(beside.evaluated)[-4:] == best_scores(alone.evaluated)[-4:]
    ranked: list[Ranked] = ranking([lambda _: dreams, beside.reaching], REQUESTS, GOAL, "per-device")
    assert len(ranked) >= 5


def test_total_goodput_takes_all_devices_and_dollars_count() -> None:
    total = search(space(), REQUESTS, GOAL, "total").ranked[0]
    assert total.candidate.devices == 4
    dear = tuple(replace(known, dollars_per_hour=float(known.devices**3)) for known in space().options)
    assert search(space(options=dear), REQUESTS, GOAL).ranked[0].candidate.decode.devices > 1
    assert search(space(options=dear), REQUESTS, GOAL, "per-dollar").ranked[0].candidate.decode.devices == 1


def test_layouts_stay_within_pools_less_what_the_learner_has() -> None:
    nodes = {"default": (4,), "other": (2,)}
    options = (option(1), option(2, pool="other", name="other TP2"))
    found = list(candidates(space(options=options, nodes=nodes, learner_devices={"default": 1})))
    assert {candidate.name for candidate in found if candidate.prefill is None} == {
        *(f"{count} x TP1 PP1, chunks of 2048" for count in (1, 2, 3)),
        "1 x other TP2, chunks of 2048",
    }
    mixed = [c for c in found if c.prefill and c.prefill.pool != c.decode.pool]
    assert {(c.prefills, c.decodes) for c in mixed if c.decode.pool == "other"} == {(1, 1), (2, 1), (3, 1)}
    assert not any(candidate.near for candidate in mixed)


def test_layouts_are_near_within_the_nodes_of_their_own_pool() -> None:
    """Two nodes of two devices, and one of eight."""
    options = option(1, pool="small"), option(1, pool="large", name="large TP1")
    found = [c for c in candidates(space(options=options, nodes={"small": (2, 2), "large": (8,)})) if c.prefill]
    near = {(c.prefills, c.decodes, c.nodes) for c in found if c.near and c.decode.pool == "small"}
    assert near == {(1, 1, 1), (1, 1, 2)}
    assert max(c.devices for c in found if c.near and c.decode.pool == "large") == 8
    mixed = next(c for c in found if c.prefill is options[0] and c.decode is options[1] and c.prefills == 3)
    assert [group.host for group in mixed.layout.groups] == [0, 0, 1, 2]
    assert mixed.num_links == 2


def test_what_fits_a_node_stays_in_it_and_is_repeated() -> None:
    found = [c for c in candidates(space(8, options=(option(2),))) if c.prefill]
    near = {(c.prefills, c.decodes, c.nodes) for c in found if c.near}
    assert near == {(1, 1, 1), (1, 1, 2)}
    assert {(c.prefills, c.decodes) for c in found if not c.near} == {(1, 2), (1, 3), (2, 1), (2, 2), (3, 1)}
    assert all(candidate.devices <= 8 for candidate in found)


def uneven(**changes: Any) -> Space:
    """Two nodes of three devices, and one of two: four groups of TP2 would not fit, though they have the devices."""
    return space(options=(option(1), option(2), option(1, 3)), nodes={"default": (3, 3, 2)}, **changes)


UNEVEN = Topology(
    nodes=(
        NodeKind(name="a", device="default", devices=3, memory_gb=80, count=2),
        NodeKind(name="b", device="default", devices=2, memory_gb=80),
    ),
    links=(
        *(Wire(within=name, gb_per_s=100) for name in "ab"),
        *(Wire(between=pair, gb_per_s=10) for pair in (("a", "a"), ("a", "b"))),
    ),
)


def test_every_layout_has_a_place_where_groups_do_not_divide_nodes() -> None:
    found = list(candidates(uneven()))
    assert all(packed(candidate, UNEVEN) for candidate in found)
    alone = {(c.decode.name, c.decodes) for c in found if c.prefill is None}
    assert alone == {
        *(("TP1 PP1", n) for n in range(1, 9)),
        *(("TP2 PP1", n) for n in (1, 2, 3)),
        *(("TP1 PP3", n) for n in (1, 2)),
    }
    apart = {
        (c.prefills, c.decodes)
        for c in found
        if c.prefill and (c.prefill.name, c.decode.name) == ("TP2 PP1", "TP1 PP1")
    }
    assert {(1, 6), (2, 4), (3, 2)} <= apart
    assert not apart & {(1, 7), (2, 5), (3, 3), (4, 1)}


def test_the_best_of_those_that_have_a_place_is_found() -> None:
    wide = uneven(roles=frozenset({Role.BOTH}))
    every = exhaustive(wide, REQUESTS, GOAL, "total")
    best = ranking([lambda _: every], REQUESTS, GOAL, "total")
    found = search(wide, REQUESTS, GOAL, "total").ranked
    assert found[0].candidate == best[0].candidate
    assert {ranked.candidate.name for ranked in found} >= {"3 x TP2 PP1, chunks of 2048"}
    assert [packed(ranked.candidate, UNEVEN) for ranked in found]


def test_links_are_as_near_as_the_groups() -> None:
    near = Candidate(space(8), option(1), option(1), 2, 1, 2048, near=True, nodes=2)
    assert [group.island for group in near.layout.groups] == [0, 0, 1, 1, 0, 1]
    assert near.layout.links == (Link(0.003, 0.1),) * 4
    far = Candidate(space(8), option(1), option(2), 4, 2, 2048)
    assert far.layout.links == (Link(0.03, 0.5),) * 2
    assert [far.layout.paths[giver, 4] for giver in range(4)] == [0, 1, 0, 1]


def test_a_slow_link_makes_colocated_win() -> None:
    slow = alike(Link(3.0), Link(3.0))
    assert search(space(fabric=slow), REQUESTS, GOAL).ranked[0].candidate.prefill is None


def test_shapes_without_room_are_refused_with_the_reason() -> None:
    small = option(1, name="small")
    small = replace(small, group=replace(small.group, kv_tokens=3000))
    options = small, option(2), option(8), option(2, stages=4)
    found = search(space(options=options, refused={"TP1 PP8": "8 stages, 6 layers"}), REQUESTS, GOAL)
    assert found.refused["TP8 PP1"] == "8 tensor parallel ranks, but 4 devices in a node"
    assert found.refused["TP2 PP4"] == "needs 8 devices, and the pool default has 4 to serve with"
    assert found.refused["TP1 PP8"] == "8 stages, 6 layers"
    assert "room for 3000 tokens" in found.refused["small, chunks of 2048"]
    assert all("small" not in result.candidate.name for result in found.evaluated)


def drafting(tp: int = 1) -> Option:
    """16 sequences in a batch, 80 rows with drafts."""
    known = option(tp, name=f"TP{tp} PP1 with drafts")
    return replace(known, group=replace(known.group, max_sequences=16, speculation=Speculation(2.0, rows=5)))


def test_of_sizes_of_steps_only_those_without_room_for_drafts_are_left_out() -> None:
    few = tuple(replace(one, group=replace(one.group, max_sequences=16)) for one in (option(1), option(2)))
    found = search(space(options=(*few, drafting()), chunk_tokens=(64, 512)), REQUESTS, GOAL)
    left_out = {name for name, why in found.refused.items() if "steps of 64 tokens leave no room for prompts" in why}
    assert left_out == {
        "TP1 PP1 with drafts, chunks of 64",
        *(f"TP{tp} PP1 + TP1 PP1 with drafts, chunks of 64" for tp in (1, 2)),
    }
    kinds = {(one.candidate.decode.name, one.candidate.chunk_tokens) for one in found.evaluated}
    assert {("TP1 PP1 with drafts", 512), ("TP1 PP1", 512), ("TP1 PP1", 64)} & kinds
    assert ("TP1 PP1 with drafts", 64) not in kinds


def test_if_no_size_of_steps_has_room_it_is_said_of_each() -> None:
    only = space(options=(drafting(),), chunk_tokens=(64, 80))
    with pytest.raises(ConfigError, match=r"chunks of 64: .* steps of 64 .* chunks of 80: .* beside 80 rows"):
        search(only, REQUESTS, GOAL)


def test_groups_that_are_too_slow_for_the_targets_at_any_rate_are_listed_with_what_they_take() -> None:
    """TP1 takes 15 ms and 0.1 ms per token to prefill, TP2 less."""
    unloaded = serve(Layout((replace(option(1).group, role=Role.BOTH),)), REQUESTS, 1e-3).outcome.ttft_ms
    found = search(space(), REQUESTS, Goal(Targets(float(np.quantile(unloaded, 0.8)), 50.0)))
    too_slow = {name: why for name, why in found.refused.items() if why.startswith("too slow even without load: ")}
    assert {"TP1 PP1 to prefill, chunks of 2048", "TP1 PP1, chunks of 2048"} <= set(too_slow)
    assert not any("TP2" in name or "to decode" in name for name in too_slow)
    took = np.quantile(unloaded, 0.9, method="lower")
    assert f"TTFT is {took:.0f} ms for 90% of requests" in too_slow["TP1 PP1, chunks of 2048"]


def test_where_nothing_attains_the_targets_each_kind_is_listed_with_the_reason() -> None:
    few = space(options=(option(1), option(2)), refused={"TP8": "8 ranks, but 4 devices"})
    found = look(few, REQUESTS, Goal(Targets(500.0, 1.0)))
    assert isinstance(found, Nothing)
    assert "no layout attains" in found.error.message
    assert found.refused.pop("TP8") == "8 ranks, but 4 devices"
    assert set(found.refused) == {f"TP{tp} PP1{does}" for tp in (1, 2) for does in (" to decode", ", chunks of 2048")}
    assert all("TPOT is " in why and why.endswith("and is to be 1") for why in found.refused.values())


def test_of_too_many_kinds_that_do_not_fit_the_error_tells_a_few() -> None:
    refused = {f"TP{tp}": f"needs {tp} GB" for tp in range(50)}
    with pytest.raises(ConfigError, match=r"TP7: needs 7 GB; 42 more, for other reasons$"):
        search(space(options=(), refused=refused), REQUESTS, GOAL)


def test_impossible_targets_are_answered_with_the_best_reachable() -> None:
    with pytest.raises(ConfigError, match=r"ttft=1 ms and tpot=50 ms .* TTFT \d+.* ms with .* TPOT [\d.]+ ms with"):
        search(space(), REQUESTS, Goal(Targets(1.0, 50.0)))
    only = space(options=(option(1),))
    goal = Goal(Targets(500.0, 50.0, 1.0, shares=(("ttft", 0.5),)))
    said = r"tpot=50 ms and e2e=1 ms for 90 % of requests, ttft=500 ms for 50 % of requests at .* E2E \d+ ms with"
    with pytest.raises(ConfigError, match=said):
        search(only, REQUESTS, goal)
    with pytest.raises(ConfigError, match="at any rate"):
        search(space(), REQUESTS, Goal(Targets(500.0, 1.0)))


def test_targets_that_are_missed_by_little_cost_a_simulation_for_each_kind_of_layout(monkeypatch) -> None:
    """By so little that no bound says so: pools of groups have some slack."""
    few = space(options=(option(1),), nodes={"default": (4, 4)}, roles=frozenset({Role.BOTH}))
    every = list(candidates(few))
    spread = serve(every[0].layout, REQUESTS.with_gaps(np.ones(len(REQUESTS))), 1e-3).outcome
    goal = Goal(Targets(float(np.quantile(spread.ttft_ms, 0.89)), 50.0), 0.9)
    assert not any(one.goodput for one in exhaustive(few, REQUESTS, goal))
    runs: list[float] = []

    def counted(layout: Layout, requests: Workload, rate: float) -> Served:
        runs.append(rate)
        return serve(layout, requests, rate)

    monkeypatch.setattr("placement.search.serve", counted)
    monkeypatch.setattr("placement.search.goodput", lambda *_, **__: pytest.fail("a layout was simulated"))
    found = look(few, REQUESTS, goal)
    assert isinstance(found, Nothing)
    assert [*found.refused] == ["TP1 PP1, chunks of 2048"]
    assert (len(runs), len(every)) == (2, 8)  # once to know, and once to tell


def test_the_cheapest_layout_for_a_rate_is_no_larger_than_needed() -> None:
    found = cheapest(space(), REQUESTS, GOAL, 2.0)
    smaller = [c for c in candidates(space()) if c.devices < found.devices]
    best = max((result.goodput for result in searched_exhaustively() if result.candidate in smaller), default=0)
    assert best < 2.0
    with pytest.raises(ConfigError, match=r"at 500 requests/s: the most is [\d.]+ requests/s on average, [\d.]+"):
        cheapest(space(), REQUESTS, GOAL, 500.0)


def test_by_the_objective_total_too_the_cheapest_layout_for_a_rate_has_the_fewest_devices() -> None:
    assert cheapest(space(), REQUESTS, GOAL, 2.0, "total") == cheapest(space(), REQUESTS, GOAL, 2.0)


def test_a_layout_that_a_lucky_draw_of_requests_attains_the_rate_with_is_not_the_cheapest_for_it() -> None:
    alone = max((one for one in searched_exhaustively() if one.candidate.devices == 1), key=lambda one: one.goodput)
    rate, layout = alone.goodput, alone.candidate.layout
    others = [attains(layout, drawn, rate, GOAL) for drawn in draws(REQUESTS)]
    assert attains(layout, REQUESTS, rate, GOAL)
    assert not all(others)
    found = cheapest(space(), REQUESTS, GOAL, rate)
    assert found.devices > 1
    assert all(attains(found.layout, drawn, rate, GOAL) for drawn in draws(REQUESTS))
    assert attains(found.layout, REQUESTS.of_length(6000), rate, GOAL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learner_devices": {"default": 4}}, "the pool default has 4 devices, of which the learner has 4"),
        ({"options": (option(1, pool="gpus"),)}, "the pool gpus has 0 devices"),
        ({"chunk_tokens": ()}, "at least one size"),
    ],
)
def test_a_space_without_room_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        space(**changes)


def test_a_model_that_fits_nowhere_is_refused_with_the_reasons() -> None:
    with pytest.raises(ConfigError, match="can't be placed on these devices: TP1: needs 26 GB of 24 GB"):
        search(space(options=(), refused={"TP1": "needs 26 GB of 24 GB"}), REQUESTS, GOAL)
