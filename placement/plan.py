"""The plan: which layout serves a workload best, what it is expected to reach, and why it and no other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np

from core.errors import ConfigError
from placement.candidates import Candidate, Objective, Space
from placement.crowding import not_measured_together
from placement.goodput import REPLICATIONS, Goal, half_width
from placement.lasting import LONGER_RUN, NUM_RANKED, Ranked, best_of_kinds, lasting, ranking
from placement.latency import Speculation
from placement.layout import Role
from placement.packing import Seat, packed
from placement.pareto import Point, front, point
from placement.prediction import predict
from placement.profile import ModelFacts
from placement.search import Looked, Nothing, cheapest, look, search
from placement.shapes import Shape
from placement.slo import shown
from placement.topology import Topology
from placement.workload import Workload

APART = frozenset({Role.PREFILL, Role.DECODE})
TOGETHER = frozenset({Role.BOTH})


class Spread(msgspec.Struct):
    """Of REPLICATIONS runs with other draws of the workload: mean, and the 95 % interval of it."""

    mean: float
    low: float
    high: float


class Entry(msgspec.Struct):
    """A layout. `goodput_rps` is None for one that was not bisected, and what follows too: its spread over other draws,
    goodput by the objective, and whether a run three times as long agrees."""

    name: str
    disaggregated: bool
    devices: int
    dollars_per_hour: float | None = None
    goodput_rps: float | None = None
    spread: Spread | None = None
    score: float | None = None
    steady: bool | None = None


class Plan(msgspec.Struct):
    """`predicted` is at `rate_rps`, times in ms; with `attainment`, the share of requests that meet all targets, and
    `ttft_met` and so on, those that meet each. `percentiles`: of targets that so many are to meet each by itself, the
    others together by `share`. `sources`: how the latency of each shape is known. `refused`: kinds of groups and of
    layouts that can't run, or are too slow for the targets at any rate, and why."""

    model: str
    topology: str
    sources: dict[str, str]
    objective: str
    ttft_ms: float
    tpot_ms: float
    share: float
    rate_rps: float
    chosen: Entry
    why: str
    verdict: str
    """Disaggregated against colocated."""
    predicted: dict[str, Spread]
    ranking: list[Entry]
    refused: dict[str, str]
    warnings: list[str]
    e2e_ms: float | None = None
    percentiles: dict[str, float] = {}
    drafts: str | None = None
    """With drafts against without; None where there was nothing to choose."""
    pareto: list[Point] = []
    """Of the ranked kinds of layouts, for a few budgets each, those that none of these beats in everything."""
    placed: list[Seat] = []
    """The nodes that the chosen layout takes."""
    serve: dict[str, Any] | None = None
    """The configuration of the best of these layouts that `slipstream serve` can run."""
    replan: dict[str, Any] | None = None
    """What replanning of that one goes by: the `replan` of the configuration."""


class Made(msgspec.Struct):
    """A plan, and the layouts behind it, best first: the chosen one and then the ranked."""

    plan: Plan
    candidates: list[Candidate]


def make_plan(
    space: Callable[[frozenset[Role]], Space],
    shapes: Sequence[Shape],
    topology: Topology,
    workload: Workload,
    goal: Goal,
    objective: Objective,
    rate: float | None = None,
) -> Made:
    """The layout with the best score, or with a `rate` the cheapest that attains the goal at it. `space` is asked for
    colocated and disaggregated layouts apart, so that the better of either is known. Raises ConfigError if no layout
    can run or attains the goal; then it says what is reachable."""
    if objective == "per-dollar" and not topology.priced:
        raise ConfigError("--objective per-dollar: nodes: dollars_per_hour is missing in the topology", param="nodes")
    model, asked = shapes[0].profile.model, len(workload)
    workload = workload.no_longer_than(model.max_tokens)
    together = look(space(TOGETHER), workload, goal, objective)
    beside = best_of_kinds(together.evaluated) if isinstance(together, Looked) else []
    searched = together, look(space(APART), workload, goal, objective, beside)
    found = [result for result in searched if isinstance(result, Looked)]
    if not found:
        search(space(TOGETHER | APART), workload, goal, objective)  # raises, for all of them together
        raise ConfigError("no layout attains the targets")
    ranked = ranking([result.reaching for result in found], workload, goal, objective)
    chosen = ranked[0].candidate
    if rate is not None:
        chosen = cheapest(space(TOGETHER | APART), workload, goal, rate, objective)
    at = ranked[0].goodput if rate is None else rate
    entry = next((entry for entry in ranked if entry.candidate == chosen), None)
    requests = entry.requests if rate is None and entry else lasting(chosen, workload, at, goal)
    by_name = {shape.name: shape for shape in shapes}
    plan = Plan(
        model=model.name,
        topology=topology.source,
        sources={shape.name: shape.profile.source for shape in shapes},
        objective=objective,
        ttft_ms=goal.targets.ttft_ms,
        tpot_ms=goal.targets.tpot_ms,
        share=goal.share,
        rate_rps=at,
        chosen=_entry(chosen, entry, topology.priced),
        why=_why(ranked, rate, chosen, objective, found),
        verdict=_verdict(*searched, ranked),
        drafts=_drafts(ranked, shapes),
        predicted=_predicted(chosen, workload, at, goal, max(requests, len(workload))),
        ranking=[_entry(entry.candidate, entry, topology.priced) for entry in ranked[:NUM_RANKED]],
        refused={name: why for result in searched for name, why in result.refused.items()},
        warnings=[
            *_left_out(asked - len(workload), asked, model),
            *(doubt for doubt in dict.fromkeys(shape.profile.doubt() for shape in shapes) if doubt),
            *_warnings(chosen, by_name, workload),
        ],
        e2e_ms=goal.targets.e2e_ms if "e2e" in goal.targets.metrics else None,
        percentiles=goal.targets.percentiles,
        pareto=_pareto(ranked, workload, goal, topology.priced),
    )
    try:
        plan.placed = packed(chosen, topology)
    except ConfigError as error:
        plan.warnings.append(f"the chosen layout has groups over several nodes: {error.message}")
    return Made(plan, [chosen, *(entry.candidate for entry in ranked if entry.candidate != chosen)])


def _entry(candidate: Candidate, ranked: Ranked | None, priced: bool) -> Entry:
    price = candidate.dollars_per_hour if priced else None
    entry = Entry(candidate.name, candidate.prefill is not None, candidate.devices, price)
    if ranked is None:
        return entry
    spread = Spread(ranked.interval.mean, ranked.interval.low, ranked.interval.high)
    return msgspec.structs.replace(
        entry, goodput_rps=ranked.goodput, spread=spread, score=ranked.score, steady=ranked.steady
    )


def _why(ranked: list[Ranked], rate: float | None, chosen: Candidate, objective: str, found: Sequence[Looked]) -> str:
    if rate is not None:
        cost = f"{chosen.devices} devices" if objective != "per-dollar" else f"${chosen.dollars_per_hour:g} an hour"
        sure = f"in {1 + REPLICATIONS} draws of the requests and a run {LONGER_RUN} times as long"
        return f"with {cost} it is the cheapest that attains the targets at {rate:g} requests/s, {sure}"
    tried = sum(len(result.evaluated) for result in found)
    left_out = sum(result.pruned for result in found)
    between = sum(result.between for result in found)
    counts = f"{tried} layouts were simulated, {left_out} could not beat the best by their bounds"
    counts += f", {between} lie between these, of which those around the best were tried" if between else ""
    if len(ranked) == 1:
        return f"no other kind of layout attains the targets; {counts}"
    best, second = ranked[0], ranked[1]
    apart = best.interval.low > second.interval.high
    sure = (
        "" if apart else "; the intervals overlap, so that another draw of requests may rank them the other way round"
    )
    gain = best.score / second.score - 1
    return f"{gain:.0%} more goodput {objective} than the next, {second.candidate.name}{sure}; {counts}"


def _verdict(together: Looked | Nothing, apart: Looked | Nothing, ranked: list[Ranked]) -> str:
    """Disaggregated against colocated."""
    if isinstance(together, Nothing):
        return f"disaggregate: colocated, {together.error.message}"
    if isinstance(apart, Nothing):
        return f"colocate: disaggregated, {apart.error.message}"
    one = next((entry for entry in ranked if entry.candidate.prefill is None), None)
    other = next((entry for entry in ranked if entry.candidate.prefill is not None), None)
    if one is None or other is None:
        words = ("disaggregate", "colocated") if one is None else ("colocate", "disaggregated")
        return f"{words[0]}: {words[1]}, no layout attains the targets in runs that last"
    word = "colocate" if one.score >= other.score else "disaggregate"
    gain = max(one.score, other.score) / min(one.score, other.score)
    return (
        f"{word}: {gain - 1:.0%} more; colocated {shown(one.goodput)} requests/s with {one.candidate.name}, "
        f"disaggregated {shown(other.goodput)} with {other.candidate.name}"
    )


def _drafts(ranked: list[Ranked], shapes: Sequence[Shape]) -> str | None:
    """With drafts against without."""
    speculations = [shape.speculation for shape in shapes]
    tried = next((one for one in speculations if one is not None), None)
    if tried is None or None not in speculations:
        return None
    by_drafts = [(entry.candidate.decode.group.speculation, entry) for entry in ranked]
    drafting = next(((how, entry) for how, entry in by_drafts if how is not None), None)
    plain = next((entry for how, entry in by_drafts if how is None), None)
    if drafting is None or plain is None:
        word, lacking = ("with", "without") if plain is None else ("without", "with")
        return f"{word}: none of the {len(ranked)} best kinds of layouts is {lacking} them; {_brings(tried)}"
    how, entry = drafting
    word = "with" if entry.score > plain.score else "without"
    gain = max(entry.score, plain.score) / min(entry.score, plain.score)
    return (
        f"{word}: {gain - 1:.0%} more; with them {shown(entry.goodput)} requests/s by {entry.candidate.name}, "
        f"without {shown(plain.goodput)} by {plain.candidate.name}; {_brings(how)}"
    )


def _brings(drafts: Speculation) -> str:
    return f"a step brings {drafts.acceptance_length:.3g} tokens for {drafts.rows} rows"


def _pareto(ranked: Sequence[Ranked], workload: Workload, goal: Goal, priced: bool) -> list[Point]:
    best = {one.candidate.name: (one.candidate, one.goodput, one.requests) for one in ranked}
    sizes = {one.candidate.name: one for entry in ranked for one in entry.sizes}
    known = [(one, rate, requests) for one, rate, requests in (sizes | best).values() if rate > 0.0]
    return front(point(one, rate, workload.of_length(requests), goal, priced) for one, rate, requests in known)


def _predicted(candidate: Candidate, workload: Workload, rate: float, goal: Goal, requests: int) -> dict[str, Spread]:
    """Of runs of so many requests: with fewer, queues might not have grown to what they stay at."""
    found: dict[str, list[float]] = {}
    for run in range(REPLICATIONS):
        drawn = workload.resampled(requests, np.random.default_rng((1, run)))
        prediction = predict(candidate.layout, drawn, rate, goal.targets)
        for metric in ("ttft", "tpot", "e2e"):
            for name, value in getattr(prediction, f"{metric}_ms").items():
                found.setdefault(f"{metric}_{name}", []).append(value)
        found.setdefault("attainment", []).append(prediction.attainment or 0.0)
        for metric, share in prediction.met.items():
            found.setdefault(f"{metric}_met", []).append(share)
    return {name: _spread(np.array(values)) for name, values in found.items()}


def _spread(values: np.ndarray) -> Spread:
    mean, half = float(values.mean()), half_width(values)
    return Spread(mean, mean - half, mean + half)


def _left_out(longer: int, asked: int, model: ModelFacts) -> list[str]:
    if not longer:
        return []
    return [
        f"{longer} of {asked} requests are left out: they have more than the {model.max_tokens} tokens of the model"
    ]


def _warnings(candidate: Candidate, shapes: dict[str, Shape], workload: Workload) -> list[str]:
    """What the chosen layout would do that no profile knows."""
    options = [(candidate.decode, Role.DECODE if candidate.prefill else Role.BOTH)]
    options += [(candidate.prefill, Role.PREFILL)] if candidate.prefill else []
    found = []
    for option, role in options:
        profile = shapes[option.name].profile
        group = replace(option.group, role=role, chunk_tokens=candidate.chunk_tokens)
        found += [f"{option.name} is extrapolated: it may have {what}" for what in profile.beyond(group, workload)]
        if profile.source == "roofline":
            found.append(f"{option.name} is a roofline, not measured: expect errors of tens of percent")
    together = max(Counter(group.host for group in candidate.layout.groups).values())
    crowd = not_measured_together(shapes[candidate.decode.name].profile, together)
    return list(dict.fromkeys([*found, *([crowd] if crowd else [])]))
