"""The tiny random models of the engine's tests, and one with a head of each kind that was trained on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from engine.runner import ModelRunner
from speculation.heads.distil import Result
from tests.engine.conftest import make_checkpoint, one_thread, reference
from tests.speculation.drawn_texts import NUM_BLOCKS, VOCAB, Pair
from tests.speculation.heads.trained import KINDS, distilled, save_target

__all__ = ["make_checkpoint", "one_thread", "reference"]


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    folder = tmp_path_factory.mktemp("target")
    save_target(folder)
    return ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=400, block_size=4)


@pytest.fixture(scope="session")
def results(target: ModelRunner, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Result]]:
    """Folder and result of each kind."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    return {kind: (folder, distilled(kind, target, folder)) for kind, folder in folders.items()}


@pytest.fixture(scope="session")
def folders(results: dict[str, tuple[Path, Result]]) -> dict[str, Path]:
    return {kind: folder for kind, (folder, _) in results.items()}


@pytest.fixture(scope="session")
def pair(make_checkpoint: Callable[..., Path]) -> Pair:
    folder, draft = (make_checkpoint(vocab_size=VOCAB, seed=seed) for seed in (1, 2))
    target = ModelRunner.load(folder, dtype="float32", device="cpu", num_blocks=NUM_BLOCKS, block_size=8)
    return Pair(target, folder, draft)


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> ModelRunner:
    """The plain tiny model."""
    return ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=64, block_size=8)
