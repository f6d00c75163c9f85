"""How soon replanning notices that traffic has changed, and how often it does so though nothing has.

`python -m bench.replanning.recognition` feeds it requests by the second that take a fixed time to the first token and
between tokens: no worker, no simulator, no clock. `--hours H` of steady traffic instead count false alarms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import click
import numpy as np

from core.finite import FiniteRange
from core.served import Served, UnderWay
from core.types import FinishReason
from placement.forecast import Constant
from placement.goodput import Goal
from placement.lengths import parse_lengths
from placement.outcome import Targets
from placement.replan_settings import ReplanSettings
from placement.traffic import Traffic
from placement.workload import Lengths, Times

TTFT_S, TPOT_S = 0.4, 0.025
BEFORE_S, AFTER_S = 300.0, 150.0
NEAR = math.log(1.35)
"""A plan is for what comes if its rate and mean lengths are as near."""

Kind = tuple[float, str]
"""Requests/s, and lengths as of `slipstream plan --lengths`."""

STEADY: tuple[Kind, ...] = (
    (8.0, "prompt=1000,output=20,cv=0.3"),
    (4.0, "prompt=300,output=80,cv=1"),
    (1.0, "prompt=800,output=200,cv=0.6"),
    (20.0, "prompt=300,output=80,cv=0.6"),
)
SHIFTS: dict[str, tuple[Kind, Kind]] = {
    "to few with long outputs": (STEADY[0], (1.5, "prompt=100,output=300,cv=0.3")),
    "to few with outputs alone long": ((4.0, "prompt=300,output=40,cv=1"), (1.5, "prompt=300,output=400,cv=1")),
    "to few with long prompts": ((8.0, "prompt=100,output=40,cv=0.6"), (1.5, "prompt=1500,output=20,cv=0.6")),
    "to many short": ((2.0, "prompt=800,output=200,cv=0.6"), (12.0, "prompt=100,output=20,cv=0.6")),
    "rate doubled": ((4.0, "prompt=300,output=80,cv=0.6"), (8.0, "prompt=300,output=80,cv=0.6")),
    "rate halved": ((8.0, "prompt=300,output=80,cv=0.6"), (4.0, "prompt=300,output=80,cv=0.6")),
    "lengths half as long again": ((6.0, "prompt=300,output=80,cv=1"), (6.0, "prompt=450,output=120,cv=1")),
}


@dataclass(frozen=True, eq=False)
class Requests:
    """In the order in which they come, at random."""

    came_s: Times  # [requests]
    prompts: Lengths  # [requests]
    outputs: Lengths  # [requests]

    @staticmethod
    def of(phases: list[tuple[float, Kind]], seed: int) -> Requests:
        rng, begins, columns = np.random.default_rng(seed), 0.0, list[tuple[Times, Lengths, Lengths]]()
        for number, (seconds, (rate, lengths)) in enumerate(phases):
            count = int(rng.poisson(rate * seconds))
            drawn = parse_lengths(lengths, 1000 * seed + number).of_length(count)
            rows = rng.permutation(count)
            came_s = begins + np.sort(rng.uniform(0.0, seconds, count))
            columns.append((came_s, drawn.prompt_tokens[rows], drawn.output_tokens[rows]))
            begins += seconds
        return Requests(*(np.concatenate(column) for column in zip(*columns, strict=True)))

    def seconds(self) -> Iterator[tuple[float, list[Served], list[UnderWay]]]:
        """Up to each second who has ended in it, and who is under way at its end."""
        last_s = self.came_s + TTFT_S + (self.outputs - 1) * TPOT_S
        for now in np.arange(1.0, self.came_s[-1]).tolist():
            there = np.flatnonzero((self.came_s <= now) & (last_s > now - 1))
            over = last_s[there] <= now
            ended = [self._served(row) for row in there[over].tolist()]
            yield now, ended, [self._so_far(row, now) for row in there[~over].tolist()]

    def _served(self, row: int) -> Served:
        prompt, output = int(self.prompts[row]), int(self.outputs[row])
        tpot_ms = 1e3 * TPOT_S if output > 1 else None
        return Served(float(self.came_s[row]), prompt, 0, output, 1e3 * TTFT_S, tpot_ms, FinishReason.LENGTH)

    def _so_far(self, row: int, now: float) -> UnderWay:
        for_s, prompt, output = now - float(self.came_s[row]), int(self.prompts[row]), int(self.outputs[row])
        tokens = 1 + int((for_s - TTFT_S) / TPOT_S) if for_s >= TTFT_S else 0
        return UnderWay(for_s, prompt, 0, min(tokens, output - 1))


@dataclass(frozen=True)
class Noticed:
    """Seconds at which a change of the rate, or of lengths, was noticed, and plans as (seconds, requests/s, prompt and
    output tokens)."""

    rate: list[float]
    lengths: list[float]
    plans: list[tuple[float, float, float, float]]

    @staticmethod
    def of(requests: Requests) -> Noticed:
        settings = ReplanSettings(goal=Goal(Targets(1500.0, 60.0)), chunk_tokens=(512,))
        traffic, found = Traffic(settings, Constant), Noticed([], [], [])
        due_s, pending = settings.predictive_s, False
        for now, ended, under_way in requests.seconds():
            changed = traffic.tell(now, ended, len(under_way), under_way) or ""
            found.rate.extend([now] * ("the rate" in changed))
            found.lengths.extend([now] * ("lengths" in changed))
            pending = pending or bool(changed)
            if (pending or now >= due_s) and (expected := traffic.expected(now)) is not None:
                lengths = expected.workload.prompt_tokens, expected.workload.output_tokens
                prompt, output = (float(of.mean()) for of in lengths)
                found.plans.append((now, expected.rate, prompt, output))
                traffic.planned(now, expected, anew=pending)
                pending = False
                due_s = now + (settings.settle_s if expected.unsettled else settings.predictive_s)
        return found

    def planned_for(self, kind: Kind, since_s: float) -> float | None:
        """When the first plan after `since_s` was made that is about for this."""
        rate, lengths = kind
        named = dict(part.split("=") for part in lengths.split(","))
        wanted = np.log([rate, float(named["prompt"]), float(named["output"])])
        plans = ((at, np.abs(np.log(of) - wanted).max()) for at, *of in self.plans if at > since_s)
        return next((at for at, off in plans if off < NEAR), None)


def _after(times: list[float]) -> float | None:
    return next((at - BEFORE_S for at in times if at > BEFORE_S), None)


def _shown(seconds: list[float | None]) -> str:
    return " ".join(f"{'-' if one is None else round(one):>4}" for one in seconds)


@click.command()
@click.option("--seeds", default=5, show_default=True)
@click.option(
    "--hours", type=FiniteRange(0, min_open=True), help="Of steady traffic for each seed, to count false alarms in."
)
def main(seeds: int, hours: float | None) -> None:
    """Seconds from a shift until its rate, and its lengths, are noticed, and until a plan is made for what comes."""
    if hours is not None:
        for kind in STEADY:
            runs = [Noticed.of(Requests.of([(3600 * hours, kind)], 100 + seed)) for seed in range(seeds)]
            alarms = (sum(len(run.rate) for run in runs), sum(len(run.lengths) for run in runs))
            told = "{:g}/s of {}: {:g} h, false alarms of the rate {}, of lengths {}"
            print(told.format(*kind, seeds * hours, *alarms))
        return
    for name, (before, after) in SHIFTS.items():
        runs = [Noticed.of(Requests.of([(BEFORE_S, before), (AFTER_S, after)], seed)) for seed in range(seeds)]
        noticed = [_after(run.rate) for run in runs], [_after(run.lengths) for run in runs]
        plans = [at and at - BEFORE_S for at in (run.planned_for(after, BEFORE_S) for run in runs)]
        rate, lengths, planned = map(_shown, (*noticed, plans))
        print(f"{name:32} rate {rate}   lengths {lengths}   planned for {planned}")


if __name__ == "__main__":
    main()
