"""A comparison as a table."""

from __future__ import annotations

from bench.planning.comparison import TOLERANCES, Comparison, Run, Seen, within

_UNITS = {"attainment": "points"}


def table(found: Comparison) -> str:
    """Of a run predicted / measured and the error, as profiled and at the machine's pace of that time."""
    rows = [f"{found.model}, {found.requests} requests a run, ms, predicted / measured"]
    for layout in dict.fromkeys(run.layout for run in found.runs):
        rows += ["", layout + ("  (chosen)" if layout == found.chosen else "")]
        rows.append(heading())
        of_layout = [run for run in found.runs if run.layout == layout]
        rows += [line for run in of_layout for line in lines(run)]
        rows += [_met(run) for run in of_layout if found.percentiles or found.e2e_ms is not None]
    off = "" if found.best_predicted == found.best_measured else ", which was not predicted"
    most = max(run.others_cores for run in found.runs)
    rows += ["", f"other processes took {most:.2f} cores at the most"]
    rows += ["", f"best predicted: {found.best_predicted}", f"best measured: {found.best_measured}{off}"]
    rows += [_verdict(found, found.true, "as profiled")]
    rows += [_verdict(found, found.true_at_pace, "if steps take as much longer as for requests alone then")]
    return "\n".join(rows)


def _verdict(found: Comparison, true: dict[str, int], told: str) -> str:
    """By figure, with what it may be off by."""
    runs = len(found.runs)
    each = (
        f"{name.replace('_', ' ')} {count} (within {100 * TOLERANCES[name]:g} {_UNITS.get(name, '%')})"
        for name, count in true.items()
    )
    return f"{sum(true.values())} of {runs * len(true)} figures are true {told}; of {runs} runs {', '.join(each)}"


def _met(run: Run) -> str:
    """Of targets one by one."""
    pairs = (f"{name} {share:.1%} / {run.measured.met[name]:.1%}" for name, share in run.predicted.met.items())
    return f"{run.rate_rps:>8.3g} targets met, each alone: {', '.join(pairs)}"


def heading() -> str:
    return f"{'rate':>8}" + "".join(f"{name.replace('_', ' '):>18}" for name in TOLERANCES)


def lines(run: Run) -> list[str]:
    """As profiled, and at the pace of that time."""
    first, further = run.pace
    return [
        *_compared(f"{run.rate_rps:>8.3g}", run.predicted, run.measured, run.errors),
        f"{'':>8}alone then, first tokens took {first:.2f} times as long, further ones {further:.2f}:",
        *_compared(f"{'':>8}", run.at_pace, run.measured, run.errors_at_pace),
    ]


def _compared(label: str, predicted: Seen, measured: Seen, errors: dict[str, float]) -> list[str]:
    pairs, off = "", ""
    for name in TOLERANCES:
        one, other = (_figure(seen, name) for seen in (predicted, measured))
        pairs += f"{one:>8} /{other:>8}"
        off += f"{f'{errors[name]:+.1%}' + ('' if within(name, errors[name]) else ' !'):>18}"
    return [f"{label}{pairs}", f"{'':>8}{off}"]


def _figure(seen: Seen, name: str) -> str:
    metric, _, statistic = name.partition("_")
    value = getattr(seen, f"{metric}_ms")[statistic] if statistic else None
    return f"{getattr(seen, name):.1%}" if value is None else f"{value:.1f}"
