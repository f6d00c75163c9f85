"""The requests of the last while: what they were, how many came, and how many met their targets.

What became of a request is told of when it ends. How many arrive is known sooner, by counting: those that have ended
since, and by how many more are under way. Of these the prompts are known, and how far the outputs are (arrived.py).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from core.served import Served, UnderWay
from core.types import FinishReason
from placement.arrived import Arrived
from placement.outcome import Targets

MOST_REQUESTS = 10_000
MOST_TICKS = 10_000
_GROUP, _LEAST_GROUPS = 10, 5
"""Requests in a time whose count is compared, on average, and how many such times there must be."""
_MOST_EVEN = 10.0


@dataclass(frozen=True, slots=True)
class Tick:
    """What came in the `seconds` before `at_s`."""

    at_s: float
    seconds: float
    arrived: int


@dataclass(frozen=True, slots=True)
class Ended:
    """A request that was told of at `told_s`, and so came at `came_s`: hosts' clocks may differ, so the hour of which a
    gateway tells is not asked."""

    told_s: float
    came_s: float
    served: Served


@dataclass(frozen=True, slots=True)
class Met:
    """Of `judged` requests, how many missed a target, and how many of these that for TTFT (`late`) or TPOT (`slow`);
    the others took too long in all."""

    judged: int
    missed: int
    late: int
    slow: int

    @property
    def attainment(self) -> float:
        """1 if none was judged."""
        return 1 - self.missed / self.judged if self.judged else 1.0


class LiveLog:
    """What it was told in the last `keep_s` seconds: MOST_REQUESTS and MOST_TICKS of it at the most."""

    def __init__(self, keep_s: float) -> None:
        self._keep_s = keep_s
        self._served: deque[Ended] = deque(maxlen=MOST_REQUESTS)
        self._ticks: deque[Tick] = deque(maxlen=MOST_TICKS)
        self._since: tuple[float, int, frozenset[str]] | None = None
        self._ended = 0
        self._told_s = -math.inf
        self._under_way: Sequence[UnderWay] = ()

    def tell(
        self,
        now_s: float,
        ended: Iterable[Served],
        in_flight: int,
        under_way: Sequence[UnderWay] = (),
        told_by: frozenset[str] = frozenset(),
    ) -> Tick | None:
        """What has ended since the last call, how many requests are under way now, of these those of whom more is
        known, and which gateways tell of them. Returns what has come meanwhile; None the first time and when others
        tell than before, which tells only who was there already, and if no time has passed."""
        told = [Ended(now_s, now_s - one.took_s, one) for one in ended]
        self._served.extend(told)
        self._ended += len(told)
        self._told_s, self._under_way = now_s, under_way
        self._forget(now_s)
        if self._since is not None and now_s <= self._since[0]:
            return None
        since, self._since = self._since, (now_s, in_flight, told_by)
        ended_now, self._ended = self._ended, 0
        if since is None or since[2] != told_by:
            return None
        tick = Tick(now_s, now_s - since[0], max(0, ended_now + in_flight - since[1]))
        self._ticks.append(tick)
        return tick

    def rate(self, since_s: float, until_s: float = math.inf) -> float | None:
        """Requests/s that came after `since_s`, and by `until_s`; None if nothing is known of that time."""
        ticks = self._ticks_of(since_s, until_s)
        return sum(tick.arrived for tick in ticks) / sum(tick.seconds for tick in ticks) if ticks else None

    def count(self, since_s: float, until_s: float) -> int:
        """Requests that came after `since_s`, and by `until_s`."""
        return sum(tick.arrived for tick in self._ticks_of(since_s, until_s))

    def met(self, targets: Targets, since_s: float, came_s: float = -math.inf) -> Met:
        """Of the requests that have ended after `since_s`, and came at `came_s` or later."""
        ended = (one for one in self._served if one.told_s > since_s and one.came_s >= came_s)
        verdicts = [_verdict(one.served, targets) for one in ended]
        judged = [verdict for verdict in verdicts if verdict is not None]
        return Met(
            judged=len(judged),
            missed=sum(any(verdict) for verdict in judged),
            late=sum(late for late, *_ in judged),
            slow=sum(slow for _, slow, _ in judged),
        )

    def ended(self, since_s: float) -> list[Ended]:
        """Requests that have ended after `since_s` with a token or more, in the order in which they came."""
        with_token = (one for one in self._served if one.told_s > since_s and one.served.output_tokens > 0)
        return sorted(with_token, key=lambda one: one.came_s)

    def came(self, since_s: float, until_s: float) -> list[Ended]:
        """Those of them that came at `since_s` or later, and before `until_s`. Of those that came lately only the short
        have ended, so lengths are known up to `known_until` only."""
        return [one for one in self.ended(-math.inf) if since_s <= one.came_s < until_s]

    def arrived(self, since_s: float, until_s: float = math.inf) -> Arrived:
        """Who came at `since_s` or later and before `until_s`, and has ended with a token or more or is under way."""
        ended = (
            (one.came_s, one.served.prompt_tokens, one.served.cached_tokens, one.served.output_tokens, True)
            for one in self._served
            if since_s <= one.came_s < until_s and one.served.output_tokens > 0
        )
        under_way = (
            (self._told_s - one.for_s, one.prompt_tokens, one.cached_tokens, one.output_tokens, False)
            for one in self._under_way
            if since_s <= self._told_s - one.for_s < until_s
        )
        return Arrived.of([*ended, *under_way])

    def known_until(self, now_s: float, since_s: float) -> float:
        """Of what came before this, 19 in 20 have ended by `now_s`, if requests take as long as those that have ended
        after `since_s`, or at all."""
        took = [one.told_s - one.came_s for one in self._served if one.told_s > since_s]
        took = took or [one.told_s - one.came_s for one in self._served]
        return now_s - float(np.quantile(took, 0.95)) if took else now_s

    def burstiness(self, since_s: float, until_s: float = math.inf) -> float:
        """Shape of the gamma law of gaps by which the counts of what came then vary as they do: their variance over
        their mean is one over it, in times that are long against the gaps (Cox and Lewis, 1966). 1 with too few to
        tell. That of the requests' own gaps would miss those that have not ended."""
        rate = self.rate(since_s, until_s)
        if not rate:
            return 1.0
        counts = _together(self._ticks_of(since_s, until_s), _GROUP / rate)
        if len(counts) < _LEAST_GROUPS:
            return 1.0
        excess = sum((arrived - rate * seconds) ** 2 / (rate * seconds) for arrived, seconds in counts)
        return min(_MOST_EVEN, (len(counts) - 1) / excess) if excess > 0 else _MOST_EVEN

    def _ticks_of(self, since_s: float, until_s: float) -> list[Tick]:
        return [tick for tick in self._ticks if since_s < tick.at_s <= until_s]

    def _forget(self, now_s: float) -> None:
        while self._served and self._served[0].told_s <= now_s - self._keep_s:
            self._served.popleft()
        while self._ticks and self._ticks[0].at_s <= now_s - self._keep_s:
            self._ticks.popleft()


def _together(ticks: Iterable[Tick], least_s: float) -> list[tuple[int, float]]:
    """Requests and seconds of ticks in a row, of `least_s` or more together."""
    found, arrived, seconds = [], 0, 0.0
    for tick in ticks:
        arrived, seconds = arrived + tick.arrived, seconds + tick.seconds
        if seconds >= least_s:
            found.append((arrived, seconds))
            arrived, seconds = 0, 0.0
    return found


def _verdict(served: Served, targets: Targets) -> tuple[bool, bool, bool] | None:
    """Whether it was late, slow, and too long in all. A request without a token that failed was late; of one that
    its client gave up nothing is known, so it isn't judged."""
    if served.ttft_ms is None:
        return None if served.ended is FinishReason.ABORT else (True, False, False)
    slow = served.tpot_ms is not None and served.tpot_ms > targets.tpot_ms
    return served.ttft_ms > targets.ttft_ms, slow, 1e3 * served.took_s > targets.e2e_ms
