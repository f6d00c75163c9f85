"""Predicted beside measured, of every layout at every rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from bench.planning.pace import Pace
from placement.outcome import Outcome, Targets
from placement.prediction import statistics_of


class Seen(msgspec.Struct):
    """Milliseconds by statistic (`mean`, `p50`, …), the share of requests that met all targets, and that which met
    each."""

    ttft_ms: dict[str, float]
    tpot_ms: dict[str, float]
    attainment: float
    met: dict[str, float] = {}

    @staticmethod
    def of(outcome: Outcome, targets: Targets) -> Seen:
        times = statistics_of(outcome.ttft_ms), statistics_of(outcome.tpot_ms)
        return Seen(*times, outcome.attainment(targets), outcome.met(targets))

    def errors_of(self, predicted: Seen) -> dict[str, float]:
        """With this as the truth."""
        errors = {
            f"{metric}_{name}": one / other - 1.0 if other > 0.0 else 0.0
            for metric in ("ttft", "tpot")
            for name in ("p50", "p90")
            for one, other in [(getattr(seen, f"{metric}_ms")[name] for seen in (predicted, self))]
        }
        return errors | {"attainment": predicted.attainment - self.attainment}


class Run(msgspec.Struct):
    """A layout at a rate. `errors`: (predicted - measured) / measured by `ttft_p50` and so on; of `attainment`, the
    difference. `others_cores`: what processes of others took of this machine meanwhile, in the worst of its rounds.
    `paces`, of each round: how many times as long as predicted requests took that came one at a time, right before it
    and right after it; `at_pace`: what is predicted of steps that take as much longer, and `errors_at_pace` of that."""

    layout: str
    rate_rps: float
    predicted: Seen
    measured: Seen
    errors: dict[str, float]
    others_cores: float
    paces: list[Pace]
    at_pace: Seen
    errors_at_pace: dict[str, float]

    @property
    def pace(self) -> Pace:
        return Pace.mean(self.paces)

    @staticmethod
    def of(layout: str, rate: float, rounds: Sequence[Round], targets: Targets) -> Run:
        """Requests count alike, whatever their round."""
        outcomes = (Outcome.joined(parts) for parts in zip(*(one.outcomes for one in rounds), strict=True))
        predicted, at_pace, measured = (Seen.of(outcome, targets) for outcome in outcomes)
        errors, errors_at_pace = (measured.errors_of(seen) for seen in (predicted, at_pace))
        others, paces = max(one.others_cores for one in rounds), [one.pace for one in rounds]
        return Run(layout, rate, predicted, measured, errors, others, paces, at_pace, errors_at_pace)


class Outcomes(NamedTuple):
    """Of the same requests."""

    predicted: Outcome
    at_pace: Outcome
    measured: Outcome


class Round(NamedTuple):
    """A part of a run's requests."""

    outcomes: Outcomes
    pace: Pace
    others_cores: float


TOLERANCES = {"ttft_p50": 0.1, "ttft_p90": 0.15, "tpot_p50": 0.1, "tpot_p90": 0.15, "attainment": 0.05}
"""What an error may be for the prediction to count as true."""


class Comparison(msgspec.Struct):
    """`best_predicted` and `best_measured` have the most goodput at the highest rate. Of so many `runs`, by figure,
    what is within TOLERANCES: `true` as profiled, `true_at_pace` with steps as long as requests alone had them then."""

    model: str
    ttft_ms: float
    tpot_ms: float
    requests: int
    chosen: str
    runs: list[Run]
    best_predicted: str
    best_measured: str
    true: dict[str, int]
    true_at_pace: dict[str, int]
    e2e_ms: float | None = None
    percentiles: dict[str, float] = {}

    @staticmethod
    def of(model: str, targets: Targets, requests: int, chosen: str, runs: Sequence[Run]) -> Comparison:
        last = [run for run in runs if run.rate_rps == max(run.rate_rps for run in runs)]
        return Comparison(
            model=model,
            ttft_ms=targets.ttft_ms,
            tpot_ms=targets.tpot_ms,
            requests=requests,
            chosen=chosen,
            runs=[*runs],
            best_predicted=max(last, key=lambda run: _merit(run.predicted)).layout,
            best_measured=max(last, key=lambda run: _merit(run.measured)).layout,
            true=_true([run.errors for run in runs]),
            true_at_pace=_true([run.errors_at_pace for run in runs]),
            e2e_ms=targets.e2e_ms if "e2e" in targets.metrics else None,
            percentiles=targets.percentiles,
        )


def _true(errors: Sequence[dict[str, float]]) -> dict[str, int]:
    return {name: sum(within(name, each[name]) for each in errors) for name in TOLERANCES}


def within(name: str, error: float) -> bool:
    """Its tolerance. 47.5 % are 5 points off 52.5 %, and not a rounding more."""
    return abs(error) <= TOLERANCES[name] + 1e-9


def _merit(seen: Seen) -> tuple[float, float]:
    """More requests within all targets; of equals, the sooner."""
    return seen.attainment, -(seen.ttft_ms["mean"] + seen.tpot_ms["mean"])
