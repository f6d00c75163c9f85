"""What looking at every layout of a small space finds, each in runs that last: what a search is held against.

    python -m tests.placement.every_layout --spaces 200

draws spaces (drawn_spaces.py), and tells of each whether the layout that the search ranks first is the best of all. It
is a tie where another layout is better by no more than luck: the 95 % intervals of their scores overlap. Exit status 1
if a layout is worse than the best, or a search finds nothing where there is something, or the other way round.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Literal

from core.errors import ConfigError
from placement.candidates import Candidate, candidates
from placement.goodput import goodput_near, interval
from placement.lasting import LONGER_RUN, MOST_REQUESTS, STEADY, lasting
from placement.search import search
from tests.placement.drawn_spaces import Drawn, drawn

Verdict = Literal["same", "tie", "worse", "nothing", "nothing by one"]


@dataclass(frozen=True)
class Told:
    """Score in runs that last, and its 95 % interval."""

    candidate: Candidate
    score: float
    low: float
    high: float

    def ties(self, other: Told) -> bool:
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Compared:
    """`nothing`: no layout attains the goal, by both. `loss`: of the best score, what the one that was found lacks."""

    verdict: Verdict
    layouts: int
    found: str = ""
    best: str = ""
    loss: float = 0.0

    @property
    def agrees(self) -> bool:
        return self.verdict in ("same", "tie", "nothing")


def compared(asked: Drawn) -> Compared:
    every, layouts = every_layout(asked), len([*candidates(asked.space)])
    try:
        name = search(asked.space, asked.workload, asked.goal, asked.objective).ranked[0].candidate.name
    except ConfigError:
        name = ""
    best = every[0] if every else None
    found = next((one for one in every if one.candidate.name == name), None)
    if found is None or best is None:
        agrees = best is None and not name
        return Compared("nothing" if agrees else "nothing by one", layouts, name, best.candidate.name if best else "")
    verdict: Verdict = "same" if found is best else "tie" if found.ties(best) else "worse"
    return Compared(verdict, layouts, name, best.candidate.name, 1 - found.score / best.score)


def every_layout(asked: Drawn) -> list[Told]:
    """All that attain the goal, the best first."""
    found = [told for one in candidates(asked.space) if (told := _told(one, asked)) is not None]
    return sorted(found, key=lambda told: (-told.score, told.candidate.devices))


def _told(one: Candidate, asked: Drawn) -> Told | None:
    """By runs so long that those three times as long agree. None if it can't be, or no rate attains the goal."""
    try:
        one.layout.check(asked.workload)
    except ConfigError:
        return None
    requests, near, rate = 0, 0.0, 1.0
    while rate > 2 * near:  # goodput_near goes no further than to four times as much
        near, requests = rate, lasting(one, asked.workload, rate, asked.goal)
        rate = _in_run(one, asked, requests, near)
    while rate and LONGER_RUN * requests <= MOST_REQUESTS:
        longer = _in_run(one, asked, LONGER_RUN * requests, rate)
        if abs(longer / rate - 1) <= STEADY:
            break
        requests, rate = LONGER_RUN * requests, longer
    if rate == 0.0:
        return None
    found = interval(one.layout, asked.workload.of_length(requests), asked.goal, near=rate)
    cost = one.cost(asked.objective)
    return Told(one, found.mean / cost, found.low / cost, found.high / cost)


def _in_run(one: Candidate, asked: Drawn, requests: int, near: float) -> float:
    return goodput_near(one.layout, asked.workload.of_length(requests), asked.goal, near)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--spaces", type=int, default=100)
    parser.add_argument("--devices", type=int, default=8, help="at the most")
    parser.add_argument("--seed", type=int, default=0, help="of the first")
    given = parser.parse_args()
    counts, disagreeing = Counter[Verdict](), 0
    for seed in range(given.seed, given.seed + given.spaces):
        row = compared(drawn(seed, given.devices))
        counts[row.verdict] += 1
        disagreeing += not row.agrees
        names = row.found if row.verdict == "same" else f"{row.found} | {row.best}"
        print(f"{seed:6} {row.layouts:5} layouts  {row.verdict:8} {row.loss:6.1%}  {names}", flush=True)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()))
    return 1 if disagreeing else 0


if __name__ == "__main__":
    sys.exit(main())
