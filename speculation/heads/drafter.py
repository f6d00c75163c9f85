"""What drafters with a head have in common: how they are made, and what they propose of what the head says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import ClassVar, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError, ModelError
from engine.likeliest import likeliest
from engine.linear import dense_maker
from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.drafters.contexts import last_windows
from speculation.drafters.growth import Branches, FollowLevel, Level, grow_levels
from speculation.heads.checkpoint import Checkpoint, Target, load
from speculation.rounds import DraftRequest, Needs, Observed
from speculation.tree import DraftBatch

N = TypeVar("N")

TOP = 8
"""Continuations of a node that are considered."""
LEAST_LEVEL = 0.15
"""Tokens that a level must be expected to bring for another one to be computed: about what that costs of a step."""


class HeadDrafter(BaseDrafter):
    max_depth: int
    """Levels that it proposes at most."""
    only_latest: ClassVar[bool] = False
    """See Needs."""

    def __init__(self, surroundings: Surroundings, checkpoint: Checkpoint) -> None:
        super().__init__(surroundings)
        self.max_depth = checkpoint.config.depth
        self.version = checkpoint.version
        self.config = checkpoint.config
        self.needs = Needs(taps=tuple(sorted(set(self.config.taps))), only_latest=self.only_latest)
        assert surroundings.embedding is not None  # load_for has looked
        self.embedding = surroundings.embedding
        self._token_ids = checkpoint.token_ids.numpy()
        self._top = min(TOP, len(self._token_ids))
        self.weight_bytes = surroundings.dtype.itemsize * checkpoint.num_served
        if self.weight_bytes >= surroundings.max_memory_bytes:
            raise ConfigError(
                f"drafter {self.name}: its weights are {self.weight_bytes} bytes, and it may hold "
                f"{surroundings.max_memory_bytes}; raise --speculation-memory"
            )

    def network(self, make: Callable[..., N], checkpoint: Checkpoint) -> N:
        """Of the head's tensors, in the dtype and on the device of the target."""
        own = self.surroundings
        assert own.output is not None
        weights = checkpoint.with_output(own.output)
        tensors = {name: tensor.to(own.device, own.dtype) for name, tensor in weights.items()}
        return make(self.config, tensors, dense_maker(own.native), native=own.native)

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes

    def features(self, observed: Observed) -> torch.Tensor:
        """[rows, taps, hidden]"""
        return torch.stack([observed.taps[tap] for tap in self.config.taps], 1).to(self.surroundings.device)

    def embed(self, token_ids: NDArray[np.int64]) -> torch.Tensor:
        return torch.nn.functional.embedding(torch.from_numpy(token_ids).to(self.embedding.device), self.embedding)

    def ready(self, requests: Sequence[DraftRequest]) -> NDArray[np.bool_]:
        """[requests] of which enough has been seen for a head to go on from."""
        raise NotImplementedError

    def begin(self, requests: Sequence[DraftRequest], windows: NDArray[np.int64], depth: int) -> FollowLevel:
        """What follows in the trees of some requests, all `ready`, which the levels number as they come here; for
        `depth` levels at most. `windows` [requests, width] are the last tokens of each."""
        raise NotImplementedError

    @torch.inference_mode()
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        allowed = np.where(self.ready(requests), budgets, 0)
        depth = min(self.max_depth, int(allowed.max(initial=0)))
        some = np.flatnonzero(allowed)
        chosen = [requests[place] for place in some.tolist()]
        windows = last_windows(requests, self.max_depth)
        started = self.begin(chosen, windows[some], depth) if depth else None

        def follow(level: Level) -> Branches:
            assert started is not None  # without a budget nothing is asked
            return started(replace(level, requests=np.searchsorted(some, level.requests)))

        drafts = grow_levels(
            follow,
            windows,
            allowed,
            floor,
            branches=self.branches,
            law=self.law,
            drafter=self.name,
            depth=depth,
            least=LEAST_LEVEL,
        )
        self.end()
        return replace(drafts, version=self.version)

    def end(self) -> None:
        """The trees that were begun last are finished."""

    def likeliest(self, logits: torch.Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """[rows, TOP] tokens of the target's vocabulary and their probabilities."""
        ids, logprobs = likeliest(logits.float(), torch.arange(len(logits)), self._top)
        return self._token_ids[ids.cpu().numpy()], logprobs.exp().cpu().numpy()


def branches_of(tokens: NDArray[np.int64], chances: NDArray[np.float32]) -> Branches:
    """Of n windows, [n, top] each."""
    count, top = tokens.shape
    return Branches(np.arange(count).repeat(top), tokens.ravel(), chances.ravel())


def load_for(surroundings: Surroundings, kind: str) -> Checkpoint:
    """Raises ConfigError or ModelError, saying why not."""
    if surroundings.weights is None:
        raise ConfigError(
            f"drafter {kind} reads a head: give its folder by --speculation-weights {kind}=FOLDER, or train one by "
            "`slipstream drafts train`"
        )
    if surroundings.embedding is None:
        raise ModelError(f"drafter {kind}: this model's embedding can't be shared with a head; use another drafter")
    vocab_size, hidden_size = surroundings.embedding.shape
    target = Target(hidden_size, vocab_size, surroundings.num_layers, surroundings.fingerprint)
    return load(surroundings.weights, target, kind=kind)
