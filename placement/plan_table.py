"""A plan for people."""

from __future__ import annotations

from collections.abc import Sequence

from placement.packing import Seat
from placement.pareto import Point, thinned
from placement.plan import Entry, Plan, Spread
from placement.refusals import by_reason
from placement.slo import shown

_SHOWN = ("p50", "p90", "p99")
_FRONT, _REFUSED = 8, 12
"""Layouts of the Pareto front, and reasons for what is left out, that are printed; --json has all."""


def table(plan: Plan) -> str:
    """All of it."""
    sources = ", ".join(f"{name} {source}" for name, source in plan.sources.items())
    lines = [
        f"{plan.model} on {plan.topology}; latency of {sources}",
        f"targets: {_targets(plan)}",
        "",
        summary(plan),
        "",
        *_columns([("goodput/s", "95 % interval", "steady", "devices", "layout"), *map(_ranked, plan.ranking)]),
    ]
    if plan.pareto:
        few = thinned(plan.pareto, _FRONT)
        left_out = f", {len(few)} of {len(plan.pareto)}" if len(few) < len(plan.pareto) else ""
        head = "goodput/s", "TTFT", "TPOT", "cost", f"Pareto front{left_out}"
        lines += ["", *_columns([head, *map(_point, few)])]
    lines += ["", *(f"infeasible: {line}" for line in by_reason(plan.refused, _REFUSED))] if plan.refused else []
    return "\n".join(lines + _warnings(plan))


def _targets(plan: Plan) -> str:
    values = {"ttft": plan.ttft_ms, "tpot": plan.tpot_ms, "e2e": plan.e2e_ms}
    each = {name: f"{name.upper()} {value:g} ms" for name, value in values.items() if value is not None}
    together = " and ".join(what for name, what in each.items() if name not in plan.percentiles)
    found = [f"{together} for {plan.share:.0%} of requests"] if together else []
    return ", ".join([*found, *(f"{each[name]} for {at:g}%" for name, at in plan.percentiles.items())])


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
    rows = [[f"at {shown(plan.rate_rps)} requests/s, ms", *_SHOWN]]
    rows += [
        [metric, *(_with_interval(plan.predicted[f"{metric}_{name}"]) for name in _SHOWN)]
        for metric in ("ttft", "tpot", "e2e")
    ]
    lines = _columns(rows, name=0)
    met = plan.predicted["attainment"]
    each = [f"{name.upper()} {plan.predicted[f'{name}_met'].mean:.1%}" for name in plan.percentiles]
    line = f"attainment {met.mean:.1%} ({max(0.0, met.low):.1%} to {min(1.0, met.high):.1%})"
    return [*lines, line + (f", of all targets; alone {', '.join(each)}" if each else "")]


def _with_interval(spread: Spread) -> str:
    return f"{shown(spread.mean)} ({shown(max(0.0, spread.low))} to {shown(spread.high)})"


def _ranked(entry: Entry) -> tuple[str, ...]:
    if entry.goodput_rps is None or entry.spread is None:
        return "", "", "", str(entry.devices), entry.name
    interval = f"{shown(entry.spread.low)} to {shown(entry.spread.high)}"
    return shown(entry.goodput_rps), interval, "yes" if entry.steady else "no", str(entry.devices), entry.name


def _point(point: Point) -> tuple[str, ...]:
    return shown(point.goodput_rps), shown(point.ttft_ms), shown(point.tpot_ms), _cost(point), point.name


def _columns(rows: Sequence[Sequence[str]], name: int = -1) -> list[str]:
    """Cells side by side in columns as wide as they need; that of names begins at the left."""
    columns = [*zip(*rows, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    padded = [[cell.rjust(width) for cell in column] for column, width in zip(columns, widths, strict=True)]
    padded[name] = [cell.ljust(widths[name]) for cell in columns[name]]
    return ["  ".join(cells).rstrip() for cells in zip(*padded, strict=True)]


def _seat(seat: Seat) -> str:
    workers = [(seat.prefill, "prefill"), (seat.decode, "decode"), (seat.both, "prefill and decode")]
    held = " + ".join(f"{count} {role}" for count, role in workers if count)
    devices = f"{seat.devices} {seat.device} device{'s' * (seat.devices > 1)}"
    return f"{seat.count} x {seat.node}, {devices}{' each' if seat.count > 1 else ''}: {held}"


def _cost(entry: Entry | Point) -> str:
    devices = f"{entry.devices} device{'s' * (entry.devices > 1)}"
    return devices if entry.dollars_per_hour is None else f"{devices}, ${entry.dollars_per_hour:.4g} an hour"
