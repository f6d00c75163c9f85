"""A machine that only counts: how long steps take, what becomes of drafts, and what a controller makes of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from engine.warm_up import RowTime
from speculation.acceptance import Acceptance
from speculation.controllers.base import plain_step
from speculation.counters import Counters
from speculation.laws import DraftLaw
from speculation.overlap import Overlap
from speculation.protocols import Controller
from speculation.rounds import Load, Outcome, Tally, Timing
from speculation.tree import DraftBatch, offsets_of

VERIFY = 0.2e-3


@dataclass(frozen=True)
class Hardware:
    """Seconds. The defaults are about a model of 135M parameters on two cores."""

    fixed: float = 8e-3
    per_row: float = 0.2e-3
    free_rows: float = 10.0
    """Rows beyond these cost the rest."""
    beyond: float = 0.4e-3
    per_context: float = 0.2e-6
    noise: float = 0.03
    hiccups: float = 0.01
    """How often a step takes five times as long."""
    slow: float = 1.0
    """Times as long that steps take in every other stretch of so many."""
    stretch: int = 100

    def step(self, rows: int, context: int) -> float:
        return (
            self.fixed
            + self.per_row * rows
            + self.beyond * max(0.0, rows - self.free_rows)
            + self.per_context * context
        )

    def row_times(self, sizes: Sequence[int], context: int) -> list[RowTime]:
        """As a worker has them before its first request: each size after a step of one row."""
        return [RowTime(rows, context, self.step(rows, context)) for size in sizes for rows in (1, size)]


@dataclass(frozen=True)
class SimulatedDrafter:
    """Proposes chains; a token is accepted with probability alpha of the request's class."""

    alpha: float | Mapping[str, float]
    fixed: float = 0.3e-3
    per_token: float = 0.1e-3
    spread: float = 0.0
    """A token is accepted with alpha + spread or alpha - spread, both as often, and the drafter says which."""
    fill: float = 1.0
    """How often it has anything to propose."""
    says: bool = True
    """Whether it says what it takes its tokens to be worth."""

    def accepts(self, name: str) -> float:
        return self.alpha if isinstance(self.alpha, float) else self.alpha[name]


@dataclass
class Run:
    """By step. Seconds are without the noise, which the controller sees."""

    seconds: list[float] = field(default_factory=list)
    plain_seconds: list[float] = field(default_factory=list)
    """That plain steps would have taken for the tokens."""
    budgets: list[NDArray[np.int64]] = field(default_factory=list)
    drafters: list[Sequence[str]] = field(default_factory=list)
    asked: list[bool] = field(default_factory=list)
    """Whether the controller was: it may rest."""

    def speedup(self, start: int = 0) -> float:
        """From a step on."""
        return sum(self.plain_seconds[start:]) / sum(self.seconds[start:])


def simulate(
    controller: Controller,
    drafters: Mapping[str, SimulatedDrafter],
    classes: Sequence[str] | Callable[[int], Sequence[str]],
    steps: int,
    hardware: Hardware | None = None,
    max_budget: int = 16,
    room: int = 16,
    seed: int = 0,
    wishes: Sequence[str] = (),
    counters: Counters | None = None,
    sounds: bool = False,
) -> Run:
    """Steps of a batch of these classes, which may change with the step. `wishes`: as Load has them. A request has 40
    steps. `sounds`: whether the worker asks about those that are not tried, too."""
    hardware, rng, run = hardware or Hardware(), np.random.default_rng(seed), Run()
    stats = Acceptance(max_budget)
    before, rest, rested = list[str](), 0, 0
    for step in range(steps):
        now = list(classes(step) if callable(classes) else classes)
        contexts = np.full(len(now), 200 + step % 400)
        load = Load(now, contexts, np.full(len(now), room), wishes=wishes)
        rests, before = rest > 0 and now == before, now
        budgets = plain_step([""] * len(now)) if rests else controller.budget(load, stats)
        rest = rest - 1 if rests else budgets.rest
        drafted, emitted, draft_seconds = np.zeros(len(now), np.int64), np.ones(len(now), np.int64), 0.0
        for name in sorted({budgets.drafters[r] for r in np.flatnonzero(budgets.tokens)}):
            some = np.flatnonzero((budgets.tokens > 0) & (np.array(budgets.drafters) == name))
            drafts = _propose(drafters[name], name, [now[r] for r in some], budgets.candidates[some], rng)
            drafts = drafts.cut_below(drafts.path_products(_confidence(drafts)) < budgets.floor)
            proposed = int(drafts.lengths.max())
            if drafters[name].says:
                drafts = controller.trim(drafts, budgets, some)
            else:
                drafts = drafts.prune(controller.trim(replace(drafts, confidence=None), budgets, some).lengths)
            outcome = _verify(drafts, rng)
            if counters is not None:
                _count(counters, drafts, outcome, some + step // 40 * len(now))
                if sounds and counters.doubts(name):
                    others = np.flatnonzero(budgets.tokens == 0)
                    right = rng.random(len(others)) < [drafters[name].accepts(now[r]) for r in others]
                    counters.sounded(drafts, right, (others + step // 40 * len(now)).tolist())
            stats.observe(drafts, outcome, budgets.tokens[some], [now[r] for r in some])
            drafted[some], emitted[some] = drafts.lengths, outcome.num_accepted + 1
            draft_seconds += drafters[name].fixed + drafters[name].per_token * proposed
        rows = len(now) + int(drafted.sum())
        slow = 5.0 if rng.random() < hardware.hiccups else 1.0
        slow *= 1.0 if step // hardware.stretch % 2 else hardware.slow
        ideal, noise = hardware.step(rows, int(contexts.sum())), slow * float(rng.lognormal(0.0, hardware.noise))
        verify_seconds = VERIFY if budgets.tokens.any() else 0.0
        rested += rests
        if not rests:
            timing = Timing(len(now), int(contexts.sum()), rows, ideal * noise, draft_seconds, verify_seconds, rested)
            controller.record(load, budgets, Tally(drafted, emitted), timing)
            rested = 0
        run.asked.append(not rests)
        run.seconds.append(ideal + draft_seconds + verify_seconds)
        run.plain_seconds.append(hardware.step(len(now), int(contexts.sum())) * float(emitted.mean()))
        run.budgets.append(drafted)
        run.drafters.append(budgets.drafters)
    return run


def _propose(
    drafter: SimulatedDrafter, name: str, classes: Sequence[str], asked: NDArray[np.int64], rng: np.random.Generator
) -> DraftBatch:
    lengths = np.where(rng.random(len(asked)) < drafter.fill, asked, 0)
    offsets = offsets_of(lengths)
    parents = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) - 1
    alphas = np.repeat([drafter.accepts(of) for of in classes], lengths)
    chances = alphas + drafter.spread * rng.choice([-1.0, 1.0], len(alphas))
    drafts = DraftBatch(np.zeros(offsets[-1], np.int64), parents, offsets, DraftLaw.POINT_MASS, name)
    return replace(drafts, confidence=chances.astype(np.float32))


def _confidence(drafts: DraftBatch) -> NDArray[np.float32]:
    assert drafts.confidence is not None
    return drafts.confidence


def _verify(drafts: DraftBatch, rng: np.random.Generator) -> Outcome:
    accepted = drafts.path_products(rng.random(drafts.num_nodes) < _confidence(drafts)) > 0
    return Outcome.of(drafts, accepted, np.zeros(drafts.num_requests, np.int64))


def _count(counters: Counters, drafts: DraftBatch, outcome: Outcome, requests: NDArray[np.int64]) -> None:
    """As a worker does: it knows of requests without a draft no more by then."""
    kept = np.flatnonzero(drafts.lengths)
    if len(kept):
        drafts = drafts.select(kept)
        outcome = Outcome.of(drafts, outcome.accepted, np.zeros(len(kept), np.int64))
        counters.count(drafts, outcome, Overlap(0.0, 0), np.ones(len(kept), np.bool_), requests[kept].tolist())


def best_budget(hardware: Hardware, drafter: SimulatedDrafter, batch: int, max_budget: int) -> tuple[int, float]:
    """The budget that is best for all requests, and its speed-up."""
    rates = []
    for k in range(max_budget + 1):
        seconds = hardware.step(batch * (1 + k), batch * 400)
        if k:
            seconds += drafter.fixed + drafter.per_token * k + VERIFY
        rates.append(batch * sum(drafter.accepts("any") ** i for i in range(k + 1)) / seconds)
    return int(np.argmax(rates)), max(rates) / rates[0]
