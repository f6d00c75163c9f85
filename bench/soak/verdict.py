"""Whether something grew, and what is to be said at the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.soak.client import FAULTS, Outcome
from bench.soak.probe import ProcessTree, Sample

MIB = 2**20


def slope(times: Sequence[float], values: Sequence[float]) -> float:
    """Theil (1950), Sen (1968): the median of the slopes between all pairs of points, which a quarter of outliers does
    not move. 0 for fewer than two points."""
    if len(times) < 2:
        return 0.0
    x, y = np.asarray(times, float), np.asarray(values, float)
    first, second = np.triu_indices(len(x), 1)
    return float(np.median((y[second] - y[first]) / (x[second] - x[first])))


@dataclass(frozen=True, slots=True)
class Growth:
    """Of one quantity after the warm-up. It grows if it does so faster than `limit`, and by more than `floor` over the
    time that was looked at: a single descriptor more is no trend."""

    name: str
    per_minute: float
    limit: float
    rise: float
    floor: float
    last: float

    @property
    def grew(self) -> bool:
        return self.per_minute > self.limit and self.rise > self.floor

    def __str__(self) -> str:
        word = "GROWS" if self.grew else "steady"
        return (
            f"{self.name}: {self.per_minute:+.2f} a minute ({word}; limit {self.limit:g}), {self.last:.0f} at the end"
        )


def growths(samples: Sequence[Sample], warm_up: float, limit_mib: float) -> list[Growth]:
    """`warm_up` in minutes."""
    steady = [sample for sample in samples if sample.minutes >= warm_up]
    if len(steady) < 2:
        return []
    series = [
        ("own memory, MiB", [s.own / MIB for s in steady], limit_mib, 8.0),
        ("descriptors", [float(s.fds) for s in steady], 0.5, 4.0),
        ("threads", [float(s.threads) for s in steady], 0.5, 4.0),
    ]
    times = [s.minutes for s in steady]
    observed = times[-1] - times[0]
    found = []
    for name, values, limit, floor in series:
        per_minute = slope(times, values)
        found.append(Growth(name, per_minute, limit, per_minute * observed, floor, values[-1]))
    return found


def growing_processes(tree: ProcessTree, warm_up: float) -> dict[str, float]:
    """MiB a minute of the processes that grow most, to tell whose memory it is."""
    slopes = {}
    for pid, points in tree.own.items():
        steady = [point for point in points if point[0] >= warm_up]
        slopes[f"{tree.names[pid]} {pid}"] = slope([t for t, _ in steady], [b / MIB for _, b in steady])
    return dict(sorted(slopes.items(), key=lambda item: -item[1])[:5])


@dataclass(frozen=True, slots=True)
class Settled:
    """The server after the load: shares of KV caches in use and requests that it still has, None where it does not
    say."""

    kv_usage: float | None
    requests: float | None


def faults(
    outcomes: Mapping[Outcome, int],
    grown: Sequence[Growth],
    settled: Settled,
    ended: tuple[float, int, int] | None,
    why_stopped: str | None,
) -> list[str]:
    """What is wrong, in a line each. `ended`: sequences by the server's count, and the fewest and most it may be."""
    found = [f"{outcomes[kind]} requests {kind}" for kind in FAULTS if outcomes.get(kind)]
    found += [str(growth) for growth in grown if growth.grew]
    if settled.kv_usage:
        found.append(f"KV blocks in use after the end: {settled.kv_usage:.1%} of a cache, summed over the workers")
    if settled.requests:
        found.append(f"{settled.requests:g} requests still run or wait after the end")
    if ended is not None and not ended[1] <= ended[0] <= ended[2]:
        found.append(f"the server counts {ended[0]:g} ended sequences, where {ended[1]} to {ended[2]} were sent")
    if not outcomes.get(Outcome.DONE):
        found.append("no request was answered")
    return found + ([why_stopped] if why_stopped is not None else [])


def text(report: Mapping[str, Any]) -> str:
    """The report for people."""
    counts = ", ".join(f"{count} {kind}" for kind, count in report["requests"].items())
    lines = [f"{report['minutes']:.1f} minutes, {report['tokens']} tokens: {counts}"]
    lines += report["growth_text"] or [f"processes: not looked at ({report['not_measured']})"]
    lines += [f"  {name}: {rate:+.2f} MiB a minute" for name, rate in report["growing_processes"].items()]
    lines += [f"fault: {reason}" for reason in report["first_faults"]]
    lines += [f"FAILED: {reason}" for reason in report["reasons"]] or ["OK: nothing lost, nothing doubled, no growth"]
    return "\n".join(lines)
