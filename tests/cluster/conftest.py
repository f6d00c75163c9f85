from __future__ import annotations

from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from tests.tiny import save_tiny_llama


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Path]:
    """(reference model, its folder)"""
    folder = tmp_path_factory.mktemp("tiny-llama")
    return save_tiny_llama(folder), folder
