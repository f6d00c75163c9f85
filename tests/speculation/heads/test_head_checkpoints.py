"""A head is refused, with the reason, unless it is whole and of this target."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError, ModelError
from engine.linear import PlainLinear
from engine.runner import ModelRunner
from speculation.heads.check import check
from speculation.heads.checkpoint import load
from speculation.heads.eagle import Eagle
from speculation.heads.layer_cache import LayerCache
from speculation.heads.new import target_of
from tests.speculation.heads.trained import KINDS, made, request, seen, told
from tests.tiny import Tensors, configure, rewrite

Change = Callable[[Path], object]


@pytest.fixture
def head(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the trained head of a kind."""

    def copy(kind: str) -> Path:
        return Path(shutil.copytree(folders[kind], tmp_path / "head"))

    return copy


def own(**fields: object) -> Change:
    """Changes what the head says of itself."""

    def change(folder: Path) -> None:
        section = json.loads((folder / "config.json").read_text())["slipstream"]
        configure(folder, slipstream=section | fields)

    return change


def tensors(change: Callable[[Tensors], object]) -> Change:
    return lambda folder: rewrite(folder, change)


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


BAD: dict[str, tuple[str, Change]] = {
    "eagle3, not hydra": ("hydra", lambda folder: None),
    "hidden_size is 64, but the model's 48": ("medusa", own(hidden_size=64)),
    "vocab_size is 98, but the model's 97": ("medusa", own(vocab_size=98)),
    "fingerprint 1234 is of another model": ("eagle3", own(fingerprint="1234")),
    "taps [4] must be layers of the model, which has 3": ("medusa", own(taps=[4])),
    "a hydra head reads one layer": ("hydra", own(taps=[1, 2])),
    "draft_vocab_size 98 must be from 1 to vocab_size": ("hydra", own(draft_vocab_size=98)),
    "slipstream: Expected `int` >= 1": ("hydra", own(depth=0)),
    "tensor heads.3.weight is missing": ("hydra", own(depth=4)),
    "tensor d2t has shape [80], not [79]": ("hydra", own(draft_vocab_size=79)),
    "tensor fc.weight has shape [48, 96], not [48, 144]": (
        "eagle3",
        tensors(lambda t: t.update({"fc.weight": torch.zeros(48, 96)})),
    ),
    "tensor norm.weight has numbers that are not finite": (
        "eagle3",
        tensors(lambda t: t["norm.weight"].fill_(torch.nan)),
    ),
    "no place for tensor heads.3.bias": ("medusa", tensors(lambda t: t.update({"heads.3.bias": torch.zeros(48)}))),
    "leads to no ascending tokens": ("medusa", tensors(lambda t: t["d2t"].fill_(90))),
    "t2d and d2t name different tokens": ("medusa", tensors(lambda t: t["t2d"].logical_not_())),
    "model.safetensors": ("hydra", cut),
    "trust them, with safetensors.torch.save_file": ("hydra", pickled),
    "architectures must name a head": ("eagle3", lambda folder: (folder / "config.json").write_text("{}")),
    "eagle_aux_hidden_state_layer_ids is 3": (
        "eagle3",
        lambda folder: (folder / "config.json").write_text(
            json.dumps(
                json.loads((folder / "config.json").read_text())["transformer_layer_config"]
                | {"architectures": ["LlamaForCausalLMEagle3"], "eagle_aux_hidden_state_layer_ids": 3}
            )
        ),
    ),
    "missing required field `vocab_size`": ("eagle3", lambda folder: configure(folder, transformer_layer_config={})),
}


@pytest.mark.parametrize("reason", BAD)
def test_what_does_not_fit_is_refused_by_name(target: ModelRunner, head: Callable[[str], Path], reason: str) -> None:
    kind, change = BAD[reason]
    folder = head("eagle3" if "not hydra" in reason else kind)
    change(folder)
    with pytest.raises(ModelError) as error:
        made(kind, target, folder)
    assert reason in error.value.message
    assert "\n" not in error.value.message


@pytest.mark.parametrize("kind", KINDS)
def test_the_version_is_that_of_the_weights(
    target: ModelRunner, folders: dict[str, Path], head: Callable[[str], Path], kind: str
) -> None:
    folder = head(kind)
    assert made(kind, target, folder).version == made(kind, target, folders[kind]).version
    rewrite(folder, lambda t: t["norm.weight"].mul_(1.01))
    assert made(kind, target, folder).version != made(kind, target, folders[kind]).version


def test_eagle_is_read_as_its_authors_publish_it(
    target: ModelRunner, folders: dict[str, Path], head: Callable[[str], Path]
) -> None:
    folder = head("eagle3")
    config = json.loads((folder / "config.json").read_text())
    published = config["transformer_layer_config"] | {
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": config["draft_vocab_size"],
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1, 2]},
    }
    (folder / "config.json").write_text(json.dumps(published))

    def rename(found: Tensors) -> None:
        for name in list(found):
            found[name.replace("layers.0.", "midlayer.")] = found.pop(name)

    rewrite(folder, rename)
    text, proposed = list(range(10, 30)), []
    for path in (folder, folders["eagle3"]):
        drafter, one = made("eagle3", target, path), request(0, text)
        told(drafter, one, seen(target, text, drafter.needs.taps), 0, len(text) - 1)
        proposed.append(drafter.propose([one], torch.tensor([8]).numpy(), 0.0).tokens.tolist())
    assert proposed[0] == proposed[1]


def test_a_head_shares_the_output_of_its_target(target: ModelRunner, folders: dict[str, Path]) -> None:
    """Medusa and Hydra keep none of their own; one that a checkpoint has is used."""
    shared = target.vocabulary()
    fits = target_of(target.config, shared)  # type: ignore[arg-type]
    checkpoint = load(folders["medusa"], fits)
    assert "lm_head.weight" not in checkpoint.tensors
    assert torch.equal(checkpoint.with_output(shared.output)["lm_head.weight"], shared.output[checkpoint.token_ids])
    assert "lm_head.weight" in load(folders["eagle3"], fits).tensors


@pytest.mark.parametrize("normed", [False, True])
def test_eagle_heeds_norm_before_residual(
    target: ModelRunner, folders: dict[str, Path], head: Callable[[str], Path], normed: bool
) -> None:
    """With it the size of a feature says nothing, as it goes nowhere but through the norm."""
    folder = head("eagle3")
    own(norm_before_residual=normed)(folder)
    checkpoint = load(folder, target_of(target.config, target.vocabulary()))  # type: ignore[arg-type]
    eagle = Eagle(checkpoint.config, {name: tensor.float() for name, tensor in checkpoint.tensors.items()}, PlainLinear)
    torch.manual_seed(0)
    embedded, feature = torch.randn(2, 1, 48)
    cache = LayerCache(1, 2, 8, embedded, native=False)

    def made_of(features: torch.Tensor) -> torch.Tensor:
        attention = cache.attention([np.array([0])], [1], np.array([0]))
        return eagle(embedded, features, torch.tensor([0]), attention)

    assert torch.allclose(made_of(feature), made_of(4 * feature), atol=1e-3) == normed


SEEN_LATER = ("eagle3, not hydra", "fingerprint 1234", "not finite", "no ascending", "different tokens")
"""By who has torch: what takes more than headers."""


@pytest.mark.parametrize("reason", [reason for reason in BAD if not any(part in reason for part in SEEN_LATER)])
def test_what_headers_tell_is_refused_before_anything_is_started(
    target: ModelRunner, head: Callable[[str], Path], reason: str
) -> None:
    kind, change = BAD[reason]
    folder = head(kind)
    assert target.folder is not None
    check(folder, target.folder, 1 << 30, "auto")
    with pytest.raises(ConfigError, match="raise --speculation-memory"):
        check(folder, target.folder, 1 << 10, "float32")
    change(folder)
    with pytest.raises(ModelError) as error:
        check(folder, target.folder, 1 << 30, "auto")
    assert reason in error.value.message


def test_headers_are_read_without_torch() -> None:
    code = "import sys, speculation.heads.check; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
