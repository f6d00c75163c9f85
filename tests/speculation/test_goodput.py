"""The goodput controller on simulated machines: it finds what is best and never costs much to find that out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.warm_up import RowTime
from speculation.controllers.base import Limits, plain_step
from speculation.controllers.goodput import REFRESH, TRIES, Goodput
from speculation.controllers.purse import CAP, SHARE, START, Purse
from speculation.controllers.step_time import MIN_PLAIN
from speculation.controllers.yielding import LEAST_YIELD, PAUSES, YIELD_OF, Yield
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import Budgets, Load, Tally, Timing
from speculation.tree import DraftBatch
from tests.speculation.machine import Hardware, Run, SimulatedDrafter, best_budget, simulate

MAX_BUDGET = 16
POOR = SimulatedDrafter(0.0, fixed=3e-3, per_token=1e-3)


def run(drafter: SimulatedDrafter, batch: int, steps: int = 500, **settings: object) -> Run:
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    return simulate(controller, {"drafter": drafter}, ["any"] * batch, steps, max_budget=MAX_BUDGET, **settings)


@pytest.mark.parametrize("batch", range(1, 33))
def test_a_useless_drafter_costs_less_than_three_percent_at_any_batch(batch: int) -> None:
    played = run(SimulatedDrafter(0.0), batch)
    assert played.speedup() > 0.97
    assert np.mean([budgets.any() for budgets in played.budgets[250:]]) < 0.1


@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(
    "drafter",
    [SimulatedDrafter(0.0, fill=0.0), SimulatedDrafter(0.1, per_token=2e-3), SimulatedDrafter(0.6, fixed=20e-3)],
    ids=["silent", "slow by token", "slow by draft"],
)
def test_neither_does_a_silent_or_a_slow_one(drafter: SimulatedDrafter, batch: int) -> None:
    assert run(drafter, batch, 1000).speedup() > 0.97


@pytest.mark.parametrize("batch", [1, 4, 16, 32])
@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8])
def test_nor_does_any_other_on_a_noisy_machine(alpha: float, batch: int) -> None:
    assert run(SimulatedDrafter(alpha), batch, hardware=Hardware(noise=0.15, hiccups=0.03)).speedup() > 0.97


@pytest.mark.parametrize(
    ("drafter", "batch", "slow", "stretch"),
    [(POOR, 4, 2.0, 20), (POOR, 8, 1.4, 150), (POOR, 16, 1.4, 50), (SimulatedDrafter(0.2, fixed=1e-3), 16, 2.0, 50)],
)
def test_nor_does_one_where_others_use_the_machine_now_and_then(
    drafter: SimulatedDrafter, batch: int, slow: float, stretch: int
) -> None:
    """What speeds up again seems to be what drafts gain."""
    hardware = Hardware(slow=slow, stretch=stretch, noise=0.05)
    assert min(run(drafter, batch, 800, hardware=hardware, seed=seed).speedup() for seed in range(6)) > 0.965


@pytest.mark.parametrize(
    ("alpha", "batch"), [(0.95, 1), (0.95, 8), (0.95, 32), (0.8, 1), (0.8, 4), (0.5, 1), (0.5, 4), (0.2, 1)]
)
def test_it_comes_close_to_the_best_budget(alpha: float, batch: int) -> None:
    drafter = SimulatedDrafter(alpha)
    _, best = best_budget(Hardware(), drafter, batch, MAX_BUDGET)
    found = np.mean([run(drafter, batch, 500, seed=seed).speedup(200) for seed in range(2)])
    assert found > 0.9 * best


def test_a_controller_that_knows_what_rows_cost_begins_at_once() -> None:
    times = Hardware().row_times((2, 5, 9, 17) * 3, 200)

    def first_draft(times: list[RowTime]) -> int:
        controller = Goodput(Limits(MAX_BUDGET, ("drafter",), times))
        budgets = simulate(controller, {"drafter": SimulatedDrafter(0.8)}, ["any"], 40).budgets
        return next(step for step, of_step in enumerate(budgets) if of_step.any())

    assert first_draft(times) <= 1
    assert first_draft([]) >= MIN_PLAIN


def test_a_useless_drafter_that_says_nothing_is_not_asked_for_more_to_choose_from() -> None:
    times = Hardware().row_times((2, 5, 9, 17) * 3, 200)
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",), times))
    played = simulate(controller, {"drafter": SimulatedDrafter(0.0, says=False)}, ["any"], 500)
    assert max(int(budgets.max()) for budgets in played.budgets) <= 2 * TRIES[0][0]
    assert played.speedup() > 0.97


def test_what_has_brought_nothing_pauses_whatever_was_foretold() -> None:
    found = Yield()

    def bring(steps: int, speedup: float) -> bool:
        for _ in range(steps):
            found.observe(speedup, 1.0)
        return found.disappoints

    assert not bring(YIELD_OF - 1, 1.0), "too few to tell"
    assert bring(1, 1.0)
    assert found.pause() == PAUSES[0]
    assert bring(YIELD_OF, LEAST_YIELD - 0.01)
    assert found.pause() == 2 * PAUSES[0]
    assert not bring(3 * YIELD_OF, LEAST_YIELD + 0.1)
    assert bring(6 * YIELD_OF, 0.9)
    assert found.pause() == PAUSES[0], "it had been worth it for long"
    for _ in range(10):
        bring(YIELD_OF, 0.9)
        last = found.pause()
    assert last == PAUSES[1]


@pytest.mark.parametrize("drafter", [SimulatedDrafter(0.0), SimulatedDrafter(0.0, fixed=20e-3)], ids=["cheap", "dear"])
def test_while_nothing_is_worth_it_the_controller_rests(drafter: SimulatedDrafter) -> None:
    """Or can't be paid for."""
    asked = run(drafter, 8, 1000).asked
    assert np.mean(asked[100:]) < 0.12


def test_budgets_fall_as_the_batch_grows() -> None:
    mean = [np.mean(run(SimulatedDrafter(0.95), batch, 400).budgets[200:]) for batch in (1, 4, 16)]
    assert mean[0] > 1.5 * mean[1] > 2 * mean[2] > 0


def test_each_class_gets_what_it_is_worth() -> None:
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    drafter = SimulatedDrafter({"code": 0.9, "poem": 0.05})
    played = simulate(controller, {"drafter": drafter}, ["code", "poem"] * 2, 600)
    code, _, poem = (np.mean([budgets[r] for budgets in played.budgets[300:]]) for r in (0, 2, 1))
    assert code > 3
    assert poem < 0.5


def test_it_begins_to_speculate_when_other_requests_come() -> None:
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    drafter = SimulatedDrafter({"poem": 0.0, "code": 0.9})
    played = simulate(controller, {"drafter": drafter}, lambda step: ["poem" if step < 800 else "code"] * 2, 1600)
    assert played.speedup(1200) > 2


def test_it_begins_again_when_the_load_falls() -> None:
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    drafters = {"drafter": SimulatedDrafter(0.6)}
    played = simulate(controller, drafters, lambda step: ["any"] * (32 if step < 500 else 1), 1200)
    assert not np.concatenate(played.budgets[400:500]).sum() > 200
    assert played.speedup(900) > 1.5


def test_a_plain_step_now_and_then_keeps_the_time_of_one_known() -> None:
    plain = [not budgets.any() for budgets in run(SimulatedDrafter(0.95), 1, 600).budgets]
    gaps = np.diff(np.flatnonzero(plain[100:]))
    assert gaps.max() == REFRESH[1] + 1


@pytest.mark.parametrize("alpha", [0.3, 0.6])
def test_a_machine_that_was_slow_when_it_began_is_no_reason_to_speculate(alpha: float) -> None:
    """Steps that speculate then seem to gain what the machine does; only plain ones say that it isn't so."""
    machine, controller = Hardware(), Goodput(Limits(MAX_BUDGET, ("drafter",)))
    load = Load(["any"] * 16, np.full(16, 200), np.full(16, MAX_BUDGET))
    seconds = 5 * machine.step(16, 16 * 200)
    nothing, tally = plain_step(["drafter"] * 16), Tally(np.zeros(16, np.int64), np.ones(16, np.int64))
    for _ in range(2 * MIN_PLAIN):
        controller.record(load, nothing, tally, Timing(16, 16 * 200, 16, seconds))
    played = simulate(controller, {"drafter": SimulatedDrafter(alpha)}, ["any"] * 16, 300)
    assert played.speedup() > 0.93
    assert played.speedup(60) > 0.97


def test_nodes_that_were_drawn_are_not_chosen_by_what_they_are() -> None:
    """It would change their law."""
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    simulate(controller, {"drafter": SimulatedDrafter(0.9)}, ["any"], 100, max_budget=MAX_BUDGET)
    budgets = Budgets(np.array([3]), np.array([3]), ["drafter"])
    hopeless = replace(
        DraftBatch.of_chains([[1, 2, 3, 4]], DraftLaw.POINT_MASS, "drafter"), confidence=np.full(4, 0.001, np.float32)
    )
    assert controller.trim(hopeless, budgets, np.zeros(1, np.int64)).num_nodes == 0
    q = QLaw(np.zeros(4, np.int64), torch.full((1, 8), 1 / 8))
    drawn = replace(hopeless, law=DraftLaw.IID, q=q)
    assert controller.trim(drawn, budgets, np.zeros(1, np.int64)).num_nodes == 3


def test_requests_with_no_room_draft_nothing() -> None:
    controller = Goodput(Limits(MAX_BUDGET, ("drafter",)))
    played = simulate(controller, {"drafter": SimulatedDrafter(0.9)}, ["any"], 100, room=0)
    assert not np.concatenate(played.budgets).any()


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_no_more_is_lost_than_the_purse_says(data: st.DataObject) -> None:
    """Whatever is tried as long as the purse affords what it costs."""
    purse, lost, plain_steps = Purse(), 0.0, 0.0
    for _ in range(data.draw(st.integers(1, 60))):
        cost = data.draw(st.floats(0, 3))
        if purse.affords(cost) and data.draw(st.booleans()):
            gain = data.draw(st.floats(0, 3))
            purse.account(1.0, 1.0 + cost, 1.0 + gain)
            lost, plain_steps = lost + cost - gain, plain_steps + 1 + gain
        else:
            steps = data.draw(st.integers(1, 8))
            purse.account_plain(1.0, steps)
            plain_steps += steps
        assert lost <= SHARE * plain_steps + START + 1e-9


def test_savings_are_held_up_to_a_bound() -> None:
    purse = Purse()
    for _ in range(100):
        purse.account(1.0, 1.0, 5.0)
    assert purse.affords(CAP)
    assert not purse.affords(CAP + 0.1)
