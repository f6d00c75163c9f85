"""What the runs say: attainment over time, how long it took to recover, and what was lost."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from bench.replanning.measure import Answer, Run
from core.replan_metrics import Decided
from placement.outcome import Targets

WINDOW_S = 10.0
"""Of which attainment is taken: of the requests that were due in it."""
STEP_S = 1.0
_ROWS_S = 10.0
"""Of a row of the table."""


class Point(Struct, frozen=True):
    """Attainment of the requests due in the WINDOW_S before `at_s`; None if there was none."""

    at_s: float
    attainment: float | None


class Verdict(Struct, frozen=True):
    """Of one run. `recovered_s`: from the shift to the end of the last window that missed the goal; 0 if none did, None
    if the run ends with one."""

    replanned: bool
    requests: int
    lost: int
    """Requests that did not end once, with all their tokens."""
    before: float | None
    """Attainment of the requests before the shift, and after it."""
    after: float | None
    during: float | None
    """Of those that came while workers changed."""
    recovered_s: float | None
    curve: list[Point]


class Report(Struct, frozen=True):
    model: str
    targets: Targets
    share: float
    shift_s: float
    workers: int
    began_as: str
    rates: tuple[float, float]
    verdicts: list[Verdict]
    runs: list[Run]


def met(answer: Answer, targets: Targets) -> bool:
    """What was lost met nothing."""
    served = answer.served
    in_time = served.ttft_ms is not None and served.ttft_ms <= targets.ttft_ms
    steady = served.tpot_ms is None or served.tpot_ms <= targets.tpot_ms
    return answer.whole and in_time and steady and 1e3 * served.took_s <= targets.e2e_ms


def attainment(answers: Sequence[Answer], targets: Targets) -> float | None:
    return sum(met(answer, targets) for answer in answers) / len(answers) if answers else None


def verdict_of(run: Run, targets: Targets, share: float, shift_s: float, seconds: float) -> Verdict:
    curve = [_point(run.answers, targets, at * STEP_S) for at in range(1, int(seconds / STEP_S) + 1)]
    return Verdict(
        replanned=run.replanned,
        requests=len(run.answers),
        lost=sum(not answer.whole for answer in run.answers),
        before=attainment([answer for answer in run.answers if answer.due_s < shift_s], targets),
        after=attainment([answer for answer in run.answers if answer.due_s >= shift_s], targets),
        during=attainment([answer for answer in run.answers if _during(run, answer.due_s)], targets),
        recovered_s=_recovered_s(curve, share, shift_s),
        curve=curve,
    )


def _during(run: Run, due_s: float) -> bool:
    """Whether a change was under way, one that was not done to its end too."""
    changes = zip(run.changes, run.done, strict=True)
    return any(change.at_s <= due_s and (done is None or due_s <= done) for change, done in changes)


def _point(answers: Sequence[Answer], targets: Targets, at_s: float) -> Point:
    return Point(at_s, attainment([one for one in answers if at_s - WINDOW_S <= one.due_s < at_s], targets))


def _recovered_s(curve: Sequence[Point], share: float, shift_s: float) -> float | None:
    known = [(point.at_s, point.attainment) for point in curve if point.attainment is not None]
    missed = [at_s for at_s, attained in known if at_s > shift_s and attained < share]
    if not missed:
        return 0.0
    return None if missed[-1] == known[-1][0] else missed[-1] - shift_s


def table(report: Report) -> str:
    """For a terminal."""
    low, high = report.rates
    lines = [
        f"{report.model}, {report.began_as}: {low:.3g} requests/s, and from {report.shift_s:g} s on {high:.3g}/s of "
        f"another kind; ttft {report.targets.ttft_ms:g} ms, tpot {report.targets.tpot_ms:g} ms",
        "",
        f"attainment of {WINDOW_S:g} s",
        "  ".join(["    s", *(f"{_arm(verdict):>10}" for verdict in report.verdicts)]),
    ]
    every = int(_ROWS_S / STEP_S)
    rows = zip(*(verdict.curve[every - 1 :: every] for verdict in report.verdicts), strict=True)
    lines += ["  ".join([f"{row[0].at_s:5.0f}", *(f"{_percent(one.attainment):>10}" for one in row)]) for row in rows]
    lines.append("")
    for verdict, run in zip(report.verdicts, report.runs, strict=True):
        recovered = "not recovered" if verdict.recovered_s is None else f"recovered after {verdict.recovered_s:g} s"
        lines.append(
            f"{_arm(verdict)}: {_percent(verdict.before)} before the shift, {_percent(verdict.after)} after it, "
            f"{recovered}; {verdict.lost} of {verdict.requests} requests lost"
        )
        lines += [_told(change, done) for change, done in zip(run.changes, run.done, strict=True)]
        if run.changes:
            lines.append(f"  {_percent(verdict.during)} of those that came while workers changed")
    return "\n".join(lines)


def _told(change: Decided, done: float | None) -> str:
    took = "not carried out to the end" if done is None else f"done after {done - change.at_s:.1f} s"
    return f"  {change.at_s:5.1f} s  {change.by}: {change.to}, {took}; {change.why}"


def _arm(verdict: Verdict) -> str:
    return "replanned" if verdict.replanned else "as it was"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.0%}"
