"""What comes, and what is expected to: the live log with forecasts over it, and a watch on changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from core.errors import ConfigError
from core.served import Served, UnderWay
from placement.arrivals import burstiness, gamma_gaps
from placement.arrived import Arrived
from placement.drift import KNOWN, KNOWN_S, LEAST_COMPARED, LengthWatch, RateWatch, SizeWatch
from placement.forecast import Maker
from placement.live_log import Ended, LiveLog, Met, Tick
from placement.replan_settings import ReplanSettings
from placement.traces import Trace
from placement.workload import Workload

LEAST_RATE = 1e-3
MOST_PERIODS = 100_000
"""Of an earlier trace: forecasts take some seconds to learn from so many."""
MOST_GUESSED, GUESSING_S = 0.5, 10.0
"""If more of the output tokens than this part are yet to come, no plan is made as long after a change of lengths."""
SETTLED = 60
"""Requests since a change, from whose number the rate is known within a quarter in 19 of 20 cases."""


@dataclass(frozen=True, eq=False)
class Expected:
    """Requests/s, and requests to draw from. `guessed`: the part of their output tokens that is yet to come. `few`: so
    few came since the last change that more of them will tell better."""

    workload: Workload
    rate: float
    guessed: float = 0.0
    few: bool = False

    @property
    def mostly_guessed(self) -> bool:
        return self.guessed > MOST_GUESSED

    @property
    def unsettled(self) -> bool:
        """Whether to look again before long."""
        return self.mostly_guessed or self.few

    def __str__(self) -> str:
        prompt, output = self.workload.prompt_tokens.mean(), self.workload.output_tokens.mean()
        return (
            f"{self.rate:.3g} requests/s of {prompt:.0f} prompt and {output:.0f} output tokens, "
            f"burstiness {burstiness(self.workload.gaps):.2g}"
        )


@dataclass(frozen=True)
class Period:
    """Requests/s and mean tokens."""

    rate: float
    prompt: float
    output: float

    @staticmethod
    def of(rate: float, workload: Workload) -> Period:
        return Period(rate, float(workload.prompt_tokens.mean()), float(workload.output_tokens.mean()))


def history(trace: Trace, period_s: float) -> list[Period]:
    """Of the whole periods of a trace; one in which nobody came has the lengths of that before. Raises ConfigError for
    more than MOST_PERIODS."""
    place = trace.workload.arrivals_ms(trace.rate) / 1e3 // period_s
    if place[-1] > MOST_PERIODS:
        raise ConfigError(
            f"the earlier trace is of {place[-1]:.6g} times of {period_s:g} s, and forecasts begin with {MOST_PERIODS} "
            "at the most: give the last part of it, or a longer interval of replanning",
            param="warm_start",
        )
    firsts = np.searchsorted(place, np.arange(place[-1] + 1))
    found: list[Period] = []
    for first, end in pairwise(firsts.tolist()):
        rows = np.arange(first, end)
        rate = len(rows) / period_s
        found.append(Period.of(rate, trace.workload.chosen(rows)) if len(rows) else replace(found[-1], rate=0.0))
    return found


class Traffic:
    """Forecasts are made of one value each `predictive_s`: rate, mean prompt and mean output of that time. After a
    change of the rate that of the rate goes on from what has come since, with the season that it has learnt; after one
    of the lengths theirs do."""

    def __init__(self, settings: ReplanSettings, forecast: Maker, before: Iterable[Period] = ()) -> None:
        """`before`: what forecasts have seen already, in times of `predictive_s` (`history`)."""
        self._settings = settings
        self._log = LiveLog(max(settings.window_s, settings.recent_s, KNOWN_S))
        self._rates: RateWatch | None = None
        self._lengths: tuple[LengthWatch, SizeWatch] | None = None
        """None until there is a plan for what comes now."""
        self._observed_s = -math.inf
        """Up to which forecasts know what came."""
        self._rate_since_s = self._since_s = -math.inf
        """Of the last change of the rate, and of the lengths."""
        self._new_lengths = False
        """Forecasts of lengths do not know of their last change."""
        self._rate, self._prompt, self._output = forecast(), forecast(), forecast()
        self._last: Period | None = None
        """That was foreseen from."""
        self._whole: Workload | None = None
        """The last that was seen."""
        for period in before:
            self._foresee(period)

    def _foresee(self, period: Period) -> None:
        self._rate.observe(period.rate)
        self._prompt.observe(period.prompt)
        self._output.observe(period.output)
        self._last = period

    def tell(
        self,
        now_s: float,
        ended: Iterable[Served],
        in_flight: int,
        under_way: Sequence[UnderWay] = (),
        told_by: frozenset[str] = frozenset(),
    ) -> str | None:
        """What has changed since `planned`, if something has; the rest as LiveLog.tell."""
        tick = self._log.tell(now_s, ended, in_flight, under_way, told_by)
        if tick is None:
            return None
        if math.isinf(self._observed_s):
            self._observed_s = now_s - tick.seconds
        changed = " and ".join([*self._lengths_changed(now_s), *self._rate_changed(now_s, tick)]) or None
        if changed is None and now_s - self._observed_s >= self._settings.predictive_s:
            self._observe(now_s)
        return changed

    def planned(self, now_s: float, expected: Expected, *, anew: bool) -> None:
        """A plan was made for this, or is found to do for it: changes are told against the rate that came before it was
        likely another already, and if the plan is new against the lengths that came."""
        if self._new_lengths:
            self._relevel(now_s)
        since_s = now_s - min(KNOWN_S, KNOWN / expected.rate)
        anew = anew or self._lengths is None
        laws, sizes = self._lengths = self._lengths or (LengthWatch(), SizeWatch())
        first_s, until_s = max(self._since_s, since_s), min(now_s, sizes.suspects_s)
        if anew:
            sizes.expect(until_s, self._log.arrived(first_s, until_s))
        if anew or not laws.ready:
            laws.expect(now_s, self._log.came(first_s, self._known(now_s)), first_s)
        rates = self._rates = self._rates or RateWatch()
        known = max(self._rate_since_s, since_s), now_s - rates.suspects_s
        if (rate := self._log.rate(*known)) is not None:
            rates.expect(max(LEAST_RATE, rate), max(1, self._log.count(*known)), self._log.burstiness(*known))

    def met(self, now_s: float, came_s: float = -math.inf) -> Met:
        """Of what has ended lately, and came at `came_s` or later."""
        return self._log.met(self._settings.goal.targets, now_s - self._settings.recent_s, came_s)

    def met_since(self, came_s: float) -> Met:
        """Of what came at `came_s` or later and has ended, as far as it is known."""
        return self._log.met(self._settings.goal.targets, -math.inf, came_s)

    def came_since(self, came_s: float, now_s: float) -> list[Ended]:
        """Who came at `came_s` or later, in order, as far as it is known."""
        return self._log.came(self._window(now_s, came_s), self._known(now_s))

    def recent(self, now_s: float) -> Expected | None:
        """As many, and such, as came lately; None with too few requests to tell."""
        since_s = now_s - self._settings.recent_s
        return self._of(since_s, since_s) or self._seen(now_s)

    def expected(self, now_s: float) -> Expected | None:
        """In the middle of the horizon, and at no lower a rate than that of the last `predictive_s`; None with too few
        requests to tell, or too little of them, unless it has become quiet after there were enough."""
        if (seen := self._seen(now_s) or self._quiet(now_s)) is None:
            return None
        self._whole = seen.workload
        if self._new_lengths and seen.mostly_guessed and now_s - self._since_s < GUESSING_S:
            return None
        steps = max(1, round(self._settings.horizon_s / 2 / self._settings.predictive_s))
        now = Period.of(seen.rate, seen.workload)
        known = (self._rate, now.rate), (self._prompt, now.prompt), (self._output, now.output)
        ahead = (forecast.ahead(steps) / value for forecast, value in known)
        rate, prompt, output = (1.0 if math.isnan(times) else times for times in ahead)
        if self._new_lengths:
            prompt = output = 1.0
        last = self._log.rate(max(self._rate_since_s, now_s - self._settings.predictive_s)) or 0.0
        return Expected(
            seen.workload.scaled(prompt, output), max(LEAST_RATE, last, seen.rate * rate), seen.guessed, seen.few
        )

    def _seen(self, now_s: float) -> Expected | None:
        return self._of(self._window(now_s, self._since_s), self._window(now_s, self._rate_since_s))

    def _quiet(self, now_s: float) -> Expected | None:
        """Such requests as came when there were enough to tell, and as many as come now that a whole window has too
        few; None while it is for another reason that there are few."""
        since_s = now_s - self._settings.window_s
        rate = self._log.rate(since_s)
        if self._whole is None or rate is None or self._new_lengths or max(self._since_s, self._rate_since_s) > since_s:
            return None
        return Expected(self._whole, max(LEAST_RATE, rate))

    def _window(self, now_s: float, since_s: float) -> float:
        return max(since_s, now_s - self._settings.window_s)

    def _known(self, now_s: float) -> float:
        return self._log.known_until(now_s, now_s - self._settings.recent_s)

    def _of(self, since_s: float, rate_since_s: float) -> Expected | None:
        """At random, of those who came since the former, and as many and as bursty as came since the latter."""
        rate, came = self._log.rate(rate_since_s), self._log.arrived(since_s)
        if rate is None or len(came) < LEAST_COMPARED:
            return None
        gaps = gamma_gaps(len(came), self._log.burstiness(rate_since_s) ** -0.5, np.random.default_rng(0))
        whole = self._completed(since_s, came).with_gaps(gaps)
        changed = max(self._since_s, self._rate_since_s)
        few = math.isfinite(changed) and self._log.count(changed, math.inf) < SETTLED
        guessed = 1 - float(came.outputs.sum() / whole.output_tokens.sum())
        return Expected(whole, max(LEAST_RATE, rate), guessed, few)

    def _completed(self, since_s: float, came: Arrived) -> Workload:
        return came.completed(self._log.arrived(-math.inf, since_s), np.random.default_rng(0))

    def _relevel(self, now_s: float) -> None:
        since_s = self._window(now_s, self._since_s)
        self._last = Period.of(0.0, self._completed(since_s, self._log.arrived(since_s)))
        self._prompt.relevel(self._last.prompt)
        self._output.relevel(self._last.output)
        self._new_lengths = False

    def _observe(self, now_s: float) -> None:
        rate = self._log.rate(max(self._observed_s, self._rate_since_s))
        since_s, self._observed_s = max(self._observed_s, self._since_s), now_s
        if rate is not None and len(came := self._log.arrived(since_s)):
            self._foresee(Period.of(rate, self._completed(since_s, came)))
        elif rate is not None and self._last is not None:  # a season goes on while nobody comes
            self._foresee(replace(self._last, rate=rate))

    def _rate_changed(self, now_s: float, tick: Tick) -> Iterator[str]:
        """Where lengths have changed it is enough that the rate likely has too."""
        if self._rates is None:
            return
        for_s = self._rates.tell(tick.arrived, tick.seconds) or (self._new_lengths and self._rates.suspects_s)
        if not for_s:
            return
        self._rate_since_s = now_s - for_s
        rate = self._log.rate(self._rate_since_s) or 0.0
        self._rate.relevel(rate)
        yield f"the rate is no longer {self._rates.rate:.3g}/s but {rate:.3g}/s"
        self._rates = None

    def _lengths_changed(self, now_s: float) -> Iterator[str]:
        if self._lengths is None:
            return
        since_s = next((at for watch in self._lengths if (at := watch.look(now_s, self._log)) is not None), None)
        if since_s is not None:
            self._since_s, self._lengths, self._new_lengths = since_s, None, True
            yield "other lengths come than before"
