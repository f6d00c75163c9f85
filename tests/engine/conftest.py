"""Tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.runner import ModelRunner
from tests.engine.driver import BLOCK_SIZE, TINY, Driver


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny products are slower on several threads, far slower where cores are shared."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Saves a random model of the TINY shape, with changes, and returns its folder, one for the same changes."""
    made: dict[str, Path] = {}

    def make(architecture: str = "Llama", seed: int = 1, **changes: Any) -> Path:
        import transformers

        key = f"{architecture} {seed} {sorted(changes.items())}"
        if key not in made:
            name = architecture if architecture.endswith("Model") else f"{architecture}ForCausalLM"
            family = getattr(transformers, name)
            config = family.config_class(**(TINY | changes))
            torch.manual_seed(seed)
            model = family(config)
            for parameter in model.parameters():  # biases and norms would be 0 and 1
                torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.3)
            made[key] = tmp_path_factory.mktemp("checkpoint")
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="session")
def reference() -> Callable[[Path, Sequence[int]], torch.Tensor]:
    """Logits of every position by Transformers in float32."""
    models: dict[Path, Any] = {}

    def logits(folder: Path, token_ids: Sequence[int]) -> torch.Tensor:
        from transformers import AutoModelForCausalLM

        if folder not in models:
            models[folder] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            return models[folder](torch.tensor([token_ids])).logits[0]

    return logits


@pytest.fixture
def load_driver() -> Callable[..., Driver]:
    def load(folder: Path, **options: Any) -> Driver:
        options = {"dtype": "float32", "device": "cpu", "num_blocks": 400, "block_size": BLOCK_SIZE} | options
        return Driver(ModelRunner.load(folder, **options))

    return load


@pytest.fixture
def driver(make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]) -> Driver:
    """Over the plain tiny model."""
    return load_driver(make_checkpoint())
