from __future__ import annotations

from pathlib import Path

import pytest
from world import World, save_tokenizer


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def world(folder: Path) -> World:
    return World(folder)
