"""Everything that can happen in a round, with its probability: all drafts of a law, all decisions of a rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise, product

import numpy as np
import torch
from numpy.typing import NDArray

from speculation.laws import DraftLaw
from speculation.qlaw import QLaw
from speculation.rounds import Outcome, TargetRows
from speculation.rules.registry import Rule
from speculation.tree import ROOT, DraftBatch

Prefix = tuple[int, ...]
Law = NDArray[np.float64]
"""Of texts of some length: [vocab] * length."""
Verify = Callable[[DraftBatch, TargetRows, "Scripted"], Outcome]


@dataclass
class Texts:
    """A law of texts: the probabilities of the next token after each prefix, in float64."""

    vocab: int
    seed: int
    sparse: bool = False
    """Some tokens have no probability."""
    _rows: dict[Prefix, NDArray[np.float64]] = field(default_factory=dict)

    def after(self, prefix: Prefix) -> NDArray[np.float64]:
        if prefix not in self._rows:
            rng = np.random.default_rng([self.seed, len(prefix), *prefix])
            law = rng.dirichlet(np.full(self.vocab, 0.7))
            if self.sparse:
                law[rng.integers(self.vocab)] = 0.0
            self._rows[prefix] = law / law.sum()
        return self._rows[prefix]

    def of(self, text: Prefix, start: int = 0) -> float:
        """The probability of text[start:] after text[:start]."""
        return float(np.prod([self.after(text[:i])[text[i]] for i in range(start, len(text))]))

    def joint(self, length: int) -> NDArray[np.float64]:
        """[vocab] * length."""
        texts = product(range(self.vocab), repeat=length)
        return np.array([self.of(text) for text in texts]).reshape((self.vocab,) * length)


@dataclass(frozen=True)
class Drafts:
    """All drafts of one shape with what they are drawn with: a batch of one request each."""

    batch: DraftBatch
    weights: NDArray[np.float64]
    prefixes: list[list[Prefix]]
    """[requests][rows]"""


Shape = Sequence[int]
"""Parents of the nodes of a tree, within the request."""


def all_drafts(shape: Shape, law: DraftLaw, q: Texts) -> Drafts:
    trees = [tree for tree in _trees(shape, law, q) if tree[1] > 0]
    tokens = np.array([tree[0] for tree in trees], np.int64).reshape(len(trees), len(shape))
    prefixes = [_prefixes(shape, row) for row in tokens.tolist()]
    batch = DraftBatch(
        tokens.ravel(),
        np.tile(np.array(shape, np.int64), len(trees)),
        np.arange(len(trees) + 1) * len(shape),
        law,
        "enumerated",
        q=None if law is DraftLaw.POINT_MASS else _q_law(shape, prefixes, q),
    )
    batch.validate(q.vocab)
    return Drafts(batch, np.array([tree[1] for tree in trees]), prefixes)


def _trees(shape: Shape, law: DraftLaw, q: Texts) -> Iterator[tuple[Prefix, float]]:
    if law is DraftLaw.POINT_MASS:
        yield _likeliest(shape, q), 1.0
        return
    for tokens in product(range(q.vocab), repeat=len(shape)):
        prefixes, weight = _prefixes(shape, tokens), 1.0
        for node, parent in enumerate(shape):
            chances = q.after(prefixes[parent + 1]).copy()
            if law is DraftLaw.WITHOUT_REPLACEMENT:
                before = [tokens[other] for other in range(node) if shape[other] == parent]
                chances[before] = 0.0
            total = chances.sum()
            weight *= chances[tokens[node]] / total if total > 0 else 0.0
        yield tokens, weight


def _likeliest(shape: Shape, q: Texts) -> Prefix:
    """The top k of q at every node."""
    tokens: list[int] = []
    for node, parent in enumerate(shape):
        rank = sum(shape[other] == parent for other in range(node))
        tokens.append(int(np.argsort(-q.after(_prefixes(shape, tokens)[parent + 1]), kind="stable")[rank]))
    return tuple(tokens)


def _prefixes(shape: Shape, tokens: Sequence[int]) -> list[Prefix]:
    """[rows] what each row has seen, the root's nothing."""
    seen: list[Prefix] = [()]
    for parent, token in zip(shape, tokens, strict=False):
        seen.append((*seen[parent + 1], token))
    return seen


def _q_law(shape: Shape, prefixes: list[list[Prefix]], q: Texts) -> QLaw:
    laws = torch.tensor(np.stack([q.after(rows[parent + 1]) for rows in prefixes for parent in shape]))
    first = [list(shape).index(parent) for parent in shape]
    rows = np.concatenate([np.array(first) + request * len(shape) for request in range(len(prefixes))])
    return QLaw(rows, laws)


# --- chance --------------------------------------------------------------------------------------------------------


@dataclass
class Scripted:
    """Implements protocols.Dice: each request's decisions follow its script, then take the first way there is. What
    could have been decided, and how likely each was, is kept."""

    scripts: list[Prefix]
    faced: list[list[NDArray[np.float64]]] = field(default_factory=list)
    went: list[list[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.faced = [[] for _ in self.scripts]
        self.went = [[] for _ in self.scripts]

    def accept(
        self, requests: NDArray[np.int64], depths: object, tries: object, chances: NDArray[np.float64]
    ) -> NDArray[np.bool_]:
        chances = np.minimum(chances, 1.0)
        ways = np.stack([chances, 1 - chances], axis=1)
        return np.array([self._go(request, odds) == 0 for request, odds in zip(requests, ways, strict=True)], np.bool_)

    def draw(self, requests: NDArray[np.int64], depths: object, laws: torch.Tensor) -> NDArray[np.int64]:
        ways = (laws / laws.sum(-1, keepdim=True)).numpy()
        return np.array([self._go(request, odds) for request, odds in zip(requests, ways, strict=True)], np.int64)

    def select(self, requests: NDArray[np.int64]) -> Scripted:
        raise NotImplementedError("all enumerated requests are random")

    def _go(self, request: int, odds: NDArray[np.float64]) -> int:
        script, went = self.scripts[request], self.went[request]
        way = script[len(went)] if len(went) < len(script) else int(np.flatnonzero(odds > 0)[0])
        self.faced[request].append(odds)
        went.append(way)
        return way

    def others(self, request: int) -> Iterator[Prefix]:
        """Scripts that part from what was done where it no longer followed one."""
        went = self.went[request]
        for step in range(len(self.scripts[request]), len(went)):
            for way in np.flatnonzero(self.faced[request][step] > 0):
                if way != went[step]:
                    yield (*went[:step], int(way))

    def weight(self, request: int) -> float:
        return float(np.prod([odds[way] for odds, way in zip(self.faced[request], self.went[request], strict=True)]))


def outcomes(drafts: Drafts, verify: Verify, p: Texts) -> Iterator[tuple[Prefix, float]]:
    """What a round may emit, each with its probability; the same text may come several times."""
    pending: list[tuple[int, Prefix]] = [(request, ()) for request in range(drafts.batch.num_requests)]
    while pending:
        of = np.array([request for request, _ in pending], np.int64)
        dice = Scripted([script for _, script in pending])
        outcome = verify(drafts.batch.select(of), _target_rows(drafts, of, p), dice)
        for i, text in enumerate(_texts(outcome)):
            yield text, float(drafts.weights[of[i]]) * dice.weight(i)
        pending = [(int(request), script) for i, request in enumerate(of) for script in dice.others(i)]


def outcomes_of_drawn(drafts: Drafts, verify: Verify, p: Texts) -> Iterator[tuple[Prefix, float]]:
    """The same for a rule that reads tokens: the target draws every combination of tokens in the rows."""
    for drawn in product(range(p.vocab), repeat=len(drafts.prefixes[0])):
        rows = TargetRows(np.tile(np.array(drawn, np.int64), drafts.batch.num_requests))
        texts = _texts(verify(drafts.batch, rows, Scripted([])))
        for text, seen, weight in zip(texts, drafts.prefixes, drafts.weights, strict=True):
            yield text, float(weight) * math.prod(p.after(prefix)[y] for prefix, y in zip(seen, drawn, strict=True))


def output_law(drafts: Drafts, rule: Rule, p: Texts, length: int) -> Law:
    """The law of the first `length` tokens, what a round leaves open being drawn from p."""
    ways = outcomes if rule.reads_laws else outcomes_of_drawn
    weights: dict[Prefix, float] = {}
    for text, weight in ways(drafts, rule.verify, p):
        weights[text] = weights.get(text, 0.0) + weight
    law = np.zeros((p.vocab,) * length)
    for text, weight in weights.items():
        for rest in product(range(p.vocab), repeat=length - len(text)):
            law[(*text, *rest)] += weight * p.of((*text, *rest), len(text))
    return law


def mean_accepted(drafts: Drafts, rule: Rule, p: Texts) -> float:
    return sum(weight * (len(text) - 1) for text, weight in outcomes(drafts, rule.verify, p))


def _texts(outcome: Outcome) -> list[Prefix]:
    bounds = outcome.emitted_offsets.tolist()
    return [tuple(outcome.emitted[start:end].tolist()) for start, end in pairwise(bounds)]


def _target_rows(drafts: Drafts, requests: NDArray[np.int64], p: Texts) -> TargetRows:
    laws = [p.after(seen) for request in requests for seen in drafts.prefixes[request]]
    rows = len(drafts.prefixes[0])
    return TargetRows(
        np.full(len(laws), -1, np.int64), torch.tensor(np.stack(laws)), np.arange(len(requests), dtype=np.int64) * rows
    )


def total_variation(law: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    return float(np.abs(law - other).sum() / 2)


CHAIN: Shape = (ROOT, 0, 1)
FORK: Shape = (ROOT, ROOT, ROOT)
TREE: Shape = (ROOT, ROOT, 0, 0, 1)
