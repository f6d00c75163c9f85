"""A small language model that drafts for a large one with the same vocabulary (arXiv:2211.17192, arXiv:2302.01318).

It has a KV cache of its own, which follows the requests that it drafts for: what was emitted without it, or before it,
is computed in chunks before it proposes again. All requests of a step are drafted for together, a level of their trees
at a time.

What it proposes depends on the rule. Where tokens are compared with those that the target's sampler draws, nothing is
gained by drawing: it proposes what is likeliest. For a request with a temperature that is the token that its own law
gives under the very clocks by which the target will draw: where the two laws agree they draw alike, however flat the
laws are (a maximal coupling, nearly: see engine/sampler.py). For the rules that compare laws see draft_model_draws.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import ModelError
from engine.kv_cache import DTYPES
from engine.runner import ModelRunner
from engine.sampler import GREEDY_TEMPERATURE, num_uniforms, race, uniforms
from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.drafters.contexts import PAD
from speculation.drafters.draft_model_check import BLOCK_SIZE, Room, check_config, room_for
from speculation.drafters.draft_model_draws import Drawn, Shape
from speculation.drafters.draft_model_kv import DraftCache
from speculation.drafters.draft_model_steps import Levels, Nodes, catch_up
from speculation.drafters.growth import Branches, Level, grow_levels
from speculation.drafters.prefixes import LONGEST
from speculation.laws import SAMPLED
from speculation.rounds import DraftRequest
from speculation.tree import DraftBatch, offsets_of

CATCH_UP_TOKENS = 256
"""Computed in a step for all who lack some: a long prompt is caught up with over several."""
WIDTH = 8
"""Children of a node that are looked at."""
AGREEING = 0.7
"""How often the target draws what the draft model does by the same clocks, beyond what is likely anyway."""
LEAST_LEVEL = 0.1
"""A level that is expected to bring fewer tokens is not worth a step of the model."""


class DraftModel(BaseDrafter):
    name: ClassVar[str] = "draft_model"

    def __init__(self, surroundings: Surroundings, runner: ModelRunner, room: Room) -> None:
        super().__init__(surroundings)
        self.version = runner.layout.fingerprint[:8]
        self._runner = runner
        self._cache = DraftCache(room.num_blocks, BLOCK_SIZE)
        self._weight_bytes = room.weight_bytes
        self._longest = runner.config.max_position_embeddings
        self._shape = Shape(min(self.max_budget, 8 * LONGEST), branches=self.branches)

    @property
    def memory_bytes(self) -> int:
        return self._weight_bytes + self._runner.pool.data.nbytes

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        lengths = np.array([len(request.token_ids) for request in requests], np.int64)
        budgets = np.clip(budgets, 0, np.minimum(self._longest - lengths, self.max_budget).clip(0))
        busy = {request.key for request in requests}
        helds = [
            self._cache.hold(request, budget, busy) if budget else None
            for request, budget in zip(requests, budgets.tolist(), strict=True)
        ]
        ready, logits = catch_up(self._runner, self._cache, helds, CATCH_UP_TOKENS)
        if logits is None:
            logits = torch.empty((0, self.surroundings.vocab_size))
        some = np.flatnonzero(ready)
        levels = Levels(self._runner, BLOCK_SIZE, [held for held, up in zip(helds, ready, strict=True) if up and held])
        propose = self._drawn if self.law in SAMPLED else self._likeliest
        drafts = propose([requests[place] for place in some.tolist()], budgets[some], floor, levels, logits)
        counts = np.zeros(len(requests), np.int64)
        counts[some] = drafts.lengths
        return replace(drafts, offsets=offsets_of(counts), version=self.version)

    def warm_up(self) -> None:
        """Drafts for somebody who is not there, so that nobody waits for what is made on first use. Raises ModelError
        if the model has nothing to say, as one with spoilt weights."""
        nobody = DraftRequest(-1, [0] * BLOCK_SIZE, 1, 0, 0.0, remember=False)
        held = self._cache.hold(nobody, 1, {nobody.key})
        _, logits = catch_up(self._runner, self._cache, [held], CATCH_UP_TOKENS)
        self.finish(nobody.key)
        if logits is None or bool(logits.isnan().any()):
            raise ModelError(f"{self.surroundings.weights}: its logits are no numbers: fetch the draft model again")
        for temperature in (0.0, 1.0):
            nobody = DraftRequest(-1, [0] * BLOCK_SIZE, 1, 0, temperature, remember=False)
            self.propose([nobody], np.full(1, min(self.max_budget, WIDTH)), 0.0)
            self.finish(nobody.key)

    def finish(self, key: int) -> None:
        self._cache.drop(key)

    def _drawn(
        self,
        requests: Sequence[DraftRequest],
        budgets: NDArray[np.int64],
        floor: float,
        levels: Levels,
        logits: torch.Tensor,
    ) -> DraftBatch:
        trees = Drawn(requests, budgets, floor, self._shape, self.law)
        trees.draw(logits, levels.logits)
        return trees.drafts(self.name)

    def _likeliest(
        self,
        requests: Sequence[DraftRequest],
        budgets: NDArray[np.int64],
        floor: float,
        levels: Levels,
        logits: torch.Tensor,
    ) -> DraftBatch:
        clocks = _Clocks(requests)
        width = min(WIDTH, int(budgets.max(initial=1)), logits.shape[1]) if self.branches else 1
        depth = -1

        def follow(level: Level) -> Branches:
            nonlocal depth
            depth += 1
            rows = levels.logits(Nodes(level.requests, level.windows[:, -depth:])) if depth else logits
            return _branches(rows, clocks, level.requests, depth, width)

        return grow_levels(
            follow,
            np.full((len(requests), LONGEST), PAD, np.int64),
            budgets,
            floor,
            branches=self.branches,
            law=self.law,
            drafter=self.name,
            depth=LONGEST,
            least=LEAST_LEVEL,
        )


class _Clocks:
    """By which the target will draw for requests, as engine.sampler has them."""

    def __init__(self, requests: Sequence[DraftRequest]) -> None:
        temperatures = np.array([request.temperature for request in requests])
        self.warm = temperatures >= GREEDY_TEMPERATURE
        self.temperatures = np.where(self.warm, temperatures, 1.0).astype(np.float32)
        self._seeds = [request.seed for request in requests]
        self._positions = np.array([request.position for request in requests], np.int64)

    def draw(self, laws: torch.Tensor, requests: NDArray[np.int64], depth: int) -> torch.Tensor:
        """[n] what comes of laws [n, vocab], so many tokens below the root."""
        seeds = [self._seeds[request] for request in requests]
        u = uniforms(seeds, (self._positions[requests] + depth).tolist(), num_uniforms(laws.shape[1]))
        return race(laws, torch.from_numpy(-np.log1p(-u)).to(laws.device))


def _branches(logits: torch.Tensor, clocks: _Clocks, requests: NDArray[np.int64], depth: int, width: int) -> Branches:
    """The `width` likeliest tokens after each row, and what those with a temperature will draw if the laws agree."""
    warm = clocks.warm[requests]
    if warm.any():
        logits = logits / torch.from_numpy(clocks.temperatures[requests])[:, None].to(logits.device)
    values, ids = logits.topk(width)
    chances = (values - logits.logsumexp(-1, keepdim=True)).exp()
    if warm.any():
        some = torch.from_numpy(warm).to(logits.device)
        laws = logits[some].softmax(-1)
        drawn = clocks.draw(laws, requests[warm], depth)
        ids[some], chances[some] = _with_drawn(ids[some], drawn, laws)
    windows = np.arange(len(requests)).repeat(width)
    return Branches(windows, ids.cpu().numpy().reshape(-1), chances.cpu().numpy().reshape(-1))


def _with_drawn(ids: torch.Tensor, drawn: torch.Tensor, laws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Among ids [n, width] the drawn ones [n], in place of the last where they are not, and the chances of all: with
    probability AGREEING the target draws the same, and otherwise it draws on its own."""
    drawn = drawn.where(drawn >= 0, ids[:, 0])[:, None]  # from a law of no numbers nothing was
    last = torch.arange(ids.shape[1], device=ids.device) == ids.shape[1] - 1
    ids = ids.where((ids == drawn).any(-1, keepdim=True) | ~last, drawn)
    return ids, (1 - AGREEING) * laws.gather(1, ids) + AGREEING * (ids == drawn)


def build(surroundings: Surroundings) -> DraftModel:
    """Raises ModelError for a checkpoint that can't be run or has another vocabulary, ConfigError for one that the
    memory is too small for."""
    folder = surroundings.weights
    if folder is None:
        raise ModelError("drafter draft_model has no weights: name the folder of a model by --speculation-weights")
    dtype = next(name for name, dtype in DTYPES.items() if dtype == surroundings.dtype)
    config = check_config(folder, surroundings.vocab_size)
    room = room_for(folder, config, dtype, surroundings.max_memory_bytes, surroundings.max_requests)
    runner = ModelRunner.load(
        folder,
        dtype=dtype,
        device=str(surroundings.device),
        block_size=BLOCK_SIZE,
        num_blocks=room.num_blocks,
        enforce_eager=surroundings.device.type == "cpu" and not surroundings.native,
    )
    runner.pool.close()  # nobody else maps it, and so its memory goes when the drafter does
    runner.warm_up()
    drafter = DraftModel(surroundings, runner, room)
    drafter.warm_up()
    return drafter
