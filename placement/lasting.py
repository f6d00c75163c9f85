"""How the best kinds of layouts compare in runs that last, and with how many groups each does best in them.

The runs of a search are short, and where the rate and the target for the first token are high, over before what falls
behind is late. So of each of its best kinds the numbers of groups are looked for again from those that it found: at
what is next to the best of them, and at a few sizes, until none of these is better.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from core.errors import ConfigError
from placement.candidates import Candidate, Objective, candidates
from placement.goodput import Goal, Interval, attains, goodput_near, interval, next_rate
from placement.pools import LEAST_REQUESTS, sized
from placement.workload import Workload

NUM_RANKED = 5
"""Kinds of layouts, by shapes and chunks, that are told with a confidence interval."""
OF_EITHER = 4
"""Of a search for one way to serve that are told at the least, so that it can be held against the other way."""
LONGER_RUN = 3
STEADY = 0.05
MOST_REQUESTS = 270_000
"""Of a run; a layout whose goodput still falls then is told as not steady."""
_LASTING = 20
"""Times the target for the first token: what falls behind by a twentieth is late by that much then."""
_BUDGETS = 8
"""Numbers of devices for which the layouts of a kind are compared."""
_STRIDE = 1 / 8
"""Of all groups, that are more or fewer besides one."""


@dataclass(frozen=True)
class Evaluated:
    """`goodput` in requests/s; `score` is that by the objective. Where `exact` is false, it is what the layout was not
    good enough for: it is below."""

    candidate: Candidate
    goodput: float
    score: float
    exact: bool = True


class Lasting(NamedTuple):
    """A layout, its goodput in one draw of the requests, and how many of them the runs have that tell it."""

    candidate: Candidate
    goodput: float
    requests: int

    def score(self, objective: Objective) -> float:
        return self.goodput / self.candidate.cost(objective)


@dataclass(frozen=True)
class Ranked:
    """`goodput` is the mean of the interval: one run alone may be lucky in its requests. `steady`: its runs, of so many
    `requests`, are so long that one three times as long gives the same goodput within 5 %. `sizes`: layouts of its kind
    for a few budgets."""

    candidate: Candidate
    goodput: float
    score: float
    interval: Interval
    steady: bool
    requests: int
    sizes: tuple[Lasting, ...] = ()


def lasting(candidate: Candidate, workload: Workload, rate: float, goal: Goal) -> int:
    """Requests of a run at this rate in which a layout that is too slow by a twentieth would be late, and all of the
    workload comes; one that is LONGER_RUN times as long has no more than MOST_REQUESTS."""
    late = math.ceil(rate * _LASTING * goal.targets.ttft_ms / 1e3)
    least = min(MOST_REQUESTS // LONGER_RUN, max(len(workload), late))
    return max(len(sized(workload, candidate.stages)), least)


def best_of_kinds(evaluated: Iterable[Evaluated]) -> list[Evaluated]:
    """Best first."""
    found: dict[tuple[object, ...], Evaluated] = {}
    for result in sorted((one for one in evaluated if one.exact and one.goodput > 0.0), key=order):
        found.setdefault(result.candidate.kinds, result)
    return [*found.values()]


def order(result: Evaluated) -> tuple[float, int]:
    return -result.score, result.candidate.devices


def ranking(
    searches: Sequence[Callable[[float], Iterable[Evaluated]]], workload: Workload, goal: Goal, objective: Objective
) -> list[Ranked]:
    """The best of each kind by runs that last: of NUM_RANKED kinds of all searches, and of OF_EITHER of each; and of
    further ones as long as their short runs, which mostly tell more, say that they are better than the best. A search
    is asked for all kinds that pass a score. Raises ConfigError if none attains the goal."""
    bests = [best_of_kinds(one(math.inf)) for one in searches]
    chosen = sorted((result for best in bests for result in best), key=order)[:NUM_RANKED]
    chosen += [result for best in bests for result in best[:OF_EITHER] if result not in chosen]
    found, tried = list[Ranked](), set[tuple[object, ...]]()
    while chosen:
        found += _ranked(chosen, workload, goal, objective)
        tried |= {result.candidate.kinds for result in chosen}
        least = max((ranked.score for ranked in found), default=0.0)
        further = (result for one in searches for result in best_of_kinds(one(least)))
        untried = (one for one in further if one.score > least and one.candidate.kinds not in tried)
        chosen = sorted(untried, key=order)[:1]
    if not found:
        raise ConfigError(
            f"no layout attains {goal.told()} at any rate in longer runs than of {LEAST_REQUESTS} requests: relax them",
            param="slo",
        )
    return sorted(found, key=lambda ranked: (-ranked.score, ranked.candidate.devices))


def _ranked(chosen: Sequence[Evaluated], workload: Workload, goal: Goal, objective: Objective) -> list[Ranked]:
    """Of the kinds of these layouts those that attain the goal."""
    alike = _alike([result.candidate for result in chosen])
    kinds = [(_Kind(alike[one.candidate.kinds], workload, goal, objective), one) for one in chosen]
    return [ranked for kind, one in kinds if (ranked := kind.ranked(one)) is not None]


def _alike(chosen: Collection[Candidate]) -> dict[tuple[object, ...], list[Candidate]]:
    """All layouts of these kinds."""
    found: dict[tuple[object, ...], list[Candidate]] = {one.kinds: [] for one in chosen}
    for space in {id(one.space): one.space for one in chosen}.values():
        for one in candidates(space):
            if one.kinds in found:
                found[one.kinds].append(one)
    return found


@dataclass
class _Kind:
    """Layouts that differ in how many groups they have. `times`: its runs have as many requests as runs that `lasting`
    says, and if `steady` they are long enough; `failed`: the lowest rates at which they are known to fail."""

    alike: list[Candidate]
    workload: Workload
    goal: Goal
    objective: Objective
    times: int = 1
    steady: bool = False
    failed: dict[str, float] = field(default_factory=dict)
    known: dict[str, Lasting] = field(default_factory=dict)

    def ranked(self, start: Evaluated) -> Ranked | None:
        """In longer and longer runs, until one agrees with the next and no other layout is better. None if no rate
        attains the goal in them."""
        best = self.told(start.candidate, start.goodput)
        while best.goodput > 0.0 and (better := self.climbed(best) or self.longer(best) or self.largest(best)):
            best = better
        if best.goodput == 0.0:
            return None
        spread = interval(best.candidate.layout, self.workload.of_length(best.requests), self.goal, near=best.goodput)
        mean = spread.mean or best.goodput
        score, sizes = mean / best.candidate.cost(self.objective), tuple(self.sizes(best))
        return Ranked(best.candidate, mean, score, spread, self.steady, best.requests, sizes)

    def climbed(self, best: Lasting) -> Lasting | None:
        """The best that is found by one step after the other, each to a better one next to it; None if none is."""
        start = best
        while better := next(self.better(best, self.around(best.candidate)), None):
            best = better
        return best if best is not start else None

    def longer(self, best: Lasting) -> Lasting | None:
        """As it is in longer runs, unless that is the same: then these are `steady`. No bound holds goodput down:
        a run that is so short that any rate attains the goal in it would agree with the next then."""
        requests = LONGER_RUN * best.requests
        self.steady = False
        if requests > MOST_REQUESTS:
            return None
        longer = self.workload.of_length(requests)
        least, most = ((1 + by) * best.goodput for by in (-STEADY, STEADY))
        high = self.attains(best.candidate, longer, least)
        if high and not self.attains(best.candidate, longer, most):
            self.steady = True
            return None
        self.times *= LONGER_RUN
        self.failed.clear()
        self.known.clear()
        found = goodput_near(best.candidate.layout, longer, self.goal, most if high else least)
        return Lasting(best.candidate, found, requests)

    def better(self, best: Lasting, others: Iterable[Candidate]) -> Iterator[Lasting]:
        for one in others:
            needed = next_rate(best.score(self.objective) * one.cost(self.objective))
            if one.name not in self.known and not self.may_do(one, needed):
                continue
            found = self.told(one, needed)
            if found.score(self.objective) > best.score(self.objective):
                yield found

    def may_do(self, one: Candidate, rate: float) -> bool:
        if self.failed.get(one.name, math.inf) <= rate:
            return False
        able = self.attains(one, self.workload.of_length(self.requests(one, rate)), rate)
        if not able:
            self.failed[one.name] = rate
        return able

    def largest(self, best: Lasting) -> Lasting | None:
        """The best of the sizes, if it is better."""
        size = max(self.sizes(best), key=lambda one: one.score(self.objective))
        return size if size.score(self.objective) > best.score(self.objective) else None

    def sizes(self, best: Lasting) -> list[Lasting]:
        """For a few budgets the layout with the highest score that can be expected: what there is to choose from
        besides the best."""
        most = max(one.devices for one in self.alike)
        budgets = sorted({max(1, round(most * part / _BUDGETS)) for part in range(1, _BUDGETS + 1)})
        chosen = {one.name: one for budget in budgets if (one := self.likeliest(budget, best.candidate))}
        return [self.told(one, best.goodput * one.devices / best.candidate.devices) for one in chosen.values()]

    def likeliest(self, budget: int, best: Candidate) -> Candidate | None:
        """Of layouts that take no more devices than the budget, the largest that shares them out most as the best one
        does."""
        within, share = [one for one in self.alike if one.devices <= budget], _share(best)
        return min(within, key=lambda one: budget - one.devices + abs(_share(one) - share) * budget, default=None)

    def around(self, best: Candidate) -> list[Candidate]:
        """One group more or fewer of either role, or a stride, on each node, or in all; as many nodes more or fewer;
        and other ratios of the roles on as many devices. The nearest first."""
        totals = {*_next_to(best)}
        found = [one for one in self.alike if one.totals in totals and one.name != best.name]
        return sorted(found, key=lambda one: sum(abs(a - b) for a, b in zip(one.totals, best.totals, strict=True)))

    def told(self, one: Candidate, near: float) -> Lasting:
        if one.name not in self.known:
            requests = self.requests(one, near)
            self.known[one.name] = Lasting(one, self.in_run(one, requests, near), requests)
        return self.known[one.name]

    def attains(self, one: Candidate, requests: Workload, rate: float) -> bool:
        return attains(one.layout, requests, rate, self.goal)

    def requests(self, one: Candidate, rate: float) -> int:
        return min(MOST_REQUESTS, self.times * lasting(one, self.workload, rate, self.goal))

    def in_run(self, one: Candidate, requests: int, near: float) -> float:
        return goodput_near(one.layout, self.workload.of_length(requests), self.goal, near)


def _next_to(best: Candidate) -> Iterator[tuple[int, int]]:
    """Totals of layouts next to it."""
    prefills, decodes = best.totals
    for stride in sorted({1, best.nodes, max(1, round(_STRIDE * (prefills + decodes)))}):
        yield from ((prefills, decodes + by) for by in (stride, -stride))
        if best.prefill is None:
            continue
        yield from ((prefills + by, decodes) for by in (stride, -stride))
        common = math.gcd(best.prefill.devices, best.decode.devices)
        more, fewer = best.decode.devices // common * stride, best.prefill.devices // common * stride
        yield from ((prefills + more * sign, decodes - fewer * sign) for sign in (1, -1))
    if best.near:
        yield prefills, decodes
        yield from ((prefills + best.prefills * by, decodes + best.decodes * by) for by in (1, -1))


def _share(candidate: Candidate) -> float:
    """Of the groups, that decode."""
    return candidate.decodes / (candidate.prefills + candidate.decodes)
