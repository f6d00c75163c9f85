"""The arithmetic of `slipstream bench speculation`: means, intervals, acceptance, shares, and what they are held to."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bench.speculation.arms import Answer
from bench.speculation.goals import goals, missed
from bench.speculation.report import Drafts, Pair, Seconds, by_task, interval, summary
from engine.drafts import Draft

SUMMARY = {
    "questions",
    "tokens",
    "alpha",
    "tau",
    "acceptance_length",
    "acceptance_rate",
    "accepted_per_position",
    "tokens_per_s",
    "plain_tokens_per_s",
    *(f"{mean}{end}" for mean in ("speedup", "geometric_speedup", "decode_speedup") for end in ("", "_low", "_high")),
    "draft_share",
    "verify_share",
}


def answer(tokens: int, seconds: float, steps: int, first_s: float = 1.0) -> Answer:
    return Answer(list(range(tokens)), first_s=first_s, seconds=seconds, steps=steps)


def drafts(*rounds: tuple[list[int], list[int]]) -> Drafts:
    """Of (parents, path) each."""
    counts = Drafts()
    for parents, path in rounds:
        depths: list[int] = []
        for parent in parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        counts.add(Draft(np.zeros(len(parents), np.int64), np.array(parents), np.array(depths)), path)
    return counts


NO_TIME = Seconds(0.0, 0.0, 0.0)
PAIRS = [
    Pair(
        "qa", 0, answer(9, 9.0, 8), answer(9, 3.0, 2), drafts(([-1, 0, 1], [0, 1, 2]), ([-1, 0, 1], [0, 1, 2])), NO_TIME
    ),
    Pair("rag", 1, answer(5, 5.0, 4), answer(5, 5.0, 4), drafts(([-1, -1, 0], [1])), NO_TIME),
]


def test_tau_is_the_tokens_after_the_first_over_the_steps_that_brought_them() -> None:
    assert summary(PAIRS)["tau"] == (8 + 4) / (2 + 4)
    assert [of["tau"] for of in by_task(PAIRS)["tasks"].values()] == [4, 1]


def test_the_speedup_is_the_mean_of_the_ratios_of_tokens_per_second() -> None:
    found = summary(PAIRS)
    assert found["speedup"] == pytest.approx((3 + 1) / 2)
    assert found["geometric_speedup"] == pytest.approx(3**0.5)
    assert found["decode_speedup"] == pytest.approx((8 / 2 + 1) / 2)
    assert found["tokens_per_s"] == pytest.approx((3 + 1) / 2)
    assert found["plain_tokens_per_s"] == pytest.approx(1)


def test_acceptance_is_counted_by_first_children_by_tokens_and_by_position() -> None:
    """Nine nodes in three drafts, of which seven were accepted. Of the last draft the first child of the root was not:
    the path goes by its sibling, which has no children."""
    found = summary(PAIRS)
    assert found["alpha"] == pytest.approx(6 / 7)
    assert found["acceptance_rate"] == pytest.approx(7 / 9)
    assert found["acceptance_length"] == pytest.approx(1 + 7 / 3)
    assert found["accepted_per_position"] == pytest.approx([3 / 3, 2 / 3, 2 / 2])


def test_what_was_never_observed_is_none() -> None:
    found = summary([Pair("qa", 0, answer(1, 1.0, 0), answer(1, 1.0, 0), Drafts(), NO_TIME)])
    unknown = {key for key, value in found.items() if value is None}
    assert unknown == SUMMARY - {
        *("questions", "tokens", "accepted_per_position", "tokens_per_s", "plain_tokens_per_s"),
        *("speedup", "geometric_speedup"),
    }


def test_shares_are_of_the_time_of_target_drafters_and_rules_together() -> None:
    whole = Seconds(9.0, 3.0, 1.0).part_since(Seconds(1.0, 1.0, 1.0), 4)
    assert whole == Seconds(2.0, 0.5, 0.0)
    found = summary([Pair("qa", 0, answer(2, 1.0, 1, 0.5), answer(2, 1.0, 1, 0.5), Drafts(), whole)])
    assert (found["draft_share"], found["verify_share"]) == (0.2, 0.0)


def test_the_interval_holds_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    batches = list(range(40))
    held = 0
    for _ in range(40):
        low, high = interval(rng.normal(1.0, 0.2, 40).tolist(), batches) or (0, 0)
        held += low <= 1.0 <= high
    assert 35 <= held < 40


def test_questions_of_one_batch_count_as_one_observation() -> None:
    values = np.random.default_rng(0).normal(1.0, 0.1, 30).tolist()
    low, high = interval(values, list(range(30))) or (0, 0)
    again = interval([value for value in values for _ in range(8)], [batch for batch in range(30) for _ in range(8)])
    assert again == pytest.approx((low, high))
    assert interval(values, [0] * 30) is None


@pytest.mark.parametrize(
    ("controller", "low", "drafting", "held_to"),
    [
        ("goodput", 0.97, 0.15, {"speedup_low": True, "draft_share": True}),
        ("goodput", 0.969, 0.151, {"speedup_low": False, "draft_share": False}),
        ("fixed", 0.5, 0.03, {"draft_share": True}),
        ("bandit", None, None, {}),
    ],
)
def test_speedups_and_shares_are_held_to_goals(
    controller: str, low: float | None, drafting: float | None, held_to: dict[str, bool]
) -> None:
    overall: dict[str, Any] = {"speedup_low": low, "draft_share": drafting}
    found = goals(controller, overall)
    assert {key: goal["met"] for key, goal in found.items()} == held_to
    lines = missed({"all": overall, "goals": found})
    assert len(lines) == list(held_to.values()).count(False)
    assert all(line.startswith(tuple(held_to)) for line in lines)
