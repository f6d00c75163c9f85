"""Runs every case of a reference file and says where the results agree."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import numpy as np

from core.errors import ConfigError
from placement.distserve import (
    STRATEGIES,
    AnySplit,
    Bisection,
    Cluster,
    Criterion,
    DistServeModel,
    Found,
    SharedSplit,
    Split,
    search,
)
from placement.native import simulate
from placement.outcome import Outcome, Targets
from placement.reference import Reference, SearchCase, SimulationCase
from placement.workload import Times

RELATIVE_TOLERANCE = 1e-3
"""Of times; everything else has to be equal."""


Checker = Callable[[str, Any], "list[Check] | None"]
"""What to say of a key of `out` and its value; None if nothing here computes it."""


class Check(msgspec.Struct):
    """One number or verdict of a case. `error` is relative, for times."""

    what: str
    expected: Any
    got: Any
    agrees: bool
    error: float | None = None


class CaseReport(msgspec.Struct):
    """`strategy`: by which a search went. `unchecked`: what the file has and nothing here computes, such as how long it
    took elsewhere. `refused`: why configurations could not be evaluated. `failed`: why the case could not be run at
    all."""

    id: str
    kind: str
    agrees: bool
    cpu_s: float
    strategy: str | None = None
    checks: list[Check] = []
    unchecked: list[str] = []
    refused: dict[str, str] = {}
    failed: str | None = None


class Report(msgspec.Struct):
    agrees: bool
    cases: list[CaseReport]
    search_cpu_s: float


def compare(reference: Reference) -> Report:
    """Every simulation and every search of the file."""
    all_cases: list[SimulationCase | SearchCase] = [*reference.simulations, *reference.searches]
    cases = [_report(reference, case) for case in all_cases]
    searching = sum(case.cpu_s for case in cases if case.kind == "search")
    return Report(all(case.agrees for case in cases), cases, searching)


def _report(reference: Reference, case: SimulationCase | SearchCase) -> CaseReport:
    started = time.process_time()
    report = CaseReport(case.id, "search" if isinstance(case, SearchCase) else "simulation", False, 0.0)
    try:
        _fill(report, case.out, _checker(reference, case, report))
    except ConfigError as error:
        report.failed = error.message
    report.cpu_s = time.process_time() - started
    return report


def _checker(reference: Reference, case: SimulationCase | SearchCase, report: CaseReport) -> Checker:
    if isinstance(case, SearchCase):
        report.strategy = case.strategy
        found = _search(reference, case)
        report.refused = {str(list(_sizes(split))): why for split, why in found.refused.items()}
        return lambda key, expected: _search_checks(key, expected, found)
    outcome = _simulate(reference, case)
    return lambda key, expected: _simulation_checks(key, expected, outcome, case.targets)


def _fill(report: CaseReport, expectations: dict[str, Any], checker: Checker) -> None:
    for key, expected in expectations.items():
        try:
            checks = checker(key, expected)
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{report.id}: out.{key} is not of the format: {error!r}") from error
        report.checks += checks or []
        report.unchecked += [key] if checks is None else []
    report.agrees = bool(report.checks) and all(check.agrees for check in report.checks)


# --- simulations ---------------------------------------------------------------------------------------------------


def _simulate(reference: Reference, case: SimulationCase) -> Outcome:
    split: AnySplit
    if case.backend == "vllm":
        split = SharedSplit(case.tp_prefill, case.pp_prefill)
    elif case.tp_decode is None or case.pp_decode is None:
        raise ConfigError(f"{case.id}: tp_decode and pp_decode are needed with the backend distserve")
    else:
        split = Split(1, case.tp_prefill, case.pp_prefill, case.tp_decode, case.pp_decode)
    pipelines = reference.model_of(case).pipelines(split)
    return simulate(pipelines, reference.workload_of(case), case.rate_rps)


def _simulation_checks(key: str, expected: Any, outcome: Outcome, targets: Targets) -> list[Check] | None:
    """None if nothing here says what `key` should be."""
    if key == "attainment":
        return list(_attainment_checks(expected, outcome))
    if key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        values = getattr(outcome, key)
        return [_time(f"{key} {name}", value, _statistic(values, name)) for name, value in expected.items()]
    if found := re.fullmatch(r"first(\d+)_(ttft|tpot|e2e)_ms", key):
        values = getattr(outcome, f"{found[2]}_ms")[: int(found[1])]
        return [_time(f"{found[2]} of request {i}", *pair) for i, pair in enumerate(zip(expected, values, strict=True))]
    if found := re.fullmatch(r"p(\d+)_(ttft|tpot)_lt_target", key):
        name = f"{found[2]}_ms"
        return [_equal(key, expected, _statistic(getattr(outcome, name), f"p{found[1]}") < getattr(targets, name))]
    return None


def _attainment_checks(expected: dict[str, Any], outcome: Outcome) -> Iterator[Check]:
    for phase, rows in expected.items():
        for row in rows:
            target = row["target"]
            pair = {"prefill": (target, np.inf), "decode": (np.inf, target), "both": target}[phase]
            share = 100 * outcome.attainment(Targets(*pair))
            yield _equal(f"attainment {phase} {target}", row["attainment_pct"], share)


def _statistic(values: Times, name: str) -> float:
    statistics: dict[str, Callable[[], Any]] = {"mean": values.mean, "min": values.min, "max": values.max}
    return float(np.percentile(values, float(name[1:])) if name.startswith("p") else statistics[name]())


# --- searches ------------------------------------------------------------------------------------------------------


def _search(reference: Reference, case: SearchCase) -> Found:
    model: DistServeModel = reference.model_of(case)
    criterion = Criterion(case.targets, case.ttft_percentile / 100, case.tpot_percentile / 100)
    return search(
        STRATEGIES[case.strategy],
        model,
        Cluster(case.num_node, case.ngpu_per_node),
        reference.workload_of(case),
        criterion,
        Bisection(case.max_per_gpu_rate, case.esp),
    )


def _search_checks(key: str, expected: Any, found: Found) -> list[Check] | None:
    """None if nothing here says what `key` should be."""
    if key == "per_config_goodput_per_gpu":
        return _goodput_checks({tuple(sizes): rate for sizes, rate in expected}, found)
    best = found.best
    got = {
        "n_configs": len(found.goodput) + len(found.refused),
        "n_evaluated": len(found.goodput),
        "unsupported": len(found.refused),
        "best_config": None if best is None else list(_sizes(best)),
        "best_per_gpu_rate_rps": None if best is None else found.goodput[best],
    }
    if key not in got:
        return None
    return [_equal(key, len(expected) if key == "unsupported" else expected, got[key])]


def _goodput_checks(expected: dict[tuple[int, ...], float], found: Found) -> list[Check]:
    got = {_sizes(split): rate for split, rate in found.goodput.items()}
    either = [*expected, *(sizes for sizes in got if sizes not in expected)]
    return [_equal(f"goodput {list(sizes)}", expected.get(sizes), got.get(sizes)) for sizes in either]


def _sizes(split: AnySplit) -> tuple[int, ...]:
    return tuple(split)


def _time(what: str, expected: float, got: float) -> Check:
    error = abs(got - expected) / abs(expected) if expected else abs(got)
    return Check(what, expected, float(got), bool(error <= RELATIVE_TOLERANCE), float(error))


def _equal(what: str, expected: Any, got: Any) -> Check:
    """Floats are equal if all but their last digits are."""
    close = isinstance(got, float) and isinstance(expected, float | int) and math.isclose(got, expected, rel_tol=1e-12)
    return Check(what, expected, got, close or got == expected)
