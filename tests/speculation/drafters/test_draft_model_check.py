"""Which folders may draft: what is wrong with one is said by name, before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch

from core.errors import ConfigError, ModelError
from speculation.drafters.draft_model_check import check
from speculation.settings import Settings
from tests.speculation.drafters.draft_models import made
from tests.tiny import configure, rewrite, save_byte_tokenizer, save_tiny_llama

MEMORY = 4 << 20


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


@pytest.fixture
def folder(target: Path, tmp_path: Path) -> Path:
    return copytree(target, tmp_path / "draft")


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def another_token(folder: Path) -> None:
    change_tokenizer(folder, lambda tokenizer: tokenizer["model"]["vocab"].update(A=99))


def added_token(folder: Path) -> None:
    added = {"content": "<tool>", "id": 300, "special": True}
    change_tokenizer(folder, lambda tokenizer: tokenizer["added_tokens"].append(added))


def without_vocabulary(folder: Path) -> None:
    change_tokenizer(folder, lambda tokenizer: tokenizer.pop("model"))


def change_tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    change(tokenizer)
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda folder: configure(folder, vocab_size=127),
            "vocab_size is 127, and that of the model it is to draft for",
        ),
        (pickled, "has pickled weights (.bin) only"),
        (cut, "model.safetensors is not a whole safetensors file"),
        (
            lambda folder: rewrite(folder, lambda tensors: tensors.pop("model.norm.weight")),
            "model.norm.weight is missing",
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors weights"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (another_token, "token 'A' is number 99, and number "),
        (added_token, "token '<tool>' is number 300, and not there in "),
        (without_vocabulary, "has no vocabulary of tokens"),
    ],
)
def test_what_is_wrong_with_a_folder_is_named(
    target: Path, folder: Path, spoil: Callable[[Path], object], message: str
) -> None:
    check(folder, target, MEMORY, "float32")
    spoil(folder)
    with pytest.raises(ModelError) as caught:
        check(folder, target, MEMORY, "float32")
    assert message in caught.value.message
    assert str(folder) in caught.value.message
    assert "\n" not in caught.value.message


def test_a_folder_without_a_tokenizer_is_taken_by_its_size(target: Path, folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    check(folder, target, MEMORY, "auto")


def test_too_little_memory_is_refused_with_what_it_takes(target: Path, folder: Path) -> None:
    for refuse in (
        lambda: check(folder, target, 100_000, "float32"),
        lambda: made(folder, vocab_size=128, max_memory_bytes=100_000),
    ):
        with pytest.raises(
            ConfigError, match=r"has 0\.1 MiB of memory, .* take 0\.[2-9] MiB; raise --speculation-memory"
        ):
            refuse()


def test_a_worker_refuses_another_vocabulary_too(folder: Path) -> None:
    with pytest.raises(ModelError, match="vocab_size is 128"):
        made(folder, vocab_size=97)


def test_a_worker_refuses_weights_that_are_no_numbers(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    rewrite(folder, lambda tensors: tensors.update({name: torch.full_like(tensors[name], torch.nan)}))
    with pytest.raises(ModelError, match=f"{folder}: its logits are no numbers"):
        made(folder, vocab_size=128)


def test_settings_have_it_checked(target: Path, folder: Path) -> None:
    configure(folder, vocab_size=127)
    chosen = Settings(drafters=("draft_model",), max_budget=4, max_memory_bytes=MEMORY, weights={"draft_model": folder})
    with pytest.raises(ModelError, match="vocab_size is 127"):
        chosen.check_weights(target, "auto")


def test_checking_needs_no_torch() -> None:
    code = "import sys, speculation.drafters.draft_model_check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
