"""What comes, and what is expected to: the live log with forecasts over it, and a watch on changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from core.served import Served
from placement.arrivals import burstiness, gamma_gaps
from placement.drift import KNOWN, KNOWN_S, LEAST_COMPARED, LengthWatch, RateWatch
from placement.forecast import Maker
from placement.live_log import Ended, LiveLog, Met, Tick
from placement.replan_settings import ReplanSettings
from placement.traces import Trace, served_workload
from placement.workload import Workload

LEAST_RATE = 1e-3


@dataclass(frozen=True, eq=False)
class Expected:
    """Requests/s, and requests to draw from."""

    workload: Workload
    rate: float

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
    """Of the whole periods of a trace; one in which nobody came has the lengths of that before."""
    place = (trace.workload.arrivals_ms(trace.rate) / 1e3 // period_s).astype(np.int64)
    found: list[Period] = []
    for number in range(int(place[-1])):
        rows = np.flatnonzero(place == number)
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
        self._watches: tuple[RateWatch, LengthWatch] | None = None
        """None until there is a plan for what comes now."""
        self._observed_s = self._known_s = -math.inf
        """Up to which forecasts know the rate, and lengths."""
        self._rate_since_s = self._since_s = -math.inf
        """Of the last change of the rate, and of the lengths."""
        self._rate, self._prompt, self._output = forecast(), forecast(), forecast()
        self._last: Period | None = None
        """That was foreseen from."""
        for period in before:
            self._foresee(period)

    def _foresee(self, period: Period) -> None:
        self._rate.observe(period.rate)
        self._prompt.observe(period.prompt)
        self._output.observe(period.output)
        self._last = period

    def tell(self, now_s: float, ended: Iterable[Served], in_flight: int) -> str | None:
        """What has changed since `planned`, if something has."""
        tick = self._log.tell(now_s, ended, in_flight)
        if tick is None:
            return None
        if math.isinf(self._observed_s):
            self._observed_s = self._known_s = now_s - tick.seconds
        changed = self._changed(now_s, tick)
        if changed is not None:
            self._watches = None
        elif now_s - self._observed_s >= self._settings.predictive_s:
            self._observe(now_s)
        return changed

    def planned(self, now_s: float, expected: Expected, *, anew: bool) -> None:
        """A plan was made for this, or is found to do for it: changes are told against the rate that came before it was
        likely another already, and if the plan is new against the lengths that came."""
        first = self._watches is None
        rates, lengths = self._watches = self._watches or (RateWatch(), LengthWatch())
        since_s = now_s - min(KNOWN_S, KNOWN / expected.rate)
        if first or anew:
            lengths.expect(now_s, self._log.came(max(self._since_s, since_s), self._known(now_s)))
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
        """What has ended lately comes as often as what came lately; None with too few requests to tell."""
        since_s = now_s - self._settings.recent_s
        return self._of(self._log.ended(since_s), since_s) or self._seen(now_s)

    def expected(self, now_s: float) -> Expected | None:
        """In the middle of the horizon, and at no lower a rate than that of the last `predictive_s`; None with too few
        requests to tell."""
        if (seen := self._seen(now_s)) is None:
            return None
        steps = max(1, round(self._settings.horizon_s / 2 / self._settings.predictive_s))
        now = Period.of(seen.rate, seen.workload)
        known = (self._rate, now.rate), (self._prompt, now.prompt), (self._output, now.output)
        ahead = (forecast.ahead(steps) / value for forecast, value in known)
        rate, prompt, output = (1.0 if math.isnan(times) else times for times in ahead)
        last = self._log.rate(max(self._rate_since_s, now_s - self._settings.predictive_s)) or 0.0
        return Expected(seen.workload.scaled(prompt, output), max(LEAST_RATE, last, seen.rate * rate))

    def _seen(self, now_s: float) -> Expected | None:
        came = self._log.came(self._window(now_s, self._since_s), self._known(now_s))
        return self._of(came, self._window(now_s, self._rate_since_s))

    def _window(self, now_s: float, since_s: float) -> float:
        return max(since_s, now_s - self._settings.window_s)

    def _known(self, now_s: float) -> float:
        return self._log.known_until(now_s, now_s - self._settings.recent_s)

    def _of(self, requests: list[Ended], since_s: float) -> Expected | None:
        """At random, and as many and as bursty as what has come since."""
        rate = self._log.rate(since_s)
        if rate is None or len(requests) < LEAST_COMPARED:
            return None
        gaps = gamma_gaps(len(requests), self._log.burstiness(since_s) ** -0.5, np.random.default_rng(0))
        return Expected(_workload(requests).with_gaps(gaps), max(LEAST_RATE, rate))

    def _observe(self, now_s: float) -> None:
        rate, known_s = self._log.rate(max(self._observed_s, self._rate_since_s)), self._known(now_s)
        came = self._log.came(max(self._known_s, self._since_s), known_s)
        self._observed_s, self._known_s = now_s, max(self._known_s, known_s)
        if rate is not None and came:
            self._foresee(Period.of(rate, _workload(came)))
        elif rate is not None and self._last is not None:  # a season goes on while nobody comes
            self._foresee(replace(self._last, rate=rate))

    def _changed(self, now_s: float, tick: Tick) -> str | None:
        if self._watches is None:
            return None
        rates, lengths = self._watches
        if (for_s := rates.tell(tick.arrived, tick.seconds)) is not None:
            self._rate_since_s = now_s - for_s
            rate = self._log.rate(self._rate_since_s) or 0.0
            self._rate.relevel(rate)
            return f"the rate is no longer {rates.rate:.3g}/s but {rate:.3g}/s"
        if (since_s := lengths.look(now_s, self._log)) is not None:
            self._since_s = since_s
            self._last = Period.of(0.0, _workload(self._log.came(since_s, math.inf)))
            self._prompt.relevel(self._last.prompt)
            self._output.relevel(self._last.output)
            return "other lengths come than before"
        return None


def _workload(ended: Iterable[Ended]) -> Workload:
    return served_workload(one.served for one in ended)
