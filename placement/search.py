"""Which layout serves a workload best on the devices there are.

Every layout of the space has a bound (pools.py). They are looked at in the order of these. One whose bound is not
above the best goodput of its kind, or of the kinds that are to be ranked, is left out; one that fails at the rate it
would need is left at that; the others are bisected.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import numpy as np

from core.errors import ConfigError
from placement.bounds import Demand
from placement.candidates import Candidate, Objective, Option, Space, candidates
from placement.goodput import UNLOADED, Goal, attains, draws, goodput, limits_of, next_rate
from placement.lasting import LONGER_RUN, NUM_RANKED, OF_EITHER, Evaluated, Ranked, lasting, order, ranking
from placement.layout import Role
from placement.native import serve
from placement.outcome import Outcome
from placement.pools import most_each, sized, why_none
from placement.refusals import by_reason, reached, too_slow
from placement.slo import shown
from placement.workload import Workload

_DECODES_REACH = 0.8
"""Of its bound, where a group that prefills reaches all of it."""
_REASONS = 8
"""That an error tells."""
_MANY = 128
"""Layouts of a kind. Of one with more those with round numbers of groups are looked at."""


_Bounded = tuple[float, float, Candidate]
"""Score and rate that a layout cannot pass."""


@dataclass
class Looked:
    """The layouts of a space, as far as short runs have told them. `refused`: what cannot run, or is too slow for the
    targets at any rate, and why; `between`: how many were left to be looked at around the best (lasting.py). Those that
    are `bounded` are looked at in this `order`; `others`: scores of what another search found, to be ranked beside."""

    most: _Most
    objective: Objective
    bounded: list[_Bounded]
    order: list[int]
    refused: dict[str, str]
    between: int
    others: list[float]
    found: dict[int, Evaluated] = field(default_factory=dict)
    best: dict[tuple[object, ...], float] = field(default_factory=dict)

    @property
    def evaluated(self) -> list[Evaluated]:
        """Every layout that was simulated."""
        return [self.found[place] for place in sorted(self.found)]

    @property
    def pruned(self) -> int:
        """How many could not get there by their bounds."""
        return len(self.bounded) - len(self.found)

    def reaching(self, score: float) -> list[Evaluated]:
        """What is `evaluated` once the best layout of each kind is known that may be ranked, or passes the score."""
        last = self._last(score)
        for place in self.order:
            most, bound, candidate = self.bounded[place]
            to_beat = max(self.best.get(candidate.kinds, 0.0), last)
            if most <= to_beat or self._told(place, to_beat):
                continue
            result = _evaluate(candidate, bound, to_beat, self.most, self.objective)
            self.found[place] = result
            if result.exact:
                self.best[candidate.kinds] = result.score
                last = self._last(score)
        return self.evaluated

    def _last(self, score: float) -> float:
        return min(_last_ranked([*self.best.values()], self.others), score)

    def _told(self, place: int, to_beat: float) -> bool:
        """Whether it is known if the layout is better."""
        known = self.found.get(place)
        if known is None or known.exact:
            return known is not None
        return known.goodput <= _needed(known.candidate, to_beat, self.objective)


@dataclass
class Found(Looked):
    """`ranked`: the best layout of each of the best kinds, best first."""

    ranked: list[Ranked] = field(default_factory=list)


@dataclass(frozen=True)
class Nothing:
    """No layout will do: `error` says so, and what is reachable; `refused` as in Found."""

    error: ConfigError
    refused: dict[str, str]


def search(space: Space, workload: Workload, goal: Goal, objective: Objective = "per-device") -> Found:
    """Raises ConfigError if no layout can run, or none reaches the goal at any rate: then it says what is reachable."""
    looked = look(space, workload, goal, objective)
    if isinstance(looked, Nothing):
        raise looked.error
    ranked = ranking([looked.reaching], workload, goal, objective)
    return Found(**vars(looked), ranked=ranked)


def look(
    space: Space,
    workload: Workload,
    goal: Goal,
    objective: Objective = "per-device",
    beside: Sequence[Evaluated] = (),
) -> Looked | Nothing:
    """The best of each kind of layout in short runs; exactly, of those that are to be ranked: NUM_RANKED of these and
    of what another search found, the best of each of its kinds, `beside` this one, and OF_EITHER of these at least. Of
    further ones when they are asked for."""
    refused, most = _refused(space), _Most(space, workload, goal)
    try:
        every = _bounded(most, objective, refused)
    except ConfigError as error:
        return Nothing(error, refused)
    bounded = _thinned(every)
    likely, others = _likely_first(bounded, most, objective), [one.score for one in beside]
    looked = Looked(most, objective, bounded, likely, refused | most.slow, len(every) - len(bounded), others)
    looked.reaching(math.inf)
    if not any(looked.best.values()):
        return _unreachable(most, refused, [(bound, candidate) for _, bound, candidate in bounded])
    return looked


def _thinned(bounded: list[_Bounded]) -> list[_Bounded]:
    """Without those between round numbers, of kinds with many: each is next to one that is left, at an eighth of its
    groups at the most."""
    of_kind = Counter(candidate.kinds for *_, candidate in bounded)

    def looked_at(one: Candidate) -> bool:
        return of_kind[one.kinds] <= _MANY or all(map(_is_round, (one.prefills, one.decodes)))

    return [entry for entry in bounded if looked_at(entry[2])]


def _is_round(count: int) -> bool:
    """Its binary digits after the first three are 0."""
    return count % (1 << max(0, count.bit_length() - 3)) == 0


def _likely_first(bounded: list[_Bounded], most: _Most, objective: Objective) -> list[int]:
    """Places in the order in which to look. Of each kind the layout that is likely to be the best comes first: the more
    is known to be beaten, the fewer have to be looked at for long. Groups that decode mostly stay further below their
    bound than those that prefill."""

    def likely(option: Option, role: Role, chunk_tokens: int) -> float:
        return most(option, role, chunk_tokens) * (_DECODES_REACH if role is Role.DECODE else 1.0)

    first: dict[tuple[object, ...], tuple[float, int]] = {}
    for place, (score, _, candidate) in enumerate(bounded):
        expected = candidate.most_rate(likely, 0.0) / candidate.cost(objective)
        if score > 0.0 and (expected, -place) > first.get(candidate.kinds, (0.0, 0)):
            first[candidate.kinds] = expected, -place
    chosen = [-place for _, place in sorted(first.values(), reverse=True)]
    return [*dict.fromkeys([*chosen, *range(len(bounded))])]


def _last_ranked(best: list[float], others: list[float]) -> float:
    """What a kind of layout has to reach to be ranked."""

    def last(scores: list[float], ranked: int) -> float:
        return sorted(scores, reverse=True)[ranked - 1] if len(scores) >= ranked else 0.0

    return min(last([*best, *others], NUM_RANKED), last(best, OF_EITHER))


def exhaustive(space: Space, workload: Workload, goal: Goal, objective: Objective = "per-device") -> list[Evaluated]:
    """Every layout that `look` has to do with bisected, best first: what `search` is checked against."""
    most = _Most(space, workload, goal)
    found = [
        _evaluate(candidate, bound, 0.0, most, objective)
        for _, bound, candidate in _thinned(_bounded(most, objective, _refused(space)))
    ]
    return sorted(found, key=order)


def cheapest(
    space: Space, workload: Workload, goal: Goal, rate: float, objective: Objective = "per-device"
) -> Candidate:
    """The layout with the fewest devices, or with the objective per-dollar the lowest price, that attains the goal at
    `rate` requests/s for sure. Raises ConfigError with the highest rate found if none does."""
    bounded = _bounded(_Most(space, workload, goal), "total", _refused(space))
    able = [candidate for _, bound, candidate in bounded if bound >= rate]
    price: Objective = "per-dollar" if objective == "per-dollar" else "per-device"  # by total all would cost the same
    for candidate in sorted(able, key=lambda candidate: candidate.cost(price)):
        if _surely_attains(candidate, workload, rate, goal):
            return candidate
    best = search(space, workload, goal, "total").ranked[0]
    devices = sum(map(sum, space.nodes.values()))
    raise ConfigError(
        f"no layout on {devices} devices attains the targets at {rate:g} requests/s: the most is "
        f"{shown(best.goodput)} requests/s on average, {shown(best.interval.low)} at the lower end of its 95 % "
        f"interval, with {best.candidate.name}; add devices, or relax the targets"
    )


def _surely_attains(candidate: Candidate, workload: Workload, rate: float, goal: Goal) -> bool:
    """As the workload comes, in each of the other draws, and in a run that is LONGER_RUN times as long."""
    layout, requests = candidate.layout, workload.of_length(lasting(candidate, workload, rate, goal))
    longer = workload.of_length(LONGER_RUN * len(requests))
    return all(attains(layout, drawn, rate, goal) for drawn in chain([requests], draws(requests), [longer]))


def _refused(space: Space) -> dict[str, str]:
    reasons = {option.name: space.why_not(option) for option in space.options}
    return dict(space.refused) | {name: why for name, why in reasons.items() if why is not None}


def _bounded(most: _Most, objective: Objective, refused: dict[str, str]) -> list[_Bounded]:
    """Score and rate that each candidate cannot pass, highest score first. Of equals the dearest is first, as many
    groups share their luck, so that it is mostly the best and the others need one look; then the fewest devices."""
    space, workload = most.space, most.workload
    kv_tokens = Demand.of(workload, space.handoff_min_tokens).kv_tokens * most.goal.share
    rated = [
        (candidate.most_rate(most, kv_tokens), candidate)
        for candidate in _fitting(candidates(space), workload, refused)
    ]
    if not rated:
        if not refused:
            there = " and ".join(f"{space.budget(pool)} {pool}" for pool in space.nodes)
            refused["layouts apart"] = f"{there} to serve with have no room for a group to prefill and one to decode"
        raise ConfigError(f"the model can't be placed on these devices: {'; '.join(by_reason(refused, _REASONS))}")
    if free := [candidate.name for rate, candidate in rated if math.isinf(rate)]:
        raise ConfigError(f"by its latency model {free[0]} serves any rate: profile it", param="latency")
    scored = [(rate / candidate.cost(objective), rate, candidate) for rate, candidate in rated]
    return sorted(scored, key=lambda entry: (-round(entry[0], 9), -entry[2].cost(objective), entry[2].devices))


@dataclass
class _Most:
    """The bound of each kind of group, reckoned once."""

    space: Space
    workload: Workload
    goal: Goal
    known: dict[tuple[str, Role, int], float] = field(default_factory=dict)
    slow: dict[str, str] = field(default_factory=dict)
    """Groups that are too slow for the targets, whatever is beside them."""
    alone: dict[tuple[object, ...], Outcome] = field(default_factory=dict)
    drawn: dict[int, Workload] = field(default_factory=dict)

    def requests(self, candidate: Candidate) -> Workload:
        """That it is tried with."""
        if candidate.stages not in self.drawn:
            self.drawn[candidate.stages] = sized(self.workload, candidate.stages)
        return self.drawn[candidate.stages]

    def attains_alone(self, candidate: Candidate) -> bool:
        """Whether requests that come one at a time attain the goal, as many as the layout is tried with. What one takes
        then is the same for all layouts of a kind over a link, so that one of them is simulated."""
        key = candidate.kinds, candidate.link
        if key not in self.alone:
            most = len(sized(self.workload, sum(map(sum, self.space.nodes.values()))))
            asked = self.workload.of_length(min(len(self.workload), most))
            self.alone[key] = serve(candidate.layout, asked.with_gaps(np.ones(len(asked))), UNLOADED).outcome
        requests = len(self.requests(candidate))
        return limits_of(requests, self.goal).kept(self.alone[key].of_length(requests))

    def __call__(self, option: Option, role: Role, chunk_tokens: int) -> float:
        key = option.name, role, 0 if role is Role.DECODE else chunk_tokens  # decodes alone are never cut in chunks
        if key not in self.known:
            group, few = replace(option.group, role=role, chunk_tokens=chunk_tokens), self.space.handoff_min_tokens
            count = self.space.most_groups(option)
            self.known[key] = most_each(group, count, self.workload, few, self.goal)
            if self.known[key] == 0.0:
                self.slow[_told(*key)] = why_none(group, self.workload, few, self.goal)
        return self.known[key]


def _told(option: str, role: Role, chunk_tokens: int) -> str:
    """A group and what it would do."""
    does = {Role.PREFILL: " to prefill", Role.DECODE: " to decode"}.get(role, "")
    return f"{option}{does}" + (f", chunks of {chunk_tokens}" if chunk_tokens else "")


def _fitting(found: Iterable[Candidate], workload: Workload, refused: dict[str, str]) -> Iterator[Candidate]:
    verdicts: dict[tuple[object, ...], str | None] = {}
    for candidate in found:
        if candidate.kinds not in verdicts:
            verdicts[candidate.kinds] = _why_not(candidate, workload)
        if (why := verdicts[candidate.kinds]) is None:
            yield candidate
        else:
            refused.setdefault(candidate.kind_name, why)


def _why_not(candidate: Candidate, workload: Workload) -> str | None:
    """Why it can't be, or can't hold the requests."""
    try:
        candidate.layout.check(workload)
    except ConfigError as error:
        return error.message
    return None


def _evaluate(candidate: Candidate, bound: float, to_beat: float, most: _Most, objective: Objective) -> Evaluated:
    cost = candidate.cost(objective)
    if to_beat == 0.0 and not most.attains_alone(candidate):
        return Evaluated(candidate, 0.0, 0.0)
    needed = _needed(candidate, to_beat, objective)
    found = goodput(candidate.layout, most.requests(candidate), most.goal, ceiling=bound, floor=needed)
    if found < needed:
        return Evaluated(candidate, needed, needed / cost, exact=False)
    return Evaluated(candidate, found, found / cost)


def _needed(candidate: Candidate, to_beat: float, objective: Objective) -> float:
    """The lowest rate of a better score; 0 if there is none to beat."""
    return next_rate(to_beat * candidate.cost(objective)) if to_beat > 0.0 else 0.0


def _unreachable(most: _Most, refused: dict[str, str], tried: list[tuple[float, Candidate]]) -> Nothing:
    """Says how fast the fastest layouts are with one request at a time, and of those kinds that none of their groups
    makes too slow by itself why they are."""
    workload, goal = most.workload, most.goal
    best: dict[str, tuple[float, str]] = {}
    slow: dict[str, str] = {}
    for bound, candidate in {candidate.kinds: (bound, candidate) for bound, candidate in tried}.values():
        outcome = serve(candidate.layout, workload, UNLOADED).outcome
        if bound > 0.0:
            slow[candidate.kind_name] = too_slow(outcome, goal)
        for metric in goal.targets.metrics:
            ms = reached(outcome, metric, goal)
            best[metric] = min(best.get(metric, (ms, candidate.name)), (ms, candidate.name))
    reachable = " and ".join(f"{name.upper()} {shown(ms)} ms with {layout}" for name, (ms, layout) in best.items())
    error = ConfigError(
        f"no layout attains {goal.told()} at any rate; without load the best is {reachable}"
        + (f" ({len(refused)} kinds of groups were refused)" if refused else ""),
        param="slo",
    )
    return Nothing(error, refused | most.slow | slow)
