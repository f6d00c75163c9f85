"""The other controllers: by name, and each for what it adds to goodput."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from core.errors import ConfigError
from speculation.acceptance import Acceptance
from speculation.controllers.base import Limits
from speculation.controllers.confidence import Confidence
from speculation.controllers.registry import CONTROLLERS, make_controller
from speculation.laws import DraftLaw
from speculation.protocols import Controller
from speculation.rounds import Budgets, Load
from speculation.tree import DraftBatch
from tests.speculation.machine import Run, SimulatedDrafter, simulate

LIMITS = Limits(16, ("drafter",))


def play(name: str, drafters: dict[str, SimulatedDrafter], classes: list[str], steps: int, seed: int = 0) -> Run:
    return simulate(make_controller(name, Limits(16, tuple(drafters))), drafters, classes, steps, seed=seed)


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_every_name_makes_a_controller_that_runs(name: str) -> None:
    made: Controller = make_controller(name, LIMITS)
    assert simulate(made, {"drafter": SimulatedDrafter(0.8)}, ["any"] * 2, 100).speedup(50) > 1


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="no controller is called 'goodputt': did you mean goodput"):
        make_controller("goodputt", LIMITS)


def test_fixed_gives_what_each_request_can_take() -> None:
    load = Load(["a", "b", "c"], np.full(3, 10), np.array([0, 3, 40]))
    budgets = make_controller("fixed", LIMITS).budget(load, Acceptance(16))
    assert (budgets.tokens.tolist(), budgets.candidates.tolist()) == ([0, 3, 16], [0, 3, 16])
    assert list(budgets.drafters) == ["drafter"] * 3


def test_fixed_verifies_no_more_than_the_budget() -> None:
    drafts = DraftBatch.of_chains([[1, 2, 3], [4, 5]], DraftLaw.POINT_MASS, "drafter")
    budgets = Budgets(np.array([9, 2, 1]), np.array([9, 2, 1]), ["drafter"] * 3)
    trimmed = make_controller("fixed", LIMITS).trim(drafts, budgets, np.array([1, 2]))
    assert trimmed.tokens.tolist() == [1, 2, 4]


@pytest.mark.parametrize(("name", "worth"), [("goodput", 1.05), ("confidence", 1.05), ("dyspec", 0.97)])
def test_confidences_are_worth_something(name: str, worth: float) -> None:
    """DySpec's growth gains some 2 % here, which a few runs can't tell from nothing; that it loses nothing they can."""
    drafter = SimulatedDrafter(0.6, spread=0.35)
    with_them, without = (
        np.median([play(which, {"drafter": one}, ["any"] * 4, 500, seed).speedup(200) for seed in range(3)])
        for which, one in ((name, drafter), ("goodput", replace(drafter, says=False)))
    )
    assert with_them > worth * without


@pytest.mark.parametrize("name", ["confidence", "dyspec", "bandit"])
def test_a_useless_drafter_costs_little_under_any_controller(name: str) -> None:
    drafters = {"drafter": SimulatedDrafter(0.3, spread=0.3, per_token=3e-3)}
    assert play(name, drafters, ["any"] * 8, 1000).speedup() > 0.97


def test_a_chain_ends_with_the_first_node_past_the_floor() -> None:
    drafts = DraftBatch.of_chains([[1, 2, 3, 4], [5, 6]], DraftLaw.POINT_MASS, "drafter")
    drafts = replace(drafts, confidence=np.array([0.9, 0.5, 0.9, 0.9, 0.2, 0.9], np.float32))
    budgets = Budgets(np.array([4, 4]), np.array([4, 4]), ["drafter"] * 2, 0.5)
    trimmed = Confidence(LIMITS).trim(drafts, budgets, np.arange(2))
    assert trimmed.tokens.tolist() == [1, 2, 5]


def test_the_bandit_finds_the_drafter_of_each_class() -> None:
    drafters = {
        "useless": SimulatedDrafter(0.0),
        "coder": SimulatedDrafter({"code": 0.9, "chat": 0.1}),
        "talker": SimulatedDrafter({"code": 0.2, "chat": 0.75}),
    }
    played = play("bandit", drafters, ["code", "chat"], 800)
    late = [tuple(names) for names in played.drafters[400:]]
    assert np.mean([names == ("coder", "talker") for names in late]) > 0.75
    assert played.speedup(400) > 2


def test_the_bandit_changes_its_mind() -> None:
    drafters = {"first": SimulatedDrafter({"any": 0.8}), "second": SimulatedDrafter({"any": 0.5})}
    controller = make_controller("bandit", Limits(16, tuple(drafters)))
    before = simulate(controller, drafters, ["any"], 400)
    drafters["first"], drafters["second"] = drafters["second"], drafters["first"]
    after = simulate(controller, drafters, ["any"], 1600)
    assert np.mean([names[0] == "first" for names in before.drafters[200:]]) > 0.75
    assert np.mean([names[0] == "second" for names in after.drafters[1200:]]) > 0.75


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_who_asked_for_a_drafter_is_budgeted_by_what_that_one_does(name: str) -> None:
    """And who did not by the one that comes first, which is of no use here."""
    drafters = {"useless": SimulatedDrafter(0.0), "good": SimulatedDrafter(0.85)}
    controller = make_controller(name, Limits(16, tuple(drafters)))
    played = simulate(controller, drafters, ["any"] * 4, 600, wishes=["good", "", "good", "good"])
    assert {(names[0], *names[2:]) for names in played.drafters} == {("good",) * 3}
    if name not in ("fixed", "bandit"):
        drafted = np.array(played.budgets[300:]) > 0
        assert drafted[:, [0, 2, 3]].mean() > 0.8
        assert drafted[:, 1].mean() < 0.3
        assert {names[1] for names in played.drafters} == {"useless"}


def test_the_bandit_learns_nothing_about_its_arms_from_those_who_asked_for_another_drafter() -> None:
    drafters = {"first": SimulatedDrafter(0.5), "asked for": SimulatedDrafter(0.9)}
    controller = make_controller("bandit", Limits(16, tuple(drafters)))
    simulate(controller, drafters, ["any"] * 2, 400, wishes=["asked for"] * 2)
    load = Load(["any"], np.full(1, 100), np.full(1, 16))
    assert list(controller.budget(load, Acceptance(16)).drafters) == ["first"], "which was not played yet"
