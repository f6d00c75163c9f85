"""Series of speculation, out of what workers count: vLLM's over all drafters of a worker, ours by drafter and version.

The acceptance length is 1 + accepted tokens / drafts, the acceptance at a position accepted / drafts there, alpha the
sum of the summary of that name over its count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily

from core.wire import DrafterCounters, SpeculationCounters

Speculating = tuple[list[str], SpeculationCounters]
"""The values of the labels of a worker, and what it has counted."""


class _Series(NamedTuple):
    vllm: str
    """Over all drafters."""
    ours: str
    """By drafter and version."""
    text: str
    value: Callable[[DrafterCounters], int]


_COUNTS = (
    _Series("num_drafts", "drafts", "Drafts that were verified.", lambda d: d.drafts),
    _Series("num_draft_tokens", "draft_tokens", "Draft tokens that were verified.", lambda d: d.draft_tokens),
    _Series("num_accepted_tokens", "accepted_tokens", "Draft tokens that were accepted.", lambda d: d.accepted_tokens),
)

_Counts = Callable[[DrafterCounters], list[int]]

_PER_POSITION: tuple[tuple[str, str, str, _Counts], ...] = (
    (
        "slipstream:spec_decode_num_drafts_per_pos",
        "slipstream:drafter_drafts_per_pos",
        "Drafts that had a token at a position, from 0.",
        lambda drafter: drafter.drafts_per_position,
    ),
    (
        "vllm:spec_decode_num_accepted_tokens_per_pos",
        "slipstream:drafter_accepted_tokens_per_pos",
        "Drafts of which a token was accepted at a position, from 0.",
        lambda drafter: drafter.accepted_per_position,
    ),
)
"""Names over all drafters and by drafter and version, and what is counted."""


def speculation_counters(workers: Sequence[Speculating], labels: Sequence[str]) -> Iterator[Metric]:
    for series in _COUNTS:
        total = CounterMetricFamily(f"vllm:spec_decode_{series.vllm}", series.text, labels=labels)
        for own, counted in workers:
            total.add_metric(own, sum(series.value(drafter) for drafter in counted.drafters))
        yield total
        each = CounterMetricFamily(
            f"slipstream:drafter_{series.ours}", series.text, labels=(*labels, "drafter", "version")
        )
        for own, drafter in _by_drafter(workers):
            each.add_metric([*own, drafter.drafter, drafter.version], series.value(drafter))
        yield each
    alpha = SummaryMetricFamily(
        "slipstream:drafter_alpha",
        "sum min(p, q) of the laws of target and drafter, where drafts were judged.",
        labels=(*labels, "drafter", "version"),
    )
    for own, drafter in _by_drafter(workers):
        alpha.add_metric([*own, drafter.drafter, drafter.version], drafter.alpha_positions, drafter.alpha_sum)
    yield alpha
    for total_name, own_name, text, counts in _PER_POSITION:
        yield _over_all(workers, labels, total_name, text, counts)
        yield _of_each(workers, labels, own_name, text, counts)
    yield _seconds(workers, labels, "draft", "Proposing drafts.", lambda counted: counted.draft_seconds)
    yield _seconds(
        workers, labels, "verify", "Judging drafts and telling drafters.", lambda counted: counted.verify_seconds
    )


def speculation_gauges(workers: Sequence[Speculating], labels: Sequence[str]) -> Iterator[Metric]:
    off = GaugeMetricFamily(
        "slipstream:drafter_switched_off", "1 for a drafter that has failed.", labels=(*labels, "drafter")
    )
    for own, counted in workers:
        for name in counted.switched_off:
            off.add_metric([*own, name], 1)
    yield off
    alarm = GaugeMetricFamily(
        "slipstream:drafter_acceptance_alarm",
        "Whether acceptance is implausible: -1 too low, 1 too high, 0 neither.",
        labels=(*labels, "drafter", "version"),
    )
    for own, drafter in _by_drafter(workers):
        alarm.add_metric([*own, drafter.drafter, drafter.version], {"low": -1, "high": 1}.get(drafter.alarm, 0))
    yield alarm


def _by_drafter(workers: Sequence[Speculating]) -> Iterable[tuple[list[str], DrafterCounters]]:
    return ((own, drafter) for own, counted in workers for drafter in counted.drafters)


def _over_all(
    workers: Sequence[Speculating], labels: Sequence[str], name: str, text: str, counts: _Counts
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(*labels, "position"))
    for own, counted in workers:
        of_each = [counts(drafter) for drafter in counted.drafters]
        for position in range(max(map(len, of_each), default=0)):
            family.add_metric([*own, str(position)], sum(c[position] for c in of_each if position < len(c)))
    return family


def _of_each(
    workers: Sequence[Speculating], labels: Sequence[str], name: str, text: str, counts: _Counts
) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=(*labels, "drafter", "version", "position"))
    for own, drafter in _by_drafter(workers):
        for position, count in enumerate(counts(drafter)):
            family.add_metric([*own, drafter.drafter, drafter.version, str(position)], count)
    return family


def _seconds(
    workers: Sequence[Speculating],
    labels: Sequence[str],
    phase: str,
    text: str,
    seconds: Callable[[SpeculationCounters], float],
) -> Metric:
    family = CounterMetricFamily(f"slipstream:spec_decode_{phase}_seconds", text, labels=labels)
    for own, counted in workers:
        family.add_metric(own, seconds(counted))
    return family
