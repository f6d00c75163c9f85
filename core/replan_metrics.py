"""Where replanning stands, as the controller tells the gateways, and its series."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from msgspec import Struct
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric


class Decided(Struct, frozen=True, kw_only=True):
    """A change of the plan. `before` and `after`: attainment that was predicted without it and with it. `gain` and
    `cost`: requests that meet their targets for it, and that miss them while it is carried out."""

    at_s: float
    """Unix time."""
    by: str
    to: str
    why: str
    before: float
    after: float
    gain: float
    cost: float
    carried_out: bool

    def __str__(self) -> str:
        return f"{'changing' if self.carried_out else 'would change'} to {self.to}: {self.why}"


class ReplanStatus(Struct, frozen=True, kw_only=True):
    mode: Literal["advise", "on"]
    plan_id: int
    """How many plans there have been since the cluster's configuration, which is 0."""
    wanted: dict[str, int]
    """Workers by role, of the plan that is carried out."""
    arrangement: str
    """The same in words, with the size of steps, as decisions have it."""
    targets: dict[str, float]
    """`ttft_ms` and `tpot_ms`, that the `share` of requests is to meet."""
    decided: dict[str, int]
    """Changes that were decided, by `reactive` and `predictive`."""
    attainment: float | None
    """Share of the requests lately that met all targets; None if none was to be judged."""
    goodput_rps: float
    """Requests per second lately that met both."""
    correction: dict[str, float] = {}
    """How many times as long as by the profile `prompts` and `decodes` are reckoned to take, as requests have shown."""
    acceptance_length: float | None = None
    """Tokens of a step lately, for a sequence; None if nobody speculates."""
    shapes: dict[str, str] = {}
    """By role, TPxPP of the plan's workers, where they may change."""
    startup_s: float | None = None
    """That a new worker is reckoned to take until it serves, by the last that started."""
    decisions: list[Decided] = []
    """The last of them, the latest last."""


def replan_series(status: ReplanStatus, label_names: Sequence[str], labels: Sequence[str]) -> Iterator[Metric]:
    def gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
        family = GaugeMetricFamily(name, text, labels=label_names)
        family.add_metric(labels, value)
        return family

    yield gauge("slipstream:plan_id", "Plan that is carried out; 0 is the configuration.", status.plan_id)
    shape_names = ["shape"] if status.shapes else []
    workers = GaugeMetricFamily(
        "slipstream:planned_workers",
        "Workers of the plan, by role, and by TPxPP where that may change.",
        labels=(*label_names, "planned_role", *shape_names),
    )
    for role, count in status.wanted.items():
        workers.add_metric([*labels, role, *(status.shapes.get(role, "") for _ in shape_names)], count)
    yield workers
    if status.startup_s is not None:
        yield gauge("slipstream:startup_seconds", "Until a new worker serves, as reckoned with.", status.startup_s)
    decided = CounterMetricFamily(
        "slipstream:replans", "Changes of the plan that were decided.", labels=(*label_names, "by", "mode")
    )
    for by, count in status.decided.items():
        decided.add_metric([*labels, by, status.mode], count)
    yield decided
    if status.attainment is not None:
        yield gauge("slipstream:slo_attainment", "Share of requests lately that met the targets.", status.attainment)
    yield gauge("slipstream:goodput_rps", "Requests per second lately that met the targets.", status.goodput_rps)
    correction = GaugeMetricFamily(
        "slipstream:profile_correction", "Times as long as by the profile, as seen.", labels=(*label_names, "work")
    )
    for work, factor in status.correction.items():
        correction.add_metric([*labels, work], factor)
    yield correction
