"""Numbers of groups that are looked for in runs that last."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from placement.candidates import Candidate, Option, Space, candidates
from placement.goodput import Goal, goodput_near
from placement.lasting import best_of_kinds, lasting
from placement.latency import Coefficients, StepLatency
from placement.layout import Group, Role
from placement.lengths import parse_lengths
from placement.outcome import Targets
from placement.search import Found, search
from tests.placement.spaces import space

APART = frozenset({Role.PREFILL, Role.DECODE})


def long_answers(devices: int, **changes: Any) -> Space:
    """Groups that prefill 166 requests a second, or decode 160, each for 24 s: longer than a short run takes."""
    decode = Coefficients(20.0, 0.0, 0.005)
    latency = StepLatency(Coefficients(1.0, 0.005, 0.0), decode, decode, large_rows=95)
    group = Group(Role.BOTH, latency, 100_000_000, max_sequences=100_000)
    only = Option("TP1", 1, group)
    values = {"options": (only,), "nodes": {"default": (devices,)}, "chunk_tokens": (2**20,), "roles": APART}
    return space(**(values | changes))


LONG_ANSWERS = parse_lengths("prompt=1000,output=600,cv=0.3")
UNHURRIED = Goal(Targets(500.0, 40.0))


@cache
def with_long_answers() -> Found:
    return search(long_answers(8), LONG_ANSWERS, UNHURRIED)


def long_run(candidate: Candidate, near: float) -> float:
    return goodput_near(candidate.layout, LONG_ANSWERS.of_length(50_000), UNHURRIED, near) / candidate.devices


def test_numbers_of_groups_are_those_that_do_best_in_runs_that_last() -> None:
    """In short runs all of a decode group's requests are there before the first of them has ended, so that one seems
    to be enough for each that prefills."""
    shortly, ranked = best_of_kinds(with_long_answers().evaluated)[0], with_long_answers().ranked[0]
    lasts = long_run(ranked.candidate, ranked.goodput)
    assert shortly.candidate.totals == (1, 1)
    assert shortly.score > 1.1 * lasts
    assert ranked.candidate.decodes > ranked.candidate.prefills
    assert ranked.score == pytest.approx(lasts, rel=0.05)
    assert all(long_run(one, lasts * one.devices) < 1.03 * lasts for one in candidates(long_answers(8)))


def test_all_that_is_told_of_a_kind_is_of_runs_that_last() -> None:
    ranked = with_long_answers().ranked[0]
    assert ranked.steady
    assert len(ranked.sizes) > 3
    for one in ranked.sizes:
        rate = one.goodput
        assert one.requests >= lasting(one.candidate, LONG_ANSWERS, rate, UNHURRIED)
        assert rate / one.candidate.devices == pytest.approx(long_run(one.candidate, rate), rel=0.06)
        assert rate / one.candidate.devices < 1.05 * ranked.score


def priced(name: str, prompts: float, decode: Coefficients, dollars: float) -> Option:
    """Whose prompts take so many times as long as those of groups with long answers."""
    known = long_answers(2).options[0]
    prompt = known.group.latency.prompt.times(prompts)
    latency = replace(known.group.latency, prompt=prompt, decode=decode, large_decode=decode)
    return replace(known, name=name, dollars_per_hour=dollars, group=replace(known.group, latency=latency))


def test_kinds_that_are_better_in_short_runs_do_not_keep_the_best_from_being_looked_at() -> None:
    """For the price the cheap group is the best to decode in short runs, and 5 % behind in those that last; with five
    sizes of chunks that makes five kinds."""
    dear, cheap = Coefficients(10.0, 0.0, 0.005), Coefficients(20.0, 0.0, 0.0065)
    options = priced("dear", 1.0, dear, 1.0), priced("cheap", 4.0, cheap, 0.39)
    few = long_answers(2, options=options, chunk_tokens=tuple(2**20 + more for more in range(5)))
    found = search(few, LONG_ANSWERS, UNHURRIED, "per-dollar")
    shortly = best_of_kinds(found.evaluated)
    assert {one.candidate.decode.name for one in shortly[:5]} == {"cheap"}
    best = found.ranked[0]
    assert best.candidate.kinds[:2] == ("dear", "dear")
    flattered = next(one for one in found.ranked if one.candidate.decode.name == "cheap")
    assert flattered.score < 0.97 * best.score
