"""What replanning would have done with a trace: the simulator runs it, the replanner is asked every second, and workers
change their roles in the middle of the run as live ones do."""

from __future__ import annotations

import numpy as np
from msgspec import Struct

from core.errors import ConfigError
from placement.arranged import Simulated
from placement.arrangement import Arrangement
from placement.native import serve
from placement.replanner import Replanner
from placement.replay_run import TICK_S, Changed, run_of
from placement.shaped import Shaped
from placement.workload import Workload

_MOST_INTERVALS = 50
_INTERVALS_S = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0)
MOST_S = 14 * 86400.0


class Interval(Struct, frozen=True):
    """Of the requests that came from `at_s` to the next interval, the share that met both targets, with replanning and
    `without`; None if none came. `arrangement` is that at its beginning, with replanning."""

    at_s: float
    requests: int
    arrangement: Arrangement
    attainment: float | None
    without: float | None


class Replayed(Struct, frozen=True, kw_only=True):
    """`attainment` and `without` are of all requests but the `left_out`, which no worker can hold; `workers` is how
    many there were on average. `warnings`: what is extrapolated, or was measured elsewhere."""

    start: Arrangement
    requests: int
    rate_rps: float
    attainment: float
    without: float
    workers: float
    changes: list[Changed]
    intervals: list[Interval]
    left_out: int = 0
    warnings: list[str] = []


def replay(
    workload: Workload,
    rate: float,
    workers: Simulated | Shaped,
    replanner: Replanner,
    interval_s: float | None = None,
    left_out: int = 0,
) -> Replayed:
    """From the replanner's arrangement on, which `without` keeps. Intervals are round, and some tens of them, unless
    given. Raises ConfigError for a request that no worker can hold, and for more than MOST_S."""
    start = replanner.arrangement
    if (lasts_s := float(workload.arrivals_ms(rate)[-1] / 1e3)) > MOST_S:
        raise ConfigError(
            f"the trace takes {lasts_s / 86400:.3g} days at {rate:.3g} requests/s, and a replay {MOST_S / 86400:g} at "
            "the most: give a higher --rate, or a part of it",
            param="rate",
        )
    run = run_of(workload, rate, workers, replanner)
    run.whole()
    targets = replanner.settings.goal.targets
    met = run.outcome().attained(targets)
    met_without = serve(workers.layout(start), workload, rate).outcome.attained(targets)
    end_s = float(run.arrivals[-1] / 1e3)
    if interval_s is None:
        interval_s = next((each for each in _INTERVALS_S if end_s <= _MOST_INTERVALS * each), end_s)
    edges = np.arange(0.0, end_s + interval_s, interval_s)
    place = np.digitize(run.arrivals / 1e3, edges) - 1
    every_s = np.arange(0.0, max(edges[-1], TICK_S), TICK_S).tolist()
    intervals = []
    for number, at_s in enumerate(edges[: place.max() + 1].tolist()):
        inside = place == number
        share, without = (float(of[inside].mean()) if inside.any() else None for of in (met, met_without))
        intervals.append(Interval(at_s, int(inside.sum()), run.arrangement_at(at_s), share, without))
    return Replayed(
        start=start,
        requests=len(workload),
        rate_rps=rate,
        attainment=float(met.mean()),
        without=float(met_without.mean()),
        workers=float(np.mean([run.arrangement_at(at_s).workers for at_s in every_s])),
        changes=run.changes,
        intervals=intervals,
        left_out=left_out,
    )
