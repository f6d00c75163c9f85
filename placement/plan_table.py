"""A plan for people."""

from __future__ import annotations

from placement.plan import Entry, Plan, Spread

_SHOWN = ("p50", "p90", "p99")


def table(plan: Plan) -> str:
    sources = ", ".join(f"{name} {source}" for name, source in plan.sources.items())
    lines = [
        f"{plan.model} on {plan.topology}; latency of {sources}",
        f"targets: TTFT {plan.ttft_ms:g} ms and TPOT {plan.tpot_ms:g} ms for {plan.share:.0%} of requests",
        "",
        f"chosen: {plan.chosen.name} ({_cost(plan.chosen)})",
        f"why: {plan.why}",
        f"disaggregate or not: {plan.verdict}",
        "",
        *_predicted(plan),
        "",
        f"{'goodput/s':>10}{'95 % interval':>20}{'steady':>8}{'devices':>9}  layout",
        *(_ranked(entry) for entry in plan.ranking),
    ]
    lines += [f"cannot run: {name}: {why}" for name, why in plan.refused.items()]
    return "\n".join(lines + [f"warning: {warning}" for warning in plan.warnings])


def _predicted(plan: Plan) -> list[str]:
    lines = [f"at {plan.rate_rps:.3g} requests/s, ms" + "".join(f"{name:>24}" for name in _SHOWN)]
    for metric in ("ttft", "tpot", "e2e"):
        cells = (_with_interval(plan.predicted[f"{metric}_{name}"]) for name in _SHOWN)
        lines.append(f"{metric:<{len(lines[0]) - 24 * len(_SHOWN)}}" + "".join(f"{cell:>24}" for cell in cells))
    met = plan.predicted["attainment"]
    return [*lines, f"attainment {met.mean:.1%} ({max(0.0, met.low):.1%} to {min(1.0, met.high):.1%})"]


def _with_interval(spread: Spread) -> str:
    return f"{_ms(spread.mean)} ({_ms(max(0.0, spread.low))} to {_ms(spread.high)})"


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ranked(entry: Entry) -> str:
    if entry.goodput_rps is None or entry.spread is None:
        return f"{'':>38}{entry.devices:>9}  {entry.name}"
    interval, steady = f"{entry.spread.low:.3g} to {entry.spread.high:.3g}", "yes" if entry.steady else "no"
    return f"{entry.goodput_rps:>10.3g}{interval:>20}{steady:>8}{entry.devices:>9}  {entry.name}"


def _cost(entry: Entry) -> str:
    devices = f"{entry.devices} device{'s' * (entry.devices > 1)}"
    return devices if entry.dollars_per_hour is None else f"{devices}, ${entry.dollars_per_hour:.4g} an hour"
