"""Heads on disk: a folder with config.json and safetensors, checked against the target that it is to draft for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from core.errors import ModelError
from engine.checkpoints.folder import read_config, shards
from engine.models.tensors import HEAD
from speculation.heads.check import AGAIN, check_fits, check_stored
from speculation.heads.config import CONFIG, HeadConfig, as_json, read_head_config
from speculation.heads.tensors import IN_TARGET, TO_TARGET, named

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, slots=True)
class Target:
    """What a head has to fit."""

    hidden_size: int
    vocab_size: int
    num_layers: int
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    config: HeadConfig
    tensors: dict[str, torch.Tensor]
    """By which it was trained; `lm_head.weight` only if it has one of its own."""
    token_ids: torch.Tensor
    """[draft vocabulary] int64, ascending: which of the target's tokens each of its own is."""
    version: str
    """A digest of the weights."""

    @property
    def num_parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.tensors.values())

    @property
    def num_served(self) -> int:
        """Numbers of all tensors that it drafts by."""
        shared = 0 if HEAD in self.tensors else self.config.draft_vocab_size * self.config.hidden_size
        return self.num_parameters + shared

    def with_output(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors, and in place of an output layer of its own the rows of the target's, [vocab, hidden]."""
        return self.tensors if HEAD in self.tensors else {**self.tensors, HEAD: output[self.token_ids]}


def save(
    folder: Path,
    config: HeadConfig,
    tensors: Mapping[str, torch.Tensor],
    token_ids: torch.Tensor,
    layer: Mapping[str, Any] | None = None,
) -> None:
    """Into a folder that is there. `layer`: EAGLE-3's, as in its config.json."""
    known = torch.zeros(config.vocab_size, dtype=torch.bool)
    known[token_ids] = True
    stored = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    stored |= {TO_TARGET: token_ids - torch.arange(len(token_ids)), IN_TARGET: known}
    (folder / CONFIG).write_text(json.dumps(as_json(config, layer), indent=2) + "\n", encoding="utf-8")
    save_file(stored, folder / WEIGHTS, {"format": "pt"})


def load(folder: Path, target: Target, *, kind: str | None = None) -> Checkpoint:
    """Of the head in `folder`, on the CPU as it is stored. Raises ModelError, saying what is wrong with it: no head of
    this kind, another target's, tensors that are missing, corrupt or of other shapes, pickled weights."""
    config = read_head_config(folder, target.num_layers)
    if kind is not None and config.kind != kind:
        raise ModelError(
            f"{folder} holds a head of the kind {config.kind}, not {kind}; use it as drafter {config.kind}"
        )
    check_fits(config, folder, target.hidden_size, target.vocab_size)
    if config.fingerprint not in ("", target.fingerprint):
        raise ModelError(f"{folder}: fingerprint {config.fingerprint} is of another model than this one; {AGAIN}")
    check_stored(config, folder)
    tensors, version = _read(folder)
    tensors.pop("embed_tokens.weight", None)  # the target's own are used
    token_ids = _token_ids(tensors, config, folder)
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"{folder}: tensor {name} has numbers that are not finite; {AGAIN}")
    return Checkpoint(config, tensors, token_ids, version)


def layer_of(folder: Path) -> dict[str, Any]:
    """EAGLE-3's layer as the config.json of a head that was loaded says it; empty for other kinds."""
    found = read_config(folder / CONFIG)
    layer = found.get("transformer_layer_config", {} if "slipstream" in found else found)
    return dict(layer)


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    tensors: dict[str, torch.Tensor] = {}
    digest = blake2b(digest_size=6)
    for path in shards(folder):
        tensors |= {named(name): tensor for name, tensor in load_file(path).items()}
        digest.update(path.read_bytes())
    return tensors, digest.hexdigest()


def _token_ids(tensors: dict[str, torch.Tensor], config: HeadConfig, folder: Path) -> torch.Tensor:
    """Takes d2t and t2d out of the tensors."""
    offsets, known = tensors.pop(TO_TARGET, None), tensors.pop(IN_TARGET, None)
    ids = torch.arange(config.draft_vocab_size)
    if offsets is not None:
        ids += offsets
    if (ids < 0).any() or (ids >= config.vocab_size).any() or (ids.diff() <= 0).any():
        raise ModelError(
            f"{folder}: tensor {TO_TARGET} leads to no ascending tokens of a vocabulary of {config.vocab_size}; {AGAIN}"
        )
    if known is not None and not torch.equal(known.nonzero()[:, 0], ids):
        raise ModelError(f"{folder}: tensors {IN_TARGET} and {TO_TARGET} name different tokens; {AGAIN}")
    return ids
