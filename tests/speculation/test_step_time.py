"""The fit of a step's time finds the machine's own, through noise and hiccups."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.warm_up import RowTime
from speculation.acceptance import Prospects
from speculation.controllers.allocation import allocate
from speculation.controllers.step_time import MIN_ALIKE, MIN_PLAIN, UNKNOWN, Fit, Speculation, StepTime
from speculation.rounds import Load
from tests.speculation.machine import Hardware


def load(batch: int, context: int = 300) -> Load:
    return Load(["any"] * batch, np.full(batch, context), np.full(batch, 16))


def of_one(tokens: int, sequences: int) -> Speculation:
    return Speculation(np.array([float(tokens)]), np.array([float(sequences)]))


def fitted(hiccups: float) -> StepTime:
    machine, rng, time = Hardware(), np.random.default_rng(0), StepTime(1)
    for step in range(900):
        batch, tokens = int(rng.integers(1, 33)), int(rng.integers(0, 5))
        context = int(rng.integers(100, 2000))
        noise = rng.lognormal(0, 0.03) * (5 if rng.random() < hiccups else 1)
        seconds = machine.step(batch * (1 + tokens), batch * context)
        if tokens == 0 or step < 30:
            time.record_plain(load(batch, context), machine.step(batch, batch * context) * noise)
        else:
            drafting = 0.5e-3 + 0.1e-3 * tokens
            time.record(load(batch, context), of_one(batch * tokens, batch), (seconds + drafting) * noise)
    return time


@pytest.mark.parametrize("hiccups", [0.0, 0.05])
@pytest.mark.parametrize("batch", [1, 3, 9, 20, 32])
def test_steps_of_any_size_are_predicted(hiccups: float, batch: int) -> None:
    time, machine = fitted(hiccups), Hardware()
    plain = machine.step(batch, batch * 500)
    assert time.plain(load(batch, 500)) == pytest.approx(plain, rel=0.06)
    for tokens in (1, 2, 4):
        true = machine.step(batch * (1 + tokens), batch * 500) + 0.5e-3 + 0.1e-3 * tokens
        added = float(time.added(load(batch, 500), of_one(batch * tokens, batch)))
        assert plain + added == pytest.approx(true, rel=0.12)


def test_steps_timed_before_there_are_requests_say_what_rows_cost() -> None:
    machine, time = Hardware(), StepTime(2)
    for context, rows in product((0, 512), (2, 3, 5, 9, 17) * 2):
        for count in (1, rows):
            time.rehearse(RowTime(count, context, machine.step(count, context)))
    assert time.known
    assert time.added_known
    for drafter, tokens in product(range(2), (1, 4, 12)):
        speculation = Speculation(tokens * np.eye(2)[drafter], np.eye(2)[drafter])
        true = machine.step(1 + tokens, 300) - machine.step(1, 300)
        assert float(time.added(load(1), speculation)) == pytest.approx(true, abs=0.1 * machine.step(1, 300))
    assert time.horizon >= 16


def test_a_machine_that_gets_slower_is_noticed() -> None:
    time = StepTime(1)
    for step in range(400):
        time.record_plain(load(4), 0.01 if step < 100 else 0.02)
    assert time.plain(load(4)) == pytest.approx(0.02, rel=0.15)


@pytest.mark.parametrize("seconds", [0.02, 0.005])
def test_what_was_wrong_thrice_in_a_row_was_no_hiccup(seconds: float) -> None:
    time = StepTime(1)
    for _ in range(300):
        time.record_plain(load(4), 0.01)
    for _ in range(8):
        time.record_plain(load(4), seconds)
    assert time.plain(load(4)) == pytest.approx(seconds, rel=0.1)


def test_of_three_surprises_what_all_have_in_common_is_believed() -> None:
    """A hiccup may be one of them, when others begin to use the machine."""
    time = StepTime(1)
    for seconds in [0.01] * 300 + [0.012, 0.012, 0.06]:
        time.record_plain(load(4), seconds)
    assert time.plain(load(4)) < 0.013


def test_one_step_that_takes_long_is_a_hiccup() -> None:
    time = StepTime(1)
    for step in range(300):
        time.record_plain(load(4), 0.05 if step % 10 == 9 else 0.01)
    assert time.plain(load(4)) == pytest.approx(0.01, rel=0.05)


def test_what_prompts_took_does_not_say_what_many_sequences_take() -> None:
    """Steps of a worker that has just begun: of one row, then prompts of which more and more are decoded."""
    machine, time = Hardware(), StepTime(1)
    for _ in range(MIN_PLAIN):
        time.record_plain(load(1), machine.step(1, 300))
    for batch in range(1, 17):
        prompts = Load(["any"] * batch, np.full(batch, 300), np.full(batch, 16), other_tokens=512)
        time.record_plain(prompts, machine.step(batch + 512, 300 * batch))
    assert time.knows_plain(load(1))
    assert not time.knows_plain(load(16))
    for _ in range(2 * MIN_ALIKE):
        time.record_plain(load(16), machine.step(16, 16 * 300))
    assert time.knows_plain(load(16))
    assert time.plain(load(16)) == pytest.approx(machine.step(16, 16 * 300), rel=0.1)


def test_a_step_in_which_the_machine_did_something_else_is_no_loss_of_speculation() -> None:
    time = fitted(0.0)
    expected = time.plain(load(4)) + float(time.added(load(4), of_one(8, 4)))
    _, seconds = time.record(load(4), of_one(8, 4), 10 * expected)
    assert seconds < 2 * expected


def test_until_speculation_was_seen_it_is_taken_to_cost_half_a_step() -> None:
    time = StepTime(2)
    for _ in range(MIN_PLAIN):
        time.record_plain(load(4), 0.01)
    nothing, something = np.zeros(2), np.array([3.0, 1.0])
    tokens = np.stack([nothing, something])
    assert time.added(load(4), Speculation(tokens, tokens)).tolist() == pytest.approx([0.0, UNKNOWN * 0.01], rel=1e-2)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000))
def test_no_coefficient_is_negative_and_none_could_be_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    features, fit = rng.random((40, 5)), Fit(5, 1)
    wanted = features @ rng.normal(1, 1, 5)
    for row, value in zip(features, wanted, strict=True):
        fit.observe(row, float(value))
    assert fit.predict(np.eye(5)).min() >= 0.0


class Priced(StepTime):
    """A plain step takes 1, a draft token what its place says."""

    horizon = 100

    def __init__(self, prices: list[float]) -> None:
        super().__init__(1)
        self._costs = np.concatenate([[0.0], np.cumsum(prices)])

    def plain(self, load: Load) -> float:
        return 1.0

    def added(self, load: Load, speculation: Speculation) -> np.ndarray:
        return np.interp(speculation.tokens.sum(-1), np.arange(len(self._costs)), self._costs)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_other_budgets_would_emit_more_tokens_per_second(data: st.DataObject) -> None:
    requests, ranks = data.draw(st.integers(1, 3)), 3
    gains = np.sort([[data.draw(st.floats(0, 1)) for _ in range(ranks)] for _ in range(requests)], axis=1)[:, ::-1]
    room = np.array([data.draw(st.integers(0, ranks)) for _ in range(requests)])
    time = Priced([data.draw(st.floats(0, 0.5)) for _ in range(requests * ranks)])
    here = load(requests)
    prospects = Prospects(gains, np.ones_like(gains))

    def speedup(tokens: tuple[int, ...]) -> float:
        gain = sum(gains[r, :k].sum() for r, k in enumerate(tokens)) / requests
        return (1 + gain) / (1 + float(time.added(here, of_one(sum(tokens), 1))))

    best = max(speedup(tokens) for tokens in product(*(range(limit + 1) for limit in room)))
    tokens, found = allocate(here, np.zeros(requests, np.int64), prospects, room, time)
    assert (tokens <= room).all()
    assert found == pytest.approx(max(best, 1.0))
    assert speedup(tuple(tokens.tolist())) == pytest.approx(found)
