"""`slipstream serve` refuses a checkpoint that can't be run before it starts anything: one line, status 2."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import cluster.launcher
from cluster.cli import main
from tests.tiny import Tensors, configure, rewrite, save_tiny_llama

NORM = "model.layers.1.input_layernorm.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def refusal(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def started(*_arguments: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(cluster.launcher, "_ray", started)

    def refused(*flags: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["slipstream", "serve", str(folder), "--port", "0", *flags])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return refused


def test_a_ray_cluster_that_nobody_answers_for_is_said_at_once(refusal: Callable[..., str]) -> None:
    assert "--ray-address 127.0.0.1:1: nobody answers there" in refusal("--ray-address", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.update({NORM: torch.zeros(7)}), f"tensor {NORM} has shape [7], but config.json makes it [64]"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), "no place for tensor model.extra"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(
    folder: Path, change: Callable[[Tensors], object], named: str, refusal: Callable[..., str]
) -> None:
    rewrite(folder, change)
    assert named in refusal()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture MambaForCausalLM is not supported"),
        ({"architectures": ["Mine"], "auto_map": {}}, "code that comes with the checkpoint (auto_map)"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_a_configuration_that_cannot_be_run_is_named(
    folder: Path, settings: dict[str, Any], named: str, refusal: Callable[..., str]
) -> None:
    configure(folder, **settings)
    assert named in refusal()


def test_a_pickle_is_refused(folder: Path, refusal: Callable[..., str]) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickled weights" in refusal()


def test_heads_that_do_not_divide_are_named(refusal: Callable[..., str]) -> None:
    assert "num_attention_heads 4" in refusal("--tensor-parallel-size", "3")


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--speculation", "no_such_drafter"], "no drafter is called 'no_such_drafter'"),
        (["--speculation-budget", "3"], "budget has no meaning without a drafter"),
    ],
)
def test_speculation_that_cannot_be_had_is_named(flags: list[str], named: str, refusal: Callable[..., str]) -> None:
    assert named in refusal(*flags)


def test_a_profile_to_replan_by_that_is_not_there_is_named_before_anything_starts(refusal: Callable[..., str]) -> None:
    flags = ("--replan", "on", "--replan-slo", "ttft=900,tpot=40", "--replan-profile")
    assert "replan.profile: /there/is/none.json can't be read" in refusal(*flags, "/there/is/none.json")


def test_a_draft_model_that_can_not_draft_for_the_model_is_named(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, refusal: Callable[..., str]
) -> None:
    draft = tmp_path_factory.mktemp("draft")
    save_tiny_llama(draft)
    asked = ("--speculation", "draft_model", "--speculation-weights", f"draft_model={draft}")
    assert "weights draft_model: this drafter needs some" in refusal(*asked[:2])
    assert "raise --speculation-memory" in refusal(*asked, "--speculation-memory", "64KiB")
    configure(draft, vocab_size=64)
    assert "vocab_size is 64, and that of the model it is to draft for 128" in refusal(*asked)
    (draft / "model.safetensors").rename(draft / "pytorch_model.bin")
    configure(draft, vocab_size=128)
    assert "has pickled weights (.bin) only" in refusal(*asked)
