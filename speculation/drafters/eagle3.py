"""EAGLE-3 (arXiv:2503.01840): one decoder layer over hidden states of the target, level by level down the tree.

What the target has computed is noted and goes through the layer, all requests together, when a proposal wants it. A
request keeps the layer's KV of its own rows; those of drafted tokens are given up with the tree, as what they were
computed from was only guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ConfigError, TransferError
from speculation.drafters.base import Surroundings
from speculation.drafters.growth import Branches, FollowLevel, Level
from speculation.heads.checkpoint import Checkpoint
from speculation.heads.drafter import HeadDrafter, branches_of, load_for
from speculation.heads.eagle import Eagle
from speculation.heads.layer_cache import LayerCache, Line, Slots
from speculation.packing import expect
from speculation.rounds import DraftRequest, Feedback, Observed
from speculation.tree import ROOT

MAX_DEPTH = 7
"""Levels of a tree: trained for fewer, the layer goes on from its own features well enough."""
MOST_NOTED, LAST_NOTED = 256, 64
"""Rows of a request that wait for a proposal, for its hidden states take more memory than what becomes of them; and how
many of them are left while none is asked for: they cost nothing then, and are enough to see whether it is of use again.
"""
IDLE, ASKED = 1024, 64
"""Rows of answers, less ASKED for each request that drafts were asked for, after which no proposal is expected: so a
try now and then does not bring every prompt through the layer."""


@dataclass(slots=True)
class _Known:
    """What is known of a request."""

    request: DraftRequest
    line: Line = field(default_factory=Line)
    following: int = 0
    """Index of the token after the last row that went through the layer."""
    feature: torch.Tensor | None = None
    """[hidden] what the layer made of that row."""
    noted: list[tuple[NDArray[np.int64], torch.Tensor]] = field(default_factory=list)
    """Indices and features, [rows] and [rows, taps, hidden], of rows that have not."""

    @property
    def num_noted(self) -> int:
        return sum(len(indices) for indices, _ in self.noted)

    def take(self, most: int) -> tuple[NDArray[np.int64], torch.Tensor] | None:
        """What is noted of rows whose next token has come, the last `most` of them; None if there are none. Rows of a
        prompt that nothing is drawn after stay noted."""
        if not self.noted:
            return None
        indices = np.concatenate([part for part, _ in self.noted])
        features = torch.cat([part for _, part in self.noted])
        ready = int(indices.searchsorted(len(self.request.token_ids) - 1))
        self.noted = [(indices[ready:], features[ready:])] if ready < len(indices) else []
        own = slice(max(0, ready - most), ready)
        return (indices[own], features[own]) if ready else None

    def skip(self) -> None:
        """All that is noted but the last rows."""
        indices = np.concatenate([part for part, _ in self.noted])
        features = torch.cat([part[-LAST_NOTED:] for _, part in self.noted])
        self.noted = [(indices[-LAST_NOTED:], features[-LAST_NOTED:].clone())]


class Eagle3(HeadDrafter):
    name: ClassVar[str] = "eagle3"

    def __init__(self, surroundings: Surroundings, checkpoint: Checkpoint) -> None:
        super().__init__(surroundings, checkpoint)
        self.max_depth = min(MAX_DEPTH, surroundings.max_budget)
        self._layer = self.network(Eagle, checkpoint)
        heads, size = self._layer.num_kv_heads, self._layer.head_size
        row_bytes = 2 * heads * size * surroundings.dtype.itemsize
        num_slots = (surroundings.max_memory_bytes - self.weight_bytes) // row_bytes
        self._spare = surroundings.max_budget * surroundings.max_requests
        if num_slots <= 2 * self._spare:
            raise ConfigError(
                f"drafter eagle3: {surroundings.max_memory_bytes} bytes have no room for the KV of "
                f"{surroundings.max_requests} trees and their texts; raise --speculation-memory"
            )
        self._cache = LayerCache(num_slots, heads, size, self.embedding, native=surroundings.native)
        self._slot_bytes, self._num_slots = row_bytes, num_slots
        self._known: dict[int, _Known] = {}
        self._lent: list[Slots] = []
        self._idle = 0  # rows, as IDLE has them, between 0 and twice that

    @property
    def memory_bytes(self) -> int:
        return self.weight_bytes + (self._num_slots - self._cache.num_free) * self._slot_bytes

    # --- what the target says --------------------------------------------------------------------------------------

    @torch.inference_mode()
    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        features = self.features(observed)
        for request, start, end in zip(requests, observed.offsets, observed.offsets[1:], strict=False):
            known = self._known.setdefault(request.key, _Known(request))
            indices = observed.indices[start:end]
            seen = known.noted[-1][0][-1] if known.noted else known.following - 1
            new = start + int(np.searchsorted(indices, seen + 1))  # a sequence that was preempted is computed again
            if new < end:
                known.noted.append((observed.indices[new:end], features[new:end]))
                if observed.indices[end - 1] >= request.num_prompt_tokens:
                    self._idle = min(self._idle + end - new, 2 * IDLE)
        full = [known for request in requests if (known := self._known[request.key]).num_noted > MOST_NOTED]
        if self._idle > IDLE:
            for known in full:
                known.skip()
        elif full:
            self._catch_up(full)

    def observe(self, feedback: Feedback) -> None:
        self.absorb(feedback.requests, feedback.observed)

    def finish(self, key: int) -> None:
        if (known := self._known.pop(key, None)) is not None:
            self._cache.give_back(known.line.slots)

    def ready(self, requests: Sequence[DraftRequest]) -> NDArray[np.bool_]:
        return np.array([self._reaches_root(request) for request in requests], np.bool_)

    def _reaches_root(self, request: DraftRequest) -> bool:
        known, last = self._known.get(request.key), len(request.token_ids) - 2
        if known is None:
            return False
        return known.noted[-1][0][-1] == last if known.noted else known.following - 1 == last and last >= 0

    def _catch_up(self, some: Sequence[_Known]) -> None:
        """Brings what is noted of these requests through the layer."""
        most = (self._num_slots - self._spare) // max(1, len(some))
        taken = [(known, *found) for known in some if (found := known.take(most)) is not None]
        if not taken:
            return
        behind, indices, features = zip(*taken, strict=True)
        counts = [len(part) for part in indices]
        self._make_room(sum(counts))
        for known, count in zip(behind, counts, strict=True):
            known.line.extend(self._cache.take(count))
        tokens = np.array(
            [known.request.token_ids[index + 1] for known, own in zip(behind, indices, strict=True) for index in own]
        )
        positions = np.concatenate(indices)
        attention = self._cache.attention([known.line.slots for known in behind], counts, positions)
        fused = self._layer.fuse(torch.cat(features).flatten(1))
        made = self._layer(self.embed(tokens), fused, self._positions(positions), attention)
        for known, own, end in zip(behind, indices, np.cumsum(counts).tolist(), strict=True):
            known.feature, known.following = made[end - 1].clone(), int(own[-1]) + 1

    def _make_room(self, count: int) -> None:
        """For so many more rows. Where slots run out all requests lose the rows that they have: their drafts are poorer
        then until enough new ones have come."""
        if self._cache.num_free - self._spare < count:
            for known in self._known.values():
                self._cache.give_back(known.line.slots)
                known.line = Line()

    def _positions(self, positions: NDArray[np.int64]) -> torch.Tensor:
        return torch.from_numpy(positions).to(self.embedding.device)

    # --- trees -----------------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[DraftRequest], windows: NDArray[np.int64], depth: int) -> FollowLevel:  # noqa: ARG002
        self._idle = max(0, self._idle - ASKED * len(requests))
        known = [self._known[request.key] for request in requests]
        self._catch_up(known)
        texts = [one.line.slots for one in known]
        roots = np.array([one.following for one in known], np.int64)
        features = torch.stack([one.feature for one in known if one.feature is not None])
        paths = np.empty((len(known), 0), np.int64)

        def follow(level: Level) -> Branches:
            nonlocal features, paths
            if level.nodes[0] != ROOT:
                own = self._cache.take(len(level.nodes))
                self._lent.append(own)
                paths = np.concatenate([paths[level.above], own[:, None]], axis=1)
                lines = [np.concatenate([texts[r], path]) for r, path in zip(level.requests, paths, strict=True)]
                positions = roots[level.requests] + paths.shape[1] - 1
                attention = self._cache.attention(lines, [1] * len(lines), positions)
                above = features[torch.from_numpy(level.above)]
                features = self._layer(self.embed(level.windows[:, -1]), above, self._positions(positions), attention)
            return branches_of(*self.likeliest(self._layer.logits(features)))

        return follow

    def end(self) -> None:
        for slots in self._lent:
            self._cache.give_back(slots)
        self._lent.clear()

    # --- elsewhere -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def pack(self, key: int) -> dict[str, torch.Tensor]:
        known = self._known.get(key)
        if known is None:
            return {}
        self._catch_up([known])
        if known.feature is None:
            return {}
        return {
            "following": torch.tensor([known.following]),
            "feature": known.feature,
            "kv": self._cache.read(known.line.slots),
        }

    @torch.inference_mode()
    def unpack(self, request: DraftRequest, state: dict[str, torch.Tensor]) -> None:
        dtype, layer = self.surroundings.dtype, self._layer
        following = int(expect(state, "following", torch.int64, 1))
        feature = expect(state, "feature", dtype, self.config.hidden_size)
        kv = expect(state, "kv", dtype, None, 2, layer.num_kv_heads, layer.head_size)
        if not len(kv) <= following < len(request.token_ids):
            raise TransferError(f"the draft state is of {following} tokens and {len(kv)} rows, which this text has not")
        self.finish(request.key)
        known = self._known[request.key] = _Known(
            request, following=following, feature=feature.to(self.embedding.device)
        )
        if len(kv) and self._cache.num_free - self._spare >= len(kv):
            known.line.extend(self._cache.take(len(kv)))
            self._cache.write(known.line.slots, kv.to(self.embedding.device))


def build(surroundings: Surroundings) -> Eagle3:
    return Eagle3(surroundings, load_for(surroundings, Eagle3.name))
