"""`slipstream simulate`."""

from __future__ import annotations

import sys
from pathlib import Path

import click
import msgspec
import numpy as np

from core.errors import ConfigError
from core.finite import FiniteRange
from placement.agreement import Report, compare
from placement.arrivals import fixed_gaps, gamma_gaps
from placement.layout_file import read_layout
from placement.prediction import Prediction, predict
from placement.reference import read_reference
from placement.slo import parse_slo
from placement.traces import read_trace
from placement.workload import Workload

_path = click.Path(path_type=Path)


@click.command()
@click.argument("layout", type=_path, required=False)
@click.option("--trace", type=_path, help="Requests: a .csv as Azure's, or a .jsonl as Mooncake's.")
@click.option("--rate", type=FiniteRange(min=0, min_open=True), help="Requests per second. Default: the trace's.")
@click.option(
    "--requests", type=click.IntRange(min=1), help="The first so many of the trace, over and over if need be."
)
@click.option(
    "--arrival",
    type=click.Choice(["trace", "gamma", "fixed"]),
    default="trace",
    show_default=True,
    help="The rhythm: the trace's, gaps of a gamma distribution, or even ones.",
)
@click.option("--cv", type=FiniteRange(0.01, 100), help="Variation of gamma gaps. Default: 1, Poisson.")
@click.option("--seed", type=click.IntRange(min=0), help="Of gamma gaps. Default: 0.")
@click.option("--slo", help="Targets in ms, as ttft=200,tpot=50,e2e=9000: how many meet them.")
@click.option("--reference", type=_path, help="Instead: run every case of a file of DistServe's results and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def simulate(
    layout: Path | None,
    trace: Path | None,
    rate: float | None,
    requests: int | None,
    arrival: str,
    cv: float | None,
    seed: int | None,
    slo: str | None,
    reference: Path | None,
    as_json: bool,
) -> None:
    """Predict how the layout in the YAML file LAYOUT serves a trace.

    With --reference, exit status 1 if a case of the file disagrees.
    """
    if arrival != "gamma" and (cv is not None or seed is not None):
        raise ConfigError("--cv and --seed are for --arrival gamma", param="arrival")
    if reference is not None:
        if layout or trace or rate or requests or slo or arrival != "trace":
            raise ConfigError("--reference takes everything from its file: leave the rest out", param="reference")
        _compare(reference, as_json=as_json)
        return
    if layout is None or trace is None:
        raise ConfigError("give a LAYOUT and a --trace, or a --reference file", param="layout")
    targets = None if slo is None else parse_slo(slo)
    asked = read_layout(layout)
    found = read_trace(trace, cache_tokens=asked.cache_tokens)
    workload = found.workload if requests is None else found.workload.of_length(requests)
    workload = _in_rhythm(workload, arrival, 1.0 if cv is None else cv, seed or 0)
    prediction = predict(asked, workload, found.rate if rate is None else rate, targets)
    click.echo(_json(prediction) if as_json else _table(prediction))


def _in_rhythm(workload: Workload, arrival: str, cv: float, seed: int) -> Workload:
    if arrival == "trace":
        return workload
    if arrival == "fixed":
        return workload.with_gaps(fixed_gaps(len(workload)))
    return workload.with_gaps(gamma_gaps(len(workload), cv, np.random.default_rng(seed)))


def _compare(reference: Path, *, as_json: bool) -> None:
    report = compare(read_reference(reference))
    click.echo(_json(report) if as_json else "\n".join(_lines(report)))
    sys.exit(0 if report.agrees else 1)


def _json(found: Prediction | Report) -> str:
    return msgspec.json.format(msgspec.json.encode(found)).decode()


def _table(prediction: Prediction) -> str:
    names = list(prediction.ttft_ms)
    rows = [f"{'ms':<6}" + "".join(f"{name:>11}" for name in names)]
    for metric in ("ttft", "tpot", "e2e"):
        values = getattr(prediction, f"{metric}_ms")
        rows.append(f"{metric:<6}" + "".join(f"{values[name]:>11.1f}" for name in names))
    rows.append(f"{prediction.requests} requests at {prediction.rate_rps:.3g}/s, {prediction.preemptions} preemptions")
    rows[-1] += f", simulated in {prediction.cpu_s:.3g} s"
    rows.append("groups busy " + ", ".join(f"{share:.0%}" for share in prediction.busy))
    if prediction.attainment is not None:
        all_of = "both" if len(prediction.met) == 2 else "all"
        rows.append(
            f"{prediction.attainment:.1%} meet {all_of} targets: goodput {prediction.goodput_rps:.3g} requests/s; "
            + ", ".join(f"{name} {share:.1%}" for name, share in prediction.met.items())
        )
    return "\n".join(rows)


def _lines(report: Report) -> list[str]:
    lines = []
    for case in report.cases:
        agreeing = sum(check.agrees for check in case.checks)
        verdict = case.failed or f"{agreeing} of {len(case.checks)} agree"
        worst = max((check.error for check in case.checks if check.error is not None), default=None)
        off = "" if worst is None else f", times within {100 * worst:.2g} %"
        how = f"{case.kind} {case.strategy or ''}".rstrip()
        lines.append(f"{case.id}  {how}  {verdict}{off}  ({case.cpu_s:.2f} s)")
        wrong = [check for check in case.checks if not check.agrees]
        lines += [f"    {check.what}: expected {check.expected}, got {check.got}" for check in wrong]
    return [*lines, f"searches took {report.search_cpu_s:.2f} s of processor time"]
