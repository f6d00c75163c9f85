"""The ends of a model can be shared: without a second copy where the runner has them as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine.runner import ModelRunner
from engine.vocabulary import Vocabulary


def vocabulary_of(folder: Path, **options: str) -> tuple[ModelRunner, Vocabulary]:
    runner = ModelRunner.load(folder, device="cpu", num_blocks=4, **{"dtype": "float32", **options})
    return runner, runner.vocabulary()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_are_those_of_the_files(
    make_checkpoint: Callable[..., Path], dtype: str, tied: bool
) -> None:
    folder = make_checkpoint(tie_word_embeddings=tied)
    _, shared = vocabulary_of(folder, dtype=dtype)
    stored = {
        name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(folder / "model.safetensors").items()
    }
    assert torch.equal(shared.embedding, stored["model.embed_tokens.weight"])
    assert torch.equal(shared.output, stored["model.embed_tokens.weight" if tied else "lm_head.weight"])
    assert torch.equal(shared.norm, stored["model.norm.weight"])
    assert (shared.output is shared.embedding) == tied


def test_the_embedding_is_the_runners_own(make_checkpoint: Callable[..., Path]) -> None:
    runner, shared = vocabulary_of(make_checkpoint())
    assert shared.embedding.data_ptr() == runner.vocabulary().embedding.data_ptr()


def test_gemma_scales_by_one_more(make_checkpoint: Callable[..., Path]) -> None:
    folder = make_checkpoint("Gemma2", sliding_window=16, query_pre_attn_scalar=8)
    _, shared = vocabulary_of(folder)
    assert torch.equal(shared.norm, load_file(folder / "model.safetensors")["model.norm.weight"] + 1)


def test_the_fingerprint_is_of_the_files_alone(make_checkpoint: Callable[..., Path]) -> None:
    _, one = vocabulary_of(make_checkpoint())
    _, rounded = vocabulary_of(make_checkpoint(), dtype="bfloat16")
    _, other = vocabulary_of(make_checkpoint(seed=2))
    assert one.fingerprint == rounded.fingerprint != other.fingerprint
