"""Training makes heads better on prompts that they have not seen, and the same seed makes the same head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.runner import ModelRunner
from speculation.heads.config import read_head_config
from speculation.heads.distil import Result, choose_tokens
from speculation.heads.lesson import make_lesson
from speculation.heads.passages import Passage
from speculation.heads.quality import measure
from tests.speculation.heads.trained import KINDS, distilled

EACH = pytest.mark.parametrize("kind", KINDS)


@EACH
def test_a_trained_head_drafts_better_on_unseen_prompts(results: dict[str, tuple[Path, Result]], kind: str) -> None:
    _, result = results[kind]
    assert result.after.alpha > result.before.alpha + 0.1
    assert result.after.tau > result.before.tau
    assert len(result.after.per_depth) == 3


@pytest.mark.parametrize("kind", ["eagle3", "hydra"])
def test_the_same_seed_and_steps_make_the_same_head(target: ModelRunner, tmp_path: Path, kind: str) -> None:
    for name in ("one", "other"):
        distilled(kind, target, tmp_path / name, steps=30)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "other"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@EACH
def test_training_goes_on_from_a_head(
    target: ModelRunner, results: dict[str, tuple[Path, Result]], tmp_path: Path, kind: str
) -> None:
    folder, first = results[kind]
    again = distilled(kind, target, tmp_path / "again", steps=10, start=folder)
    assert again.before == first.after
    if again.after.tau > again.before.tau:
        assert read_head_config(tmp_path / "again", 3) == read_head_config(folder, 3)
    else:
        assert not any((tmp_path / "again").iterdir())


def passage(token_ids: list[int], first: int) -> Passage:
    """By a target that is sure of each token."""
    drawn = torch.tensor(token_ids[first + 1 :])[:, None]
    taps = torch.zeros(len(token_ids) - 1, 1, 4)
    return Passage(torch.tensor(token_ids), taps, first, drawn, torch.zeros(drawn.shape))


def test_head_starts_where_a_drafter_would() -> None:
    """From the row before the first drawn token on, of which that is the root, and no further than there is text."""
    lesson = make_lesson([passage([5, 6, 7, 8, 9], 1), passage([3, 4, 5], 0)], torch.arange(10), 1.0)
    assert lesson.rows.tolist() == [1, 2, 5]
    assert lesson.token(0).tolist() == [7, 8, 4]
    assert lesson.next_token(0).tolist() == [8, 9, 5]
    assert lesson.law(0)[0][:, 0].tolist() == [8, 9, 5]
    assert lesson.there(0).tolist() == [True, True, True]
    assert lesson.there(1).tolist() == [True, False, False]


class Knowing:
    """A head that is right at every depth below `until`."""

    def __init__(self, until: int) -> None:
        self.until = until

    def rollout(self, lesson, embedding, depth):  # type: ignore[no-untyped-def]
        for step in range(depth):
            wanted = lesson.next_token(step) if step < self.until else lesson.next_token(step) + 1
            yield torch.nn.functional.one_hot(wanted, 20).float()


@pytest.mark.parametrize(
    ("until", "alpha", "tau"), [(0, 0.0, 1.0), (1, 1.0, 12 / 6), (2, 1.0, 12 / 4), (9, 1.0, 12 / 3)]
)
def test_tau_counts_the_rounds_that_a_text_takes(until: int, alpha: float, tau: float) -> None:
    """Twelve tokens are to be predicted, by chains of three."""
    lesson = make_lesson([passage(list(range(3, 17)), 0)], torch.arange(20), 1.0)
    found = measure(Knowing(until), [lesson], torch.empty(0), torch.arange(20), 3)
    assert (found.alpha, found.tau, found.rows) == (alpha, pytest.approx(tau), 12)


def test_the_vocabulary_is_what_the_target_expects_most() -> None:
    texts = [passage([1, 50, 50, 50, 40], 0), passage([1, 40, 7], 0)]
    assert choose_tokens(texts, 4, 60).tolist() == [0, 7, 40, 50]
