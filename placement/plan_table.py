"""A plan for people."""

from __future__ import annotations

from placement.packing import Seat
from placement.pareto import Point, thinned
from placement.plan import Entry, Plan, Spread
from placement.slo import shown_ms

_SHOWN = ("p50", "p90", "p99")
_FRONT = 8
"""Layouts of the Pareto front that are printed; --json has all."""


def table(plan: Plan) -> str:
    """All of it."""
    sources = ", ".join(f"{name} {source}" for name, source in plan.sources.items())
    lines = [
        f"{plan.model} on {plan.topology}; latency of {sources}",
        f"targets: {_targets(plan)}",
        "",
        summary(plan),
        "",
        f"{'goodput/s':>10}{'95 % interval':>20}{'steady':>8}{'devices':>9}  layout",
        *(_ranked(entry) for entry in plan.ranking),
    ]
    if plan.pareto:
        shown = thinned(plan.pareto, _FRONT)
        left_out = f", {len(shown)} of {len(plan.pareto)}" if len(shown) < len(plan.pareto) else ""
        lines += ["", f"{'goodput/s':>10}{'TTFT':>10}{'TPOT':>10}{'cost':>26}  Pareto front{left_out}"]
        lines += [_point(point) for point in shown]
    lines += ["", *_refused(plan.refused)] if plan.refused else []
    return "\n".join(lines + _warnings(plan))


def _targets(plan: Plan) -> str:
    values = {"ttft": plan.ttft_ms, "tpot": plan.tpot_ms, "e2e": plan.e2e_ms}
    shown = {name: f"{name.upper()} {value:g} ms" for name, value in values.items() if value is not None}
    together = " and ".join(what for name, what in shown.items() if name not in plan.percentiles)
    found = [f"{together} for {plan.share:.0%} of requests"] if together else []
    return ", ".join([*found, *(f"{shown[name]} for {at:g}%" for name, at in plan.percentiles.items())])


def summary(plan: Plan) -> str:
    """What was chosen, why, and what it will reach."""
    lines = [
        f"chosen: {plan.chosen.name} ({_cost(plan.chosen)})",
        *(f"on: {_seat(seat)}" for seat in plan.placed),
        f"why: {plan.why}",
        f"disaggregate or not: {plan.verdict}",
        *([f"with drafts or without: {plan.drafts}"] if plan.drafts else []),
        "",
        *_predicted(plan),
    ]
    return "\n".join(lines)


def _warnings(plan: Plan) -> list[str]:
    return [f"warning: {warning}" for warning in plan.warnings]


def _predicted(plan: Plan) -> list[str]:
    lines = [f"at {plan.rate_rps:.3g} requests/s, ms" + "".join(f"{name:>24}" for name in _SHOWN)]
    for metric in ("ttft", "tpot", "e2e"):
        cells = (_with_interval(plan.predicted[f"{metric}_{name}"]) for name in _SHOWN)
        lines.append(f"{metric:<{len(lines[0]) - 24 * len(_SHOWN)}}" + "".join(f"{cell:>24}" for cell in cells))
    met = plan.predicted["attainment"]
    each = [f"{name.upper()} {plan.predicted[f'{name}_met'].mean:.1%}" for name in plan.percentiles]
    line = f"attainment {met.mean:.1%} ({max(0.0, met.low):.1%} to {min(1.0, met.high):.1%})"
    return [*lines, line + (f", of all targets; alone {', '.join(each)}" if each else "")]


def _with_interval(spread: Spread) -> str:
    return f"{shown_ms(spread.mean)} ({shown_ms(max(0.0, spread.low))} to {shown_ms(spread.high)})"


def _ranked(entry: Entry) -> str:
    if entry.goodput_rps is None or entry.spread is None:
        return f"{'':>38}{entry.devices:>9}  {entry.name}"
    interval, steady = f"{entry.spread.low:.3g} to {entry.spread.high:.3g}", "yes" if entry.steady else "no"
    return f"{entry.goodput_rps:>10.3g}{interval:>20}{steady:>8}{entry.devices:>9}  {entry.name}"


def _point(point: Point) -> str:
    latencies = f"{shown_ms(point.ttft_ms):>10}{shown_ms(point.tpot_ms):>10}"
    return f"{point.goodput_rps:>10.3g}{latencies}{_cost(point):>26}  {point.name}"


def _seat(seat: Seat) -> str:
    workers = [(seat.prefill, "prefill"), (seat.decode, "decode"), (seat.both, "prefill and decode")]
    held = " + ".join(f"{count} {role}" for count, role in workers if count)
    devices = f"{seat.devices} {seat.device} device{'s' * (seat.devices > 1)}"
    return f"{seat.count} x {seat.node}, {devices}{' each' if seat.count > 1 else ''}: {held}"


def _refused(refused: dict[str, str]) -> list[str]:
    """Reasons once each: where a kind of group can't run, nor can any layout with it."""
    by_reason: dict[str, list[str]] = {}
    for name, why in refused.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"cannot run: {names[0]}{f', and {len(names) - 1} more alike' if len(names) > 1 else ''}: {why}"
        for why, names in by_reason.items()
    ]


def _cost(entry: Entry | Point) -> str:
    devices = f"{entry.devices} device{'s' * (entry.devices > 1)}"
    return devices if entry.dollars_per_hour is None else f"{devices}, ${entry.dollars_per_hour:.4g} an hour"
