"""A head is refused, with the reason, unless it is whole and of this target."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from core.errors import ModelError
from engine.runner import ModelRunner
from speculation.heads.checkpoint import load
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
    "pickled": ("hydra", pickled),
    "architectures must name a head": ("eagle3", lambda folder: (folder / "config.json").write_text("{}")),
    "norm_before_residual is not supported": (
        "eagle3",
        lambda folder: (folder / "config.json").write_text(
            '{"architectures": ["Eagle3Speculator"], "norm_before_residual": true}'
        ),
    ),
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
