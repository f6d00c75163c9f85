"""What drafters have in common that look up where the end of a text occurred before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts, Salts, last_windows, owners_of, windows_at
from speculation.drafters.mixture import part_of_each
from speculation.drafters.nodes import LEAST_WORTH, Nodes
from speculation.drafters.prefixes import prefixes
from speculation.drafters.texts import NOWHERE, Occurrences, Texts
from speculation.rounds import DraftRequest, Feedback, Needs
from speculation.tree import ROOT, DraftBatch

MOST_BYTES = 64 << 20
"""More memory would be slower and hardly better."""
DEEPEST = 32
"""Tokens after an occurrence that are looked at."""
GROWING_DOUBT = 1.0
"""What occurred after the same n tokens goes on as it did then with probability n / (n + this)."""


@dataclass(slots=True)
class _Entry:
    """A request whose text is indexed."""

    request: DraftRequest
    owners: tuple[int, int]
    known: int = 0
    """Tokens that are."""
    last: int = NOWHERE
    """Where the last of them is."""
    where: list[NDArray[np.int64]] = field(default_factory=list)
    """All of them are, if they may not be remembered."""

    @property
    def private(self) -> bool:
        return self.owners[PRIVATE] == self.owners[SHARED]


class LookupDrafter(BaseDrafter):
    """Every occurrence found votes for the text that came after it. A node is worth the votes of those that go through
    it, each less by what becomes doubtful on the way."""

    contexts: ClassVar[Contexts]
    doubts: ClassVar[NDArray[np.float32]]
    """[contexts] see mixture.py: evidence is the number of occurrences of which a context is the last."""
    needs = Needs(thread=False)
    most: ClassVar[int]
    """Occurrences of a context that are looked at."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self._texts = Texts(min(surroundings.max_memory_bytes, MOST_BYTES), self.contexts)
        self._entries: dict[int, _Entry] = {}

    @property
    def memory_bytes(self) -> int:
        return self._texts.nbytes

    def start(self, request: DraftRequest) -> None:
        self._read([request])

    def observe(self, feedback: Feedback) -> None:
        self._read(feedback.requests)

    def finish(self, key: int) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        if entry.private:
            self._texts.forget(entry.owners[PRIVATE], np.concatenate([*entry.where, np.empty(0, np.int64)]))
        elif entry.known < len(entry.request.token_ids):
            self._append([entry])

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        entries = self._read(requests)
        windows = last_windows(requests, self.contexts.width)
        found = self._texts.find(windows, self._salts(entries), self.most)
        length = min(int(budgets.max(initial=0)), DEEPEST)
        tokens = self._texts.continuations(found.positions, length)
        nodes = _voted(found, tokens, self._trusts(found, length, len(requests)))
        most = budgets if self.branches else np.full(len(requests), len(nodes))
        trees = nodes.trees(most, self.law, self.name, max(floor, LEAST_WORTH))
        return trees if self.branches else trees.keep(trees.sibling_ranks == 0).prune(budgets)

    def _trusts(self, found: Occurrences, length: int, num_windows: int) -> NDArray[np.float64]:
        """[occurrences, length] how far each is followed."""
        columns = self.contexts.num_columns
        which = found.windows * columns + found.columns
        masses = np.bincount(which, minlength=num_windows * columns).reshape(-1, columns).astype(np.float32)
        votes = part_of_each(masses, self.doubts).reshape(-1)[which]
        known = self.contexts.orders[found.columns][:, None] + np.arange(length)
        going_on = known / (known + GROWING_DOUBT)
        going_on[:, :1] = votes[:, None]  # which has the doubt of the first token
        return going_on.cumprod(axis=1)

    def _read(self, requests: Sequence[DraftRequest]) -> list[_Entry]:
        """All texts as far as they go."""
        for request in requests:
            if request.key not in self._entries:
                self._entries[request.key] = _Entry(request, owners_of(request))
        entries = [self._entries[request.key] for request in requests]
        longer = [entry for entry in entries if entry.known < len(entry.request.token_ids)]
        if longer:
            self._append(longer)
        return entries

    def _append(self, entries: Sequence[_Entry]) -> None:
        room = self._texts.size // len(entries)
        counts, tokens, windows = [], [], []
        for entry in entries:
            ids, end = entry.request.token_ids, len(entry.request.token_ids)
            first = max(entry.known, end - room)
            if first > entry.known:
                entry.last = NOWHERE  # there is a gap
            counts.append(end - first)
            tokens.append(ids[first:end])
            windows.append(windows_at(ids, first - 1, end - 1, self.contexts.width))
            entry.known = end
        salts = self._salts(entries).of(np.arange(len(entries)).repeat(counts))
        lasts = np.array([entry.last for entry in entries])
        lasts = self._texts.append(lasts, np.array(counts), np.concatenate(tokens), np.concatenate(windows), salts)
        for entry, count, last in zip(entries, counts, lasts.tolist(), strict=True):
            entry.last = last
            if entry.private:
                entry.where.append(np.arange(last + 1 - count, last + 1))

    def _salts(self, entries: Sequence[_Entry]) -> Salts:
        return self.contexts.salts(np.array([entry.owners for entry in entries], np.uint64).reshape(-1, 2))


def _voted(found: Occurrences, tokens: NDArray[np.int32], trusts: NDArray[np.float64]) -> Nodes:
    """The texts after occurrences [occurrences, length] as trees: those that begin alike share nodes."""
    trees = prefixes(found.windows, tokens)
    at, parents = trees.first, trees.parents
    worths = np.bincount(trees.nodes, trusts.reshape(-1)[trees.places], minlength=len(at)).astype(np.float64)
    above = np.where(parents == ROOT, 1.0, worths[parents])
    windows = found.windows[at // max(tokens.shape[1], 1)]
    return Nodes(tokens.reshape(-1)[at].astype(np.int64), parents, windows, worths, worths / above)
