"""What drafters have in common that learn from the target's likeliest tokens while it verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from core.errors import TransferError
from engine.native import library
from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.drafters.contexts import PRIVATE, SHARED, Contexts, Salts, last_windows, owners_of, windows_at
from speculation.drafters.growth import Branches, grow
from speculation.drafters.mixture import mixed
from speculation.drafters.native import NativeSuccessors
from speculation.drafters.successors import WIDTH, Successors
from speculation.packing import expect
from speculation.rounds import DraftRequest, Feedback, Needs, Observed
from speculation.tree import DraftBatch

MOST_BYTES = 64 << 20
"""More memory would be slower and hardly better."""
CERTAINTY = np.float32(0.97)
"""Of what all contexts say: with it chances are about as often right as they say."""
LONGEST_TEXT = 1 << 15
"""Tokens of a text that are read when it comes: the last ones."""
OF_WHAT_CAME = 0.2
"""Part of the evidence of a verified row: the token that came. The rest is the target's law, which grammars, penalties
and low temperatures do not follow."""


_ONE = np.array([0, 1])
"""Offsets of one row of one request."""
_ROUNDING = 1e-3
"""Above which a log-probability is none."""


@dataclass(slots=True)
class Reader:
    """How far a request has been read, and who may see what is learned of it."""

    owners: tuple[int, int]
    salts: Salts
    known: int = 0
    """Contexts whose successor has been learned: those that end before this index."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """After each window came one of tokens [n, k], with evidence `weights` [n, k]."""

    owners: NDArray[np.uint64]  # [n, 2] private and shared
    windows: NDArray[np.int64]  # [n, width]
    tokens: NDArray[np.int64]
    weights: NDArray[np.float32]


class RecyclingDrafter(BaseDrafter):
    """Reads every text once: what followed its contexts, with the target's law where that was computed. Predicts from
    all contexts together, and drafts the worthiest trees."""

    contexts: ClassVar[Contexts]
    """The least specific first."""
    of_text: ClassVar[Contexts]
    """Those after which the tokens of a text are learned too."""
    doubts: ClassVar[NDArray[np.float32]]
    """[contexts] see mixture.py."""
    fading: ClassVar[float]
    """See Successors."""

    def __init__(self, surroundings: Surroundings) -> None:
        super().__init__(surroundings)
        self.needs = Needs(top=min(WIDTH, surroundings.vocab_size), thread=False)
        if surroundings.device.type == "cpu":
            library.load()  # of likeliest.py: one that came later would round otherwise than before, or than elsewhere
        room = min(surroundings.max_memory_bytes, MOST_BYTES) if surroundings.proposes else 0
        self._table = Successors(room, self.fading)
        self._native = NativeSuccessors.of(self._table)
        self._readers: dict[int, Reader] = {}
        self._of_prompts: dict[int, Observed] = {}
        """The last row of each request's prompt."""

    @property
    def memory_bytes(self) -> int:
        return self._table.nbytes

    def remember(self, contexts: Contexts, lesson: Lesson) -> None:
        salts = contexts.salts(lesson.owners)
        if self._native is not None:
            self._native.add(contexts, lesson.windows, salts, lesson.tokens, lesson.weights)
            return
        keys = contexts.keys(lesson.windows, salts)
        which = np.arange(len(keys)).repeat(keys.shape[1])
        self._table.add(keys.reshape(-1), salts.owners.reshape(-1), lesson.tokens[which], lesson.weights[which])

    def recall(self, windows: NDArray[np.int64], salts: Salts) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """[n, contexts, WIDTH] tokens and their evidence after windows [n, width]."""
        return self._table.after(self.contexts.keys(windows, salts), salts.owners)

    def start(self, request: DraftRequest) -> None:
        self._read(request, len(request.token_ids) - 1)

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        for place, request in enumerate(requests):
            end = int(observed.offsets[place + 1])
            if end > observed.offsets[place] and observed.indices[end - 1] < request.num_prompt_tokens:
                self._of_prompts[request.key] = _row(observed, end - 1)
        if self.surroundings.proposes:
            self._recycle(requests, observed)

    def observe(self, feedback: Feedback) -> None:
        self._recycle(feedback.requests, feedback.observed)

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        salts, windows = self.catch_up(requests), last_windows(requests, self.contexts.width)
        if self._native is not None:
            return self._native.grow(
                *(self.contexts, salts, self.doubts, float(CERTAINTY), windows, budgets, floor),
                branches=self.branches,
                law=self.law,
                drafter=self.name,
            )

        def follow(of_request: NDArray[np.int64], windows: NDArray[np.int64]) -> Branches:
            law = mixed(*self.recall(windows, salts.of(of_request)), self.doubts)
            return Branches(law.windows, law.tokens, CERTAINTY * law.chances)

        return grow(follow, windows, budgets, floor, branches=self.branches, law=self.law, drafter=self.name)

    def finish(self, key: int) -> None:
        """What was learned of one that may be remembered goes as newer things come."""
        self._of_prompts.pop(key, None)
        reader = self._readers.pop(key, None)
        if reader is not None and reader.owners[PRIVATE] == reader.owners[SHARED]:
            self._table.forget(reader.owners[PRIVATE])

    def pack(self, key: int) -> dict[str, torch.Tensor]:
        row = self._of_prompts.get(key)
        if row is None or row.top_ids is None or row.top_logprobs is None:
            return {}
        parts = {"index": row.indices, "top_ids": row.top_ids, "top_logprobs": row.top_logprobs}
        return {name: torch.from_numpy(part) for name, part in parts.items()}

    def unpack(self, request: DraftRequest, state: dict[str, torch.Tensor]) -> None:
        index = expect(state, "index", torch.int64, 1)
        ids = expect(state, "top_ids", torch.int64, 1, self.needs.top)
        logprobs = expect(state, "top_logprobs", torch.float32, 1, self.needs.top)
        known = 0 <= int(index) < len(request.token_ids)
        if not known or (ids < 0).any() or (ids >= self.surroundings.vocab_size).any() or (logprobs > _ROUNDING).any():
            raise TransferError("the draft state is of another prompt or vocabulary, or has probabilities above one")
        row = Observed(_ONE, index.numpy(), top_ids=ids.numpy(), top_logprobs=logprobs.numpy())
        self._recycle([request], row)

    def catch_up(self, requests: Sequence[DraftRequest]) -> Salts:
        """Reads all texts up to the root."""
        nobody = self.contexts.salts(np.empty((0, 2), np.uint64))
        return Salts.joined([nobody, *(self._read(request, len(request.token_ids) - 1).salts for request in requests)])

    def _read(self, request: DraftRequest, end: int) -> Reader:
        """What followed the contexts that end before index `end`, as far as nobody has told."""
        reader = self._readers.get(request.key)
        if reader is None:
            owners = owners_of(request)
            reader = Reader(owners, self.contexts.salts(np.array([owners], np.uint64)))
            self._readers[request.key] = reader
        first = max(reader.known, end - LONGEST_TEXT)
        if first < end:
            tokens = np.array(request.token_ids[first + 1 : end + 1], np.int64)[:, None]
            windows = windows_at(request.token_ids, first, end, self.contexts.width)
            sure = np.ones(tokens.shape, np.float32)
            self.remember(self.of_text, Lesson(_owners([reader], [end - first]), windows, tokens, sure))
            reader.known = end
        return reader

    def _recycle(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        if observed.top_ids is None or observed.top_logprobs is None or not len(observed.indices):
            return  # texts are read before the next proposal
        readers, windows, came = [], [], []
        for request, start, end in zip(requests, observed.offsets, observed.offsets[1:], strict=False):
            if start == end:
                continue
            first, last = int(observed.indices[start]), int(observed.indices[end - 1])
            readers.append(self._read(request, first))
            readers[-1].known = max(readers[-1].known, last + 1)
            windows.append(windows_at(request.token_ids, first, last + 1, self.contexts.width))
            came.append(_successors(request, first, last))
        tokens = np.column_stack([observed.top_ids, np.concatenate(came)])
        weights = np.full(tokens.shape, OF_WHAT_CAME, np.float32)
        weights[:, :-1] = np.exp(observed.top_logprobs) * np.float32(1 - OF_WHAT_CAME)
        weights[tokens < 0] = 0.0
        owners = _owners(readers, [len(some) for some in windows])
        self.remember(self.contexts, Lesson(owners, np.concatenate(windows), np.maximum(tokens, 0), weights))


def _row(observed: Observed, row: int) -> Observed:
    """In memory of its own."""
    own, ids, logprobs = slice(row, row + 1), observed.top_ids, observed.top_logprobs
    return Observed(
        _ONE,
        observed.indices[own].copy(),
        top_ids=None if ids is None else ids[own].copy(),
        top_logprobs=None if logprobs is None else logprobs[own].copy(),
    )


def _owners(readers: Sequence[Reader], counts: Sequence[int]) -> NDArray[np.uint64]:
    return np.repeat(np.array([reader.owners for reader in readers], np.uint64), counts, axis=0)


def _successors(request: DraftRequest, first: int, last: int) -> NDArray[np.int64]:
    """The tokens after these indices; -1 for one that has not come yet."""
    came = np.full(last + 1 - first, -1, np.int64)
    text = request.token_ids[first + 1 : last + 2]
    came[: len(text)] = text
    return came
