"""A drafter for tests of what is around drafters: it says that what followed the last two tokens before will follow
them again, and besides, as another branch, that the last token comes once more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import BaseDrafter
from speculation.drafters.registry import DrafterKind
from speculation.rounds import DraftRequest
from speculation.tree import ROOT, DraftBatch, offsets_of


class Copier(BaseDrafter):
    name: ClassVar[str] = "copier"

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        trees = [self._tree(request.token_ids, int(budget)) for request, budget in zip(requests, budgets, strict=True)]
        offsets = offsets_of(np.array([len(tokens) for tokens, _ in trees], np.int64))
        tokens, parents = (np.array([x for tree in trees for x in tree[side]], np.int64) for side in (0, 1))
        return DraftBatch(tokens, parents, offsets, self.law, self.name)

    def _tree(self, text: Sequence[int], budget: int) -> tuple[list[int], list[int]]:
        last = list(text[-2:])
        found = next((at for at in range(len(text) - 2, 1, -1) if list(text[at - 2 : at]) == last), len(text))
        copied = list(text[found : found + budget])
        parents = list(range(ROOT, len(copied) - 1))
        if self.branches and len(copied) < budget and copied[:1] != last[1:]:
            return [*copied, last[1]], [*parents, ROOT]
        return copied, parents


build = Copier
COPIER = DrafterKind("copier", module="tests.speculation.copier")
