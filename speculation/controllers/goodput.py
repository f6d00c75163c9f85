"""Budgets that make a step emit the most tokens per second (SmartSpec, arXiv:2406.14066).

    goodput = (B + sum of the gains of all ranks that are asked for) / T

over B requests, where the gain of a rank is the probability that its node is proposed and accepted (`Acceptance`: for
a chain alpha, alpha^2, …) and T is fitted while it runs (`StepTime`). Ranks are taken in the order of their gains, over
all requests, up to where this is largest: so budgets differ per request and fall as the load rises. Nothing is asked
for unless it beats a plain step by MARGIN. That is for texts as they are on average: drafters that say what their nodes
are worth propose more, and choice.py takes those that are worth it in the very step.

What is not known yet has to be tried. T is known in part from steps that were timed before there were requests, without
drafters; else plain steps come first. Then come TRIES. Where all that is known is worth asking for,
twice that is; and while anything is, a few tokens for classes that the drafter has hardly drafted for. While nothing
is, a try waits GAPS steps, twice as many after each that was in vain. No try is made, and no speculation goes on, that
purse.py does not pay for, so a useless drafter costs no more than what is said there; what has brought nothing for
long pauses (yielding.py). A plain step now and then keeps T
known; before any speculation, some of about as many sequences are seen, since all that it gains is reckoned
from those.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speculation.acceptance import Acceptance
from speculation.controllers.allocation import allocate
from speculation.controllers.base import BaseController, Limits, plain_step
from speculation.controllers.choice import Choice
from speculation.controllers.purse import Purse
from speculation.controllers.step_time import Speculation, StepTime
from speculation.controllers.yielding import Yield
from speculation.laws import SAMPLED
from speculation.rounds import Budgets, Load, Tally, Timing
from speculation.tree import DraftBatch

MARGIN = 1.02
TRIES = ((4, 4), (1, 4), (4, 1), (2, 2))
"""Tokens, for requests: unlike ones, or nobody could tell what costs so much."""
HALVED = 2
"""Of so many times that budgets are found one has half of them for a step, for the same reason."""
GAPS = (4, 256)
"""Steps before another try: at first, and at most."""
UNAFFORDABLE = 64
"""Steps before it is looked again whether there is the money for a try."""
REACH, FEW = 3, 8
"""Times what is best for all alike, and tokens of a request: what is proposed to choose from."""
RECENT = 0.1
"""Of what drafting took of late, what it took the last time."""
USES = 7
"""Steps for which budgets that were found best are used, after one with what may be better."""
ENOUGH_ROUNDS, AGAIN = 8.0, 16
"""Rounds of a class before it may be written off while others are drafted for; how often budgets are found until it is
tried again."""
REST = 16
"""Steps at most until the controller is asked again: asking and telling it take time between steps."""
REFRESH = (8, 128)
"""Steps that speculate before a plain one: as many as make that cost REFRESHING, within these bounds."""
REFRESHING = 0.005
"""Of the time."""
IMPLAUSIBLE, DOUBTS = 1.15, 3
"""Times as fast as plain: no step that verifies drafts is, so after so many in a row a plain one is looked at."""


class Goodput(BaseController):
    def __init__(self, limits: Limits) -> None:
        super().__init__(limits)
        self._numbers = {name: number for number, name in enumerate(limits.drafters)}
        self._time = StepTime(len(limits.drafters))
        for timed in limits.row_times:
            self._time.rehearse(timed)
        self._purse = Purse()
        self._patience = Patience()
        self._yield = Yield()
        self._since_plain = 0
        self._doubts = 0
        self._refresh = float(REFRESH[0])
        self._asked: tuple[tuple[str, ...], tuple[str, ...], bytes] | None = None
        self._found_budgets = plain_step(())
        self._speedup = 1.0
        self._uses = 0
        self._looks = 0
        self._worth_it = False
        self._choosy: set[str] = set()  # drafters among whose nodes there is something to choose by
        self._choice: Choice | None = None
        self._drafting_s = 0.0  # of late

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        return self.budget_by(load, stats, self.preferred(load))

    def budget_by(self, load: Load, stats: Acceptance, drafters: Sequence[str]) -> Budgets:
        """With drafters[r] for request r. Where it is worth it and drafters say what their nodes are worth, more is
        proposed than is best for all alike, for `trim` to choose from."""
        budgets = self.allot(load, stats, drafters)
        if not self._worth_it or not self._choosy.issuperset(drafters):
            self._choice = None
            return budgets
        each = max(FEW, self._time.horizon // len(drafters))
        wide = np.maximum(budgets.tokens, np.minimum(self.room(load), np.minimum(each, REACH * budgets.tokens.max())))
        if self._choice is None or self._uses in (0, USES):
            self._choice = Choice(self._time, load, stats, self._drafting_s)
        return Budgets(wide, wide, drafters, self._choice.floor(self._speedup))

    def trim(self, drafts: DraftBatch, budgets: Budgets, requests: NDArray[np.int64]) -> DraftBatch:
        """The nodes that emit most tokens per second in this very step, by the drafter's confidence in them. Where it
        has none, or has drawn them, what is best for all alike."""
        drafts = super().trim(drafts, budgets, requests)
        if drafts.confidence is None or drafts.law in SAMPLED:
            return drafts
        self._choosy.add(drafts.drafter)
        if self._choice is None:
            return drafts
        return self._choice.of(drafts, drafts.confidence, self._numbers[drafts.drafter])

    def allot(self, load: Load, stats: Acceptance, drafters: Sequence[str]) -> Budgets:
        """What is best for all alike, with drafters[r] for request r."""
        self._worth_it = False
        if self._purse.is_empty:
            return plain_step(drafters, self._patience.rest_until(REST))
        room = self.room(load)
        if not (
            room.any()
            and self._time.knows_plain(load)
            and self._purse.affords(0.0)
            and self._since_plain < self._refresh
        ):
            return plain_step(drafters)
        if not self._patience.looks(load):
            return plain_step(drafters, self._patience.rest())
        if not self._time.added_known:
            return self._budgets(self._try(load, drafters, room), drafters)
        if self._yield.disappoints:
            return plain_step(drafters, self._patience.rest_until(self._yield.pause()))
        asked = (tuple(drafters), tuple(load.classes), room.tobytes())
        if asked == self._asked and self._uses:
            self._uses -= 1
            self._worth_it = True
            return self._found_budgets
        self._asked, self._uses = asked, 0
        known = np.array([stats.known(drafter) for drafter in drafters])
        tokens, self._speedup = self._best(load, stats, drafters, np.minimum(room, known))
        if self._speedup >= MARGIN:
            self._patience.rewarded()
            self._worth_it = True
            self._refresh = float(np.clip((self._speedup - 1) / REFRESHING, *REFRESH))
            new = self._is_new(load, stats, drafters)
            self._uses, self._found_budgets = 0 if new.any() else USES, self._budgets(tokens, drafters)
            begun = np.maximum(tokens, np.where(new, np.minimum(room, TRIES[0][0]), 0))
            grown = np.maximum(begun, np.where(tokens == known, np.minimum(room, 2 * known), 0))
            tokens = self._vary(load, drafters, tokens, grown, begun)
        else:
            tokens = self._try(load, drafters, room)
        return self._budgets(tokens, drafters)

    def price(self, load: Load, budgets: Budgets) -> float:
        """Tokens that the batch emits in the time that one more draft token takes; 0 for a plain step."""
        most = self._speculation(budgets.tokens, budgets.drafters)
        count = float(most.tokens.sum())
        if not count:
            return 0.0
        half = Speculation(most.tokens / 2, most.sequences)
        seconds = float(self._time.added(load, most) - self._time.added(load, half)) / (count / 2)
        return seconds * self._speedup * len(load.classes) / self._time.plain(load)

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        if budgets.candidates.any():
            self._drafting_s += RECENT * (timing.draft_seconds - self._drafting_s)
        if not tally.drafted.any():
            self._since_plain = self._doubts = 0
            if (expected := self._time.record_plain(load, timing.step_seconds)) is not None:
                self._purse.account_plain(expected, timing.rested)
                if self._time.plain_was_wrong:
                    self._purse.doubt()
                in_vain = expected + timing.seconds - timing.step_seconds
                self._purse.account(expected, in_vain, 1.0)
                if budgets.tokens.any():
                    self._yield.observe(expected, in_vain)
            return
        self._since_plain += 1
        if load.other_tokens:  # what a chunk of a prompt takes would drown what drafts take
            return
        speculation = self._speculation(tally.drafted, budgets.drafters)
        plain, seconds = self._time.record(load, speculation, timing.seconds)
        self._doubts = self._doubts + 1 if timing.step_seconds < plain / IMPLAUSIBLE else 0
        if self._doubts == DOUBTS:
            self._since_plain = REFRESH[1]
        self._purse.account_plain(plain, timing.rested)
        emitted = float(tally.emitted.mean())
        self._purse.account(plain, seconds, emitted)
        self._yield.observe(plain * emitted, seconds)

    def _budgets(self, tokens: NDArray[np.int64], drafters: Sequence[str]) -> Budgets:
        return Budgets(tokens, tokens, drafters)

    def _best(
        self, load: Load, stats: Acceptance, drafters: Sequence[str], room: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], float]:
        """Budgets and what they gain over a plain step."""
        prospects = stats.prospects(drafters, load.classes)
        return allocate(load, self._number(drafters), prospects, room, self._time)

    def _try(self, load: Load, drafters: Sequence[str], room: NDArray[np.int64]) -> NDArray[np.int64]:
        """A few tokens for a few requests, if it is time and there is the money."""
        tokens, (length, count) = np.zeros_like(room), self._patience.next_try
        some = self._patience.some(np.flatnonzero(room), count)
        tokens[some] = np.minimum(room[some], length)
        if self._patience.tries(self._affords(load, drafters, tokens), self._purse.is_rich):
            return tokens
        return np.zeros_like(room)

    def _is_new(self, load: Load, stats: Acceptance, drafters: Sequence[str]) -> NDArray[np.bool_]:
        """[requests] whether too little was seen of the drafter with requests of the class; now and then all are."""
        self._looks += 1
        if self._looks % AGAIN == 0:
            return np.ones(len(drafters), np.bool_)
        pairs = zip(drafters, load.classes, strict=True)
        return np.array([stats.rounds(drafter, name) < ENOUGH_ROUNDS for drafter, name in pairs])

    def _vary(
        self, load: Load, drafters: Sequence[str], tokens: NDArray[np.int64], *further: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Around what is best, so that its neighbours stay known: half of it, or the first of `further` that is not too
        far from what was seen and can be paid for."""
        if self._looks % HALVED == 0:
            return (tokens + 1) // 2
        for more in further:
            if more.sum() <= self._time.horizon and self._affords(load, drafters, more):
                return more
        return tokens

    def _affords(self, load: Load, drafters: Sequence[str], tokens: NDArray[np.int64]) -> bool:
        """Whether it would do no harm if all of `tokens` were rejected."""
        return self._purse.affords(float(self._time.added(load, self._speculation(tokens, drafters))))

    def _speculation(self, tokens: NDArray[np.int64], drafters: Sequence[str]) -> Speculation:
        count, of = self._time.num_drafters, self._number(drafters)
        by_drafter = (np.bincount(of, each, minlength=count).astype(np.float64) for each in (tokens, tokens > 0))
        return Speculation(*by_drafter)

    def _number(self, drafters: Sequence[str]) -> NDArray[np.int64]:
        return np.array([self._numbers[drafter] for drafter in drafters], np.int64)


class Patience:
    """When to look again whether something is worth it, while nothing is."""

    def __init__(self) -> None:
        self._wait = 0
        self._gap = GAPS[0]
        self._tries = 0
        self._seen: tuple[int, frozenset[str]] | None = None

    def looks(self, load: Load) -> bool:
        """Once the wait is over, and before if the batch has about doubled or halved or is made of other classes."""
        now = (len(load.classes).bit_length(), frozenset(load.classes))
        changed, self._seen = now != self._seen, now
        self._wait = max(0, self._wait - 1)
        return changed or self._wait == 0

    def rest(self) -> int:
        """How many further steps of the same batch nobody needs to look; they are taken as waited."""
        steps = min(self._wait - 1, REST)
        self._wait -= steps
        return steps

    def rest_until(self, steps: int) -> int:
        """`rest` of a wait that ends in so many steps, or later."""
        self._wait = max(self._wait, steps)
        return self.rest()

    @property
    def next_try(self) -> tuple[int, int]:
        return TRIES[self._tries % len(TRIES)]

    def some(self, requests: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """Other ones each time."""
        return np.roll(requests, -self._tries)[:count]

    def tries(self, affordable: bool, rich: bool) -> bool:
        """Nothing was worth it: whether a try is made. While there is plenty to pay from, one follows the other."""
        if self._wait > 0:
            return False
        if not affordable:
            self._wait = UNAFFORDABLE
            return False
        self._gap = GAPS[0] if rich else min(2 * self._gap, GAPS[1])
        self._wait = 0 if rich else self._gap
        self._tries += 1
        return True

    def rewarded(self) -> None:
        self._wait, self._gap = 0, GAPS[0]


def build(limits: Limits) -> Goodput:
    return Goodput(limits)
