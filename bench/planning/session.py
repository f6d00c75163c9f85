"""From flags to a comparison: plan, then serve each of the layouts and load it at each of the rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.planning.choice import choose, rates_of
from bench.planning.comparison import Comparison, Run
from bench.planning.load import Server, serving
from bench.planning.others import Others
from bench.planning.report import heading, lines
from cluster.planned import config_of
from cluster.planning import Searched, searched
from core.errors import ConfigError
from engine.checkpoints import Progress, resolve
from placement.candidates import Candidate
from placement.layout import Layout
from placement.native import serve
from placement.outcome import Outcome
from placement.workload import Workload

TRIES = 2
_ALONE = 6
"""Requests that are put to a server one at a time, before the others."""
_APART_S = 1e4
DISTURBED = 0.15
"""Cores that others may take during a run that counts."""


def compare(
    names: Sequence[str], rates: str | None, requests: int, progress: Progress, *, model: str, **flags: Any
) -> Comparison:
    """`flags` are those of `slipstream plan`. Raises ConfigError, or Unavailable if a request fails."""
    found = searched(model=model, kind=None, topology_file=None, ray_address=None, **flags)
    goodput = found.made.plan.ranking[0].goodput_rps or found.made.plan.rate_rps
    at = rates_of(rates, goodput)
    chosen = choose(found.made, found.space, names)
    for candidate in chosen:
        if (why := found.why_not(candidate)) is not None:
            raise ConfigError(f"{candidate.name}: {why}; leave it out with --layout")
    folder = resolve(model, progress=progress)
    longest = next(iter(found.shapes.values())).profile.model.max_tokens
    workload = found.workload.no_longer_than(longest).of_length(requests)
    runs = [run for one in chosen for run in _runs(one, at, workload, found, folder, progress)]
    return Comparison.of(model, found.goal.targets, requests, found.made.candidates[0].name, runs)


def _runs(
    candidate: Candidate,
    rates: Sequence[float],
    workload: Workload,
    found: Searched,
    folder: Path,
    progress: Progress,
) -> list[Run]:
    progress.begin(f"{candidate.name}: starting")
    progress.note(heading())
    tree = config_of(candidate, found.shapes, found.limits, found.topology, found.drafter)
    setting = found.shapes[candidate.decode.name].profile.setting
    runs = []
    with serving(tree, folder, setting) as server:
        server.warm_up(candidate.stages, workload)
        alone = _alone(server, candidate.layout, workload)
        paced = _at_pace(candidate.layout, alone)
        progress.note(f"requests that are alone take {alone:.2f} times as long as predicted")
        for rate in rates:
            progress.begin(f"{candidate.name}: {len(workload)} requests at {rate:.3g}/s")
            others, measured = _undisturbed(server, workload, rate, progress)
            predicted, at_pace = (serve(layout, workload, rate).outcome for layout in (candidate.layout, paced))
            targets = found.goal.targets
            runs.append(Run.of(candidate.name, rate, predicted, measured, targets, others, alone, at_pace))
            progress.note("\n".join(lines(runs[-1])))
    return runs


def _alone(server: Server, layout: Layout, workload: Workload) -> float:
    """How many times as long as predicted requests take that come one at a time: what is off then is not in queues."""
    few = workload.of_length(_ALONE)
    predicted = serve(layout, few.with_gaps(np.full(_ALONE, _APART_S)), 1.0).outcome.e2e_ms
    gaps = np.concatenate([[0.0], 1.2 * predicted[:-1] / 1000])
    return float((server.outcome(few.with_gaps(gaps), 1.0).e2e_ms / predicted).mean())


def _at_pace(layout: Layout, pace: float) -> Layout:
    """Its steps take so many times as long."""
    return replace(layout, groups=tuple(replace(group, latency=group.latency.times(pace)) for group in layout.groups))


def _undisturbed(server: Server, workload: Workload, rate: float, progress: Progress) -> tuple[float, Outcome]:
    """The cores that others took meanwhile, and what became of the requests: of the run with the least of TRIES, unless
    one is good enough before."""
    tried: list[tuple[float, Outcome]] = []
    for _ in range(TRIES):
        others = Others()
        outcome = server.outcome(workload, rate)
        tried.append((others.cores(), outcome))
        if tried[-1][0] <= DISTURBED:
            break
        progress.note(f"other processes took {tried[-1][0]:.2f} cores meanwhile")
    return min(tried, key=lambda run: run[0])
