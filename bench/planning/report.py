"""A comparison as a table."""

from __future__ import annotations

from bench.planning.comparison import TOLERANCES, Comparison, Run


def table(found: Comparison) -> str:
    """Two lines a run: predicted / measured, and the error."""
    rows = [f"{found.model}, {found.requests} requests a run, ms, predicted / measured"]
    for layout in dict.fromkeys(run.layout for run in found.runs):
        rows += ["", layout + ("  (chosen)" if layout == found.chosen else "")]
        alone = next(run.alone for run in found.runs if run.layout == layout)
        rows += [f"alone, requests take {alone:.2f} times as long as predicted", heading()]
        rows += [line for run in found.runs if run.layout == layout for line in lines(run)]
    off = "" if found.best_predicted == found.best_measured else ", which was not predicted"
    most = max(run.others_cores for run in found.runs)
    rows += ["", f"other processes took {most:.2f} cores at the most"]
    rows += ["", f"best predicted: {found.best_predicted}", f"best measured: {found.best_measured}{off}"]
    limits = "p50 within 10 %, p90 within 15 %, attainment within 5 points"
    rows.append(f"{found.true} of {found.figures} figures are true: {limits}")
    return "\n".join([*rows, f"{found.true_at_pace} are if steps take as much longer as those of requests alone"])


def heading() -> str:
    return f"{'rate':>8}" + "".join(f"{name.replace('_', ' '):>18}" for name in TOLERANCES)


def lines(run: Run) -> list[str]:
    pairs, errors = "", ""
    for name, most in TOLERANCES.items():
        error = run.errors[name]
        one, other = (_figure(seen, name) for seen in (run.predicted, run.measured))
        pairs += f"{one:>8} /{other:>8}"
        errors += f"{f'{error:+.1%}' + ('' if abs(error) <= most else ' !'):>18}"
    return [f"{run.rate_rps:>8.3g}{pairs}", f"{'':>8}{errors}"]


def _figure(seen: object, name: str) -> str:
    metric, _, statistic = name.partition("_")
    value = getattr(seen, f"{metric}_ms")[statistic] if statistic else None
    return f"{getattr(seen, name):.1%}" if value is None else f"{value:.1f}"
