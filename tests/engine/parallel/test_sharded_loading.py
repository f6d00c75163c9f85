"""A rank reads its share of the weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from core.errors import ModelError
from engine.model_config import ModelConfig
from engine.parallel.group import Group
from engine.parallel.split import Split
from engine.plan import make_plan
from engine.runner import ModelRunner
from tests.engine.driver import TINY

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4, "vocab_size": 512}
SPLITS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)][1:]


class Reads:
    """Stands in for safetensors' handle and counts the bytes that go through it."""

    total = 0

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handle, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.counted(self._handle.get_tensor(name))

    def get_slice(self, name: str) -> Any:
        return Slices(self._handle.get_slice(name))

    @staticmethod
    def counted(tensor: torch.Tensor) -> torch.Tensor:
        Reads.total += tensor.nbytes
        return tensor


class Slices:
    def __init__(self, entry: Any) -> None:
        self._entry = entry

    def __getattr__(self, name: str) -> Any:
        return getattr(self._entry, name)

    def __getitem__(self, key: Any) -> torch.Tensor:
        return Reads.counted(self._entry[key])


class Handle:
    def __init__(self, path: Path, framework: str) -> None:
        self._file = safe_open(path, framework=framework)

    def __enter__(self) -> Reads:
        return Reads(self._file.__enter__())

    def __exit__(self, *error: object) -> None:
        self._file.__exit__(*error)


def build(folder: Path, split: Split) -> ModelRunner:
    """A rank that knows no other: loading needs none."""
    config = ModelConfig.from_folder(folder)
    plan = make_plan(folder, config, dtype="float32", device="cpu", num_blocks=1)
    return ModelRunner.build(plan, config, group=Group(split))


@pytest.mark.parametrize(("tp_size", "pp_size"), SPLITS)
@pytest.mark.parametrize("changes", [{"tie_word_embeddings": True}, {"architecture": "Phi3", "pad_token_id": None}])
def test_no_rank_reads_more_than_its_share_and_one_tensor(
    tp_size: int, pp_size: int, changes: dict[str, Any], make_checkpoint: Callable[..., Path], monkeypatch: Any
) -> None:
    folder = make_checkpoint(**SHAPE, **changes)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        sizes = [file.get_tensor(name).nbytes for name in file.keys()]  # noqa: SIM118 - not a mapping
    monkeypatch.setattr("engine.weights.safe_open", Handle)
    read = []
    for split in Split(tp_size, pp_size).all():
        Reads.total = 0
        build(folder, split)
        read.append(Reads.total)

    assert max(read) <= sum(sizes) / (tp_size * pp_size) + max(sizes)
    assert sum(read) >= sum(sizes)


def test_a_rank_that_others_share_no_head_with_reads_its_exact_part(
    make_checkpoint: Callable[..., Path], monkeypatch: Any
) -> None:
    folder = make_checkpoint(**SHAPE)
    monkeypatch.setattr("engine.weights.safe_open", Handle)
    Reads.total = 0
    build(folder, Split(tp_size=4, tp_rank=1))
    hidden, inner, head = TINY["hidden_size"], TINY["intermediate_size"], TINY["head_dim"]
    layer = hidden * (2 * 8 + 2 * 4) * head + 3 * hidden * inner
    assert Reads.total == 4 * ((4 * layer + 2 * 512 * hidden) // 4 + (2 * 4 + 1) * hidden)


def test_a_tensor_of_the_wrong_shape_is_named_with_the_whole_shape(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_checkpoint(**SHAPE)
    config = (folder / "config.json").read_text()
    broken = tmp_path / "model"
    broken.mkdir()
    (broken / "model.safetensors").symlink_to(folder / "model.safetensors")
    (broken / "config.json").write_text(config.replace('"num_key_value_heads": 4', '"num_key_value_heads": 2'))
    with pytest.raises(ModelError, match=r"k_proj.* has shape \[32, 48\], but config.json makes it \[16, 48\]"):
        build(broken, Split(tp_size=2))


def test_a_stage_finds_a_tensor_too_many_among_its_layers_only(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = make_checkpoint(**SHAPE)
    odd = tmp_path / "model"
    odd.mkdir()
    tensors = load_file(folder / "model.safetensors") | {"model.layers.3.odd.weight": torch.zeros(2)}
    save_file(tensors, odd / "model.safetensors")
    (odd / "config.json").write_text((folder / "config.json").read_text())
    build(odd, Split(pp_size=2, pp_rank=0))
    with pytest.raises(ModelError, match=r"model\.layers\.3\.odd\.weight"):
        build(odd, Split(pp_size=2, pp_rank=1))
