"""What was seen of drafts, and what is concluded from it."""

from __future__ import annotations

import numpy as np
import pytest

from speculation.acceptance import GUESS, MAX_CLASSES, Acceptance
from speculation.laws import DraftLaw
from speculation.rounds import Outcome
from speculation.tree import DraftBatch


def observe(stats: Acceptance, lengths: list[int], accepted: list[int], asked: list[int], classes: list[str]) -> None:
    """Chains of these lengths of which the first so many tokens were accepted."""
    drafts = DraftBatch.of_chains([list(range(length)) for length in lengths], DraftLaw.POINT_MASS, "drafter")
    taken = drafts.ranks < np.array(accepted)[drafts.request_of]
    stats.observe(drafts, Outcome.of(drafts, taken, np.zeros(len(lengths), np.int64)), np.array(asked), classes)


def test_gains_become_what_is_accepted_and_fills_what_is_proposed() -> None:
    stats = Acceptance(4)
    for _ in range(200):
        observe(stats, [3, 0], [2, 0], [4, 4], ["a", "a"])
    found = stats.prospects(["drafter"], ["a"])
    assert found.gains[0].tolist() == pytest.approx([0.5, 0.5, 0.0, 0.0], abs=0.05)
    assert found.fills[0].tolist() == pytest.approx([0.5, 0.5, 0.5, 0.0], abs=0.05)


def test_what_was_not_asked_for_is_unobserved_not_rejected() -> None:
    stats = Acceptance(8)
    for _ in range(200):
        observe(stats, [2], [2], [2], ["a"])
    assert stats.known("drafter") == 2
    assert stats.alpha("drafter") > 0.95
    gains = stats.prospects(["drafter"], ["a"]).gains[0]
    assert gains[:2].min() > 0.95
    assert gains[2:].min() > 0.3


def test_before_anything_was_seen_there_is_a_guess() -> None:
    stats = Acceptance(3)
    assert (stats.known("drafter"), stats.alpha("drafter")) == (0, GUESS)
    assert stats.prospects(["drafter"], ["a"]).gains[0][0] == pytest.approx(GUESS)


def test_a_class_that_is_new_is_taken_to_be_like_the_others_until_it_is_seen() -> None:
    stats = Acceptance(2)
    for _ in range(100):
        observe(stats, [2], [2], [2], ["easy"])
    new = stats.prospects(["drafter"], ["hard"]).gains[0][0]
    for _ in range(30):
        observe(stats, [2, 2], [2, 0], [2, 2], ["easy", "hard"])
    both = stats.prospects(["drafter"] * 2, ["easy", "hard"]).gains[:, 0]
    assert new > 0.9
    assert both[0] > 0.9
    assert both[1] < 0.2


def test_alpha_is_of_first_children_that_were_judged() -> None:
    stats = Acceptance(3)
    for _ in range(300):
        observe(stats, [3], [1], [3], ["a"])  # the second is rejected, the third never judged
    assert stats.alpha("drafter") == pytest.approx(0.5, abs=0.02)


def test_what_was_long_ago_is_forgotten() -> None:
    stats = Acceptance(1)
    for accepted in [1] * 300 + [0] * 300:
        observe(stats, [1], [accepted], [1], ["a"])
    assert stats.prospects(["drafter"], ["a"]).gains[0][0] < 0.15


def test_gains_never_rise_with_rank() -> None:
    stats = Acceptance(6)
    drafts = DraftBatch(np.arange(3), np.array([-1, -1, 1]), np.array([0, 3]), DraftLaw.POINT_MASS, "drafter")
    for _ in range(100):  # the second child and its own are accepted, the first never
        taken = np.array([False, True, True])
        stats.observe(drafts, Outcome.of(drafts, taken, np.zeros(1, np.int64)), np.array([6]), ["a"])
    assert (np.diff(stats.prospects(["drafter"], ["a"]).gains[0]) <= 0).all()


def test_the_number_of_classes_is_bounded() -> None:
    stats = Acceptance(1)
    for number in range(3 * MAX_CLASSES):
        observe(stats, [1], [1], [1], [f"class {number}"])
    assert len(stats._counts["drafter"]) == MAX_CLASSES + 1
