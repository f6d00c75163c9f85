"""What heads have seen of a prompt travels with its KV, as it does for others (see test_draft_state.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.runner import ModelRunner
from speculation.make import make_observer, make_speculator
from speculation.settings import Settings
from tests.speculation.heads.trained import KINDS, MEMORY
from tests.speculation.test_draft_state import BLOCK_SIZE, BLOCKS, colocated, handed_over


@pytest.fixture(scope="module")
def runners(target: ModelRunner) -> list[ModelRunner]:
    assert target.folder is not None
    return [
        ModelRunner.load(target.folder, dtype="float32", device="cpu", num_blocks=BLOCKS, block_size=BLOCK_SIZE)
        for _ in range(2)
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_drafts_after_a_hand_off_are_those_of_a_worker_that_did_it_all(
    runners: list[ModelRunner], folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Round by round: the same tokens drafted, and as many accepted. Without what was handed over they are others."""
    chosen = Settings(
        drafters=(kind,), max_budget=8, max_memory_bytes=MEMORY, controller="fixed", weights={kind: folders[kind]}
    )
    together = colocated(runners[0], make_speculator(chosen, runners[0], 4), monkeypatch)
    observer = make_observer(chosen, runners[0], 4)
    assert observer is not None
    apart = handed_over(runners, observer, make_speculator(chosen, runners[1], 4), monkeypatch)
    assert apart == together
    assert sum(accepted for _, rounds in apart[0] for _, accepted in rounds) > 0
    bare = handed_over(runners, None, make_speculator(chosen, runners[1], 4), monkeypatch)
    assert [output for output, _ in bare[0]] == [output for output, _ in together[0]]
    assert bare[1] != together[1]
