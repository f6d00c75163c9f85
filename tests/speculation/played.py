"""Many requests that speculate until each has a few tokens, with the random numbers of a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from core.types import SamplingParams
from engine.sampler import sample
from engine.step import NOT_ASKED, SamplingRow
from speculation.dice import KeyedDice, draft_uniforms
from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import TargetRows
from speculation.rules.registry import Rule
from speculation.tree import ROOT, DraftBatch
from tests.speculation.enumeration import Law, Shape, Texts

LENGTH = 4
"""Tokens of a text that are looked at."""


@dataclass(frozen=True)
class Trie:
    """The laws of a Texts as a table. The prefix after 0, the empty one, and a token is 3 * 0 + token + 1, and so on
    (for a vocabulary of 3)."""

    texts: Texts
    depth: int

    @cached_property
    def laws(self) -> Law:
        """[prefixes, vocab]"""
        level, laws = [()], []
        for _ in range(self.depth + 1):
            laws += [self.texts.after(prefix) for prefix in level]
            level = [(*prefix, token) for prefix in level for token in range(self.texts.vocab)]
        return np.array(laws)

    def follow(self, prefixes: NDArray[np.int64], tokens: NDArray[np.int64]) -> NDArray[np.int64]:
        return prefixes * self.texts.vocab + tokens + 1


@dataclass(frozen=True)
class Game:
    """One way to speculate. What a mutant does wrong it puts in place of one of the functions."""

    rule: Rule
    law: DraftLaw
    shape: Shape
    p: Trie
    q: Trie
    choose: Callable[[Game, NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]
    """One token from each of laws [n, vocab] with uniforms [n]."""
    reshape: Callable[[DraftBatch, NDArray[np.int64]], tuple[DraftBatch, NDArray[np.int64]]] = lambda *both: both
    """The draft that is verified, of that which was drawn and the prefixes of its rows."""
    target: Callable[[DraftBatch, torch.Tensor], torch.Tensor] = lambda _, laws: laws
    """The laws [rows, vocab] that the rule gets."""
    numbers: Callable[[list[int], list[int], int], NDArray[np.float64]] = draft_uniforms
    """Of the drafter: [requests, nodes] by their seeds and positions."""
    dice: Callable[[list[int], NDArray[np.int64]], KeyedDice] = KeyedDice

    def counts(self, requests: int) -> NDArray[np.int64]:
        """Of the texts of LENGTH tokens, in the order of Texts.joint."""
        seeds, prefixes = np.arange(requests), np.zeros(requests, np.int64)
        texts, lengths = np.zeros((requests, LENGTH + len(self.shape) + 1), np.int64), np.zeros(requests, np.int64)
        while len(going := np.flatnonzero(lengths < LENGTH)):
            tokens, offsets = self._round(seeds[going], lengths[going], prefixes[going])
            for step in range(int(np.diff(offsets).max())):
                some = np.flatnonzero(np.diff(offsets) > step)
                drawn, of = tokens[offsets[some] + step], going[some]
                texts[of, lengths[of]] = drawn
                prefixes[of] = self.p.follow(prefixes[of], drawn)
                lengths[of] += 1
        digits = self.p.texts.vocab ** np.arange(LENGTH)[::-1]
        return np.bincount(texts[:, :LENGTH] @ digits, minlength=self.p.texts.vocab**LENGTH)

    def _round(
        self, seeds: NDArray[np.int64], positions: NDArray[np.int64], prefixes: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        drafts, seen = self.reshape(*self._propose(seeds, positions, prefixes))
        rows = self._rows(drafts, seen, seeds, positions)
        outcome = self.rule.verify(drafts, rows, self.dice(seeds.tolist(), positions))
        return outcome.emitted, outcome.emitted_offsets

    def _propose(
        self, seeds: NDArray[np.int64], positions: NDArray[np.int64], prefixes: NDArray[np.int64]
    ) -> tuple[DraftBatch, NDArray[np.int64]]:
        """And the prefix of every row."""
        u = self.numbers(seeds.tolist(), positions.tolist(), len(self.shape))
        seen, tokens, laws = [prefixes], [], []
        for node, parent in enumerate(self.shape):
            law = self.q.laws[seen[parent + 1]]
            laws.append(law)
            if self.law is DraftLaw.WITHOUT_REPLACEMENT:
                law = law.copy()
                for other in range(node):
                    if self.shape[other] == parent:
                        law[np.arange(len(law)), tokens[other]] = 0.0
            tokens.append(self.choose(self, law, u[:, node]))
            seen.append(self.q.follow(seen[parent + 1], tokens[-1]))
        rows = np.arange(len(seeds) * len(self.shape))
        first = np.array([list(self.shape).index(parent) for parent in self.shape])
        q = QLaw(rows - rows % len(self.shape) + np.tile(first, len(seeds)), _flat(laws, torch.float32))
        batch = DraftBatch(
            np.stack(tokens, 1).ravel(),
            np.tile(np.array(self.shape, np.int64), len(seeds)),
            np.arange(len(seeds) + 1) * len(self.shape),
            self.law,
            "played",
            q=None if self.law is DraftLaw.POINT_MASS else q,
        )
        return batch, np.stack(seen, 1).ravel()

    def _rows(
        self, drafts: DraftBatch, seen: NDArray[np.int64], seeds: NDArray[np.int64], positions: NDArray[np.int64]
    ) -> TargetRows:
        laws = self.target(drafts, torch.tensor(self.p.laws[seen], dtype=torch.float32))
        if self.rule.reads_laws:
            return TargetRows(np.full(drafts.num_rows, NOT_ASKED), laws, drafts.root_rows)
        depths = np.zeros(drafts.num_rows, np.int64)
        depths[drafts.rows] = drafts.depths
        request_of = np.repeat(np.arange(drafts.num_requests), drafts.lengths + 1)
        rows = [
            SamplingRow(SamplingParams(max_tokens=LENGTH, seed=seed), position)
            for seed, position in zip(
                seeds[request_of].tolist(), (positions[request_of] + depths).tolist(), strict=True
            )
        ]
        return TargetRows(sample(laws.log(), rows)[0])


def _flat(laws: list[NDArray[np.float64]], dtype: torch.dtype) -> torch.Tensor:
    """[requests * nodes, vocab] of [nodes][requests, vocab]."""
    return torch.tensor(np.stack(laws, 1).reshape(-1, laws[0].shape[1]), dtype=dtype)


def draw(_: Game, laws: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.int64]:
    """By inverting the cumulative law."""
    cumulative = laws.cumsum(-1)
    return (u[:, None] * cumulative[:, -1:] >= cumulative).sum(-1)


def likeliest(_: Game, laws: NDArray[np.float64], u: NDArray[np.float64]) -> NDArray[np.int64]:
    return laws.argmax(-1)


CHAIN: Shape = (ROOT, 0)
TREE: Shape = (ROOT, ROOT, 0)
TEXTS = Trie(Texts(3, 11), LENGTH + 3)
DRAFTS = Trie(Texts(3, 12), LENGTH + 3)


def game(rule: Rule, law: DraftLaw) -> Game:
    choose = likeliest if law is DraftLaw.POINT_MASS else draw
    return Game(rule, law, TREE if rule.branches else CHAIN, TEXTS, DRAFTS, choose)
