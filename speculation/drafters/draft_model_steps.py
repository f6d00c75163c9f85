"""Steps of a draft model: bringing its KV up to date, and the laws after the nodes of a level of token trees.

A level is computed in one step for all requests. What is already there as a chain behind a request's tokens is not
computed again; the other nodes above the level are, as the rows of a tree, since a row sees of its step only what is
above it but all of what was there before. So a chain costs a row per level, and a tree some rows more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import InternalError
from engine.batching import block_array, build_batch
from engine.runner import ModelRunner
from engine.schedule import Chunk, Schedule
from engine.step import StepBatch
from speculation.drafters.contexts import PAD
from speculation.drafters.draft_model_kv import DraftCache, Held
from speculation.drafters.prefixes import prefixes
from speculation.tree import ROOT, offsets_of


def catch_up(
    runner: ModelRunner, cache: DraftCache, helds: Sequence[Held | None], most: int
) -> tuple[NDArray[np.bool_], torch.Tensor | None]:
    """Computes `most` of the tokens that are missing, or one for each. Who has all of its tokens then [helds], and the
    logits after the last of them [these, vocab], None if there are none."""
    missing = np.array([0 if held is None else held.num_missing for held in helds], np.int64)
    counts = _shares(missing, max(most, len(helds)))
    ready = (counts == missing) & (missing > 0)
    schedule = Schedule(cache.block_size)
    for held, count, last in zip(helds, counts.tolist(), ready.tolist(), strict=True):
        if held is not None and count:
            schedule.chunks.append(Chunk(held.sequence, held.sequence.num_computed_tokens, count, samples=last))
            schedule.num_tokens += count
    if not schedule.chunks:
        return ready, None
    output = runner.submit(build_batch(schedule, return_logits=bool(ready.any()))).result()
    for held, count in zip(helds, counts.tolist(), strict=True):
        if held is not None and count:
            cache.computed(held, count)
    return ready, output.logits


def _shares(missing: NDArray[np.int64], most: int) -> NDArray[np.int64]:
    """Who lacks least goes first."""
    order = np.argsort(missing, kind="stable")
    before = np.cumsum(missing[order]) - missing[order]
    shares = np.empty_like(missing)
    shares[order] = np.minimum(missing[order], np.maximum(most - before, 0))
    return shares


@dataclass(frozen=True, slots=True)
class Nodes:
    """Of a level: those of a request one after the other, the likeliest first."""

    requests: NDArray[np.int64]  # [n] ascending
    paths: NDArray[np.int64]  # [n, depth] the tokens from below the root down to each


class Levels:
    """The levels below the roots of requests that have caught up."""

    def __init__(self, runner: ModelRunner, block_size: int, helds: Sequence[Held]) -> None:
        self._runner = runner
        self._block_size = block_size
        self._helds = helds
        self._lengths = np.array([len(held.sequence.token_ids) for held in helds], np.int64)
        arrays = [block_array(held.sequence) for held in helds]
        self._tables = np.zeros((len(helds), max((len(array) for array in arrays), default=0)), np.int64)
        for table, array in zip(self._tables, arrays, strict=True):
            table[: len(array)] = array
        self._guesses = np.full((len(helds), 0), PAD, np.int64)
        """[requests, depth so far] the tokens whose KV is behind that of the request's own."""

    def logits(self, nodes: Nodes) -> torch.Tensor:
        """[n, vocab] after each node, which are a level deeper than those before."""
        batch = self._batch(nodes)
        logits = self._runner.submit(batch).result().logits
        if logits is None:
            raise InternalError("the draft model's step gave no logits")
        return logits

    def _batch(self, nodes: Nodes) -> StepBatch:
        depth = nodes.paths.shape[1]
        starts = np.flatnonzero(np.diff(nodes.requests, prepend=-1))
        requests = nodes.requests[starts]
        group = np.repeat(np.arange(len(starts)), np.diff(starts, append=len(nodes.requests)))
        there = self._there(nodes, starts)
        new = np.where(np.arange(depth) < there[group][:, None], PAD, nodes.paths)
        tree = prefixes(group, new)
        of_group = group[tree.first // depth]
        bounds = offsets_of(np.bincount(of_group, minlength=len(starts)))
        rows = np.arange(len(tree.first)) - bounds[of_group]
        contexts = self._lengths[requests] + there
        parents = np.where(tree.parents == ROOT, -1, tree.parents - bounds[of_group])
        self._keep(nodes, requests, starts)
        return StepBatch(
            token_ids=nodes.paths.reshape(-1)[tree.first],
            positions=self._lengths[requests][of_group] + tree.first % depth,
            slots=self._slots(requests[of_group], contexts[of_group] + rows),
            query_starts=bounds,
            context_lens=contexts,
            block_tables=tuple([block_array(self._helds[request].sequence) for request in requests]),
            logit_rows=tree.nodes[(tree.places % depth) == depth - 1],
            tree_parents=None if (parents == rows - 1).all() else parents,
            return_logits=True,
        )

    def _there(self, nodes: Nodes, starts: NDArray[np.int64]) -> NDArray[np.int64]:
        """[groups] how many tokens, from the root down, all nodes of a request have in common with what is there."""
        known = self._guesses.shape[1]
        same = nodes.paths[:, :known] == self._guesses[nodes.requests]
        lengths = np.logical_and.accumulate(same, axis=1).sum(axis=1)
        found: NDArray[np.int64] = np.minimum.reduceat(lengths, starts)
        return found

    def _keep(self, nodes: Nodes, requests: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
        """The rows of a request begin with the path to its first node."""
        depth = nodes.paths.shape[1]
        guesses = np.full((len(self._helds), depth), PAD, np.int64)
        guesses[:, : self._guesses.shape[1]] = self._guesses
        guesses[requests] = nodes.paths[starts]
        self._guesses = guesses
        for request in requests.tolist():
            self._helds[request].guesses = guesses[request]

    def _slots(self, requests: NDArray[np.int64], indices: NDArray[np.int64]) -> NDArray[np.int64]:
        size = self._block_size
        slots: NDArray[np.int64] = self._tables[requests, indices // size] * size + indices % size
        return slots
