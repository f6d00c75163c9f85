"""From flags to a comparison: plan, then serve each of the layouts and load it at each of the rates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.planning.choice import choose, rates_of
from bench.planning.comparison import Comparison, Outcomes, Round, Run
from bench.planning.load import serving
from bench.planning.others import Others, wait_for_others
from bench.planning.pace import Pace, pace_of
from bench.planning.report import heading, lines
from bench.profiling.drafting import question_ids
from cluster.planned import config_of
from cluster.planning import Searched, searched
from core.errors import ConfigError
from engine.checkpoints import Progress, resolve
from placement.candidates import Candidate
from placement.native import serve
from placement.outcome import Outcome
from placement.workload import Workload

_QUESTIONS = 4
"""For each request of a run, so that drafters are hardly asked for the same twice."""
TRIES = 2
DISTURBED = 0.15
"""Cores that others may take during a round, and while its pace is measured."""


def compare(
    names: Sequence[str],
    rates: str | None,
    requests: int,
    rounds: int,
    dataset: Path | None,
    progress: Progress,
    *,
    model: str,
    **flags: Any,
) -> Comparison:
    """`flags` are those of `slipstream plan`. The requests of a run come in `rounds` parts. Where there may be drafts,
    prompts end in questions (of `dataset`), as those did that the drafter was profiled with. Raises ConfigError, or
    Unavailable if a request fails."""
    found = searched(model=model, kind=None, topology_file=None, ray_address=None, **flags)
    for warning in found.made.plan.warnings:
        progress.note(f"warning: {warning}")
    goodput = found.made.plan.ranking[0].goodput_rps or found.made.plan.rate_rps
    at = rates_of(rates, goodput)
    chosen = choose(found.made, found.space, names)
    for candidate in chosen:
        if (why := found.why_not(candidate)) is not None:
            raise ConfigError(f"{candidate.name}: {why}; leave it out with --layout")
    folder = resolve(model, progress=progress)
    longest = next(iter(found.shapes.values())).profile.model.max_tokens
    workload = found.workload.no_longer_than(longest).of_length(requests)
    questions: list[list[int]] = []
    if dataset is not None or found.drafter is not None:
        questions = question_ids(folder, dataset, _QUESTIONS * requests, int(workload.output_tokens.max()))
    if rounds > requests:
        raise ConfigError(f"--rounds {rounds}: more than the {requests} of --requests", param="rounds")
    runs = [run for one in chosen for run in _runs(one, at, workload, rounds, found, folder, questions, progress)]
    return Comparison.of(model, found.goal.targets, requests, found.made.candidates[0].name, runs)


def _runs(
    candidate: Candidate,
    rates: Sequence[float],
    workload: Workload,
    rounds: int,
    found: Searched,
    folder: Path,
    questions: Sequence[list[int]],
    progress: Progress,
) -> list[Run]:
    """The workload in `rounds` parts, each at each rate, by turns, every other one backwards: so the rates share what
    speeds the machine has."""
    progress.begin(f"{candidate.name}: starting")
    tree = config_of(candidate, found.shapes, found.limits, found.topology, found.drafter)
    setting = found.shapes[candidate.decode.name].profile.setting
    done: dict[float, list[Round]] = {rate: [] for rate in rates}
    with serving(tree, folder, setting, questions) as server:
        server.warm_up(candidate.stages, workload)
        now = partial(pace_of, server, candidate.layout, workload)
        before: Pace | None = None
        for number, part in enumerate(workload.parts(rounds)):
            for rate in rates if number % 2 == 0 else rates[::-1]:
                told = f"{candidate.name}: {len(part)} requests at {rate:.3g}/s"
                progress.begin(told + (f", round {1 + number} of {rounds}" if rounds > 1 else ""))
                one = undisturbed(partial(server.outcome, part, rate), now, before, progress)
                pace = Pace.mean([one.before, one.after])
                layouts = candidate.layout, pace.of(candidate.layout)
                predicted, paced_too = (serve(layout, part, rate).outcome for layout in layouts)
                done[rate].append(Round(Outcomes(predicted, paced_too, one.measured), pace, one.cores))
                before = one.after if one.cores <= DISTURBED else None
    runs = [Run.of(candidate.name, rate, of_rate, found.goal.targets) for rate, of_rate in done.items()]
    progress.note("\n".join([heading(), *(line for run in runs for line in lines(run))]))
    return runs


class Tried(NamedTuple):
    cores: float
    """That others took meanwhile."""
    measured: Outcome
    before: Pace
    after: Pace


def undisturbed(
    outcome: Callable[[], Outcome], now: Callable[[], Pace], before: Pace | None, progress: Progress
) -> Tried:
    """Of up to TRIES the one with which others interfered least, the first that is good enough. Each begins when others
    rest, or after a while all the same; the pace right before it, if it is not known, is measured first."""
    tried: list[Tried] = []
    for _ in range(TRIES):
        if waited_s := wait_for_others(DISTURBED):
            progress.note(f"waited {waited_s:.0f} s, as other processes computed")
        others = Others()
        first = now() if before is None or waited_s else before
        tried.append(Tried(measured=outcome(), before=first, after=now(), cores=others.cores()))
        if tried[-1].cores <= DISTURBED:
            break
        progress.note(f"other processes took {tried[-1].cores:.2f} cores meanwhile")
        before = None
    return min(tried, key=lambda one: one.cores)
