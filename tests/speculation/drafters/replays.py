"""Drafters over texts that are known, in place of a target."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from speculation.drafters.base import Surroundings
from speculation.drafters.registry import make_drafter
from speculation.laws import DraftLaw
from speculation.protocols import Drafter
from speculation.rounds import DraftRequest, Feedback, Observed, Outcome
from speculation.tree import ROOT, DraftBatch, offsets_of

VOCAB = 40
MEMORY = 4 << 20


def made(name: str, *, branches: bool = True, memory: int = MEMORY) -> Drafter:
    surroundings = Surroundings(
        vocab_size=VOCAB,
        max_budget=80,
        max_requests=8,
        max_memory_bytes=memory,
        law=DraftLaw.POINT_MASS,
        branches=branches,
    )
    return make_drafter(name, surroundings)


def request(key: int, text: Sequence[int], scope: str = "", *, remember: bool = True) -> DraftRequest:
    return DraftRequest(key, list(text), len(text), seed=0, temperature=0.0, scope=scope, remember=remember)


def propose(drafter: Drafter, requests: Sequence[DraftRequest], budget: int, floor: float = 0.0) -> DraftBatch:
    drafts = drafter.propose(requests, np.full(len(requests), budget), floor)
    drafts.validate(VOCAB)
    return drafts


def paths(drafts: DraftBatch, index: int = 0) -> list[tuple[int, ...]]:
    """Of each node of a request, in order."""
    found: list[tuple[int, ...]] = []
    own = slice(drafts.offsets[index], drafts.offsets[index + 1])
    for token, parent in zip(drafts.tokens[own].tolist(), drafts.parents[own].tolist(), strict=True):
        found.append((*(found[parent] if parent != ROOT else ()), token))
    return found


def likely(token: int) -> NDArray[np.int64]:
    """What a target finds likely where it says `token`."""
    return (token + np.arange(8) * 5) % VOCAB


LOGPROBS = np.log(np.array([0.6, 0.15, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01], np.float32))


class Replay:
    """Requests that go on as `texts` do, whatever is drafted."""

    def __init__(
        self, drafter: Drafter, texts: Sequence[Sequence[int]], num_prompt_tokens: int, scope: str = ""
    ) -> None:
        self.drafter, self.texts = drafter, texts
        self.requests = [request(key, text[:num_prompt_tokens], scope) for key, text in enumerate(texts)]
        self.num_steps = self.num_accepted = 0
        for one in self.requests:
            drafter.start(one)

    def run(self, budget: int, floor: float = 0.0) -> list[DraftBatch]:
        """Until all texts are out, a token of each kept back so that every step ends with one of the target's."""
        drafted = []
        while going := [one for one in self.requests if len(one.token_ids) < len(self.texts[one.key])]:
            drafted.append(propose(self.drafter, going, budget, floor))
            self.step(going, drafted[-1])
        return drafted

    def step(self, going: Sequence[DraftRequest], drafts: DraftBatch) -> None:
        accepted = np.zeros(drafts.num_nodes, np.bool_)
        last, indices, counts = [], [], []
        for index, one in enumerate(going):
            ahead = tuple(self.texts[one.key][len(one.token_ids) :])
            right = [
                node for node, path in enumerate(paths(drafts, index)) if path == ahead[: len(path)] and path != ahead
            ]
            accepted[drafts.offsets[index] + np.array(right, np.int64)] = True
            indices += range(len(one.token_ids) - 1, len(one.token_ids) + len(right))
            one.token_ids.extend(ahead[: len(right) + 1])
            last.append(one.token_ids[-1])
            counts.append(len(right) + 1)
        said = [
            likely(one.token_ids[-count + turn])
            for one, count in zip(going, counts, strict=True)
            for turn in range(count)
        ]
        top = min(self.drafter.needs.top, 8)
        observed = Observed(
            offsets_of(np.array(counts)),
            np.array(indices),
            top_ids=np.stack(said)[:, :top] if top else None,
            top_logprobs=np.tile(LOGPROBS[:top], (len(said), 1)) if top else None,
        )
        self.drafter.observe(Feedback(going, drafts, Outcome.of(drafts, accepted, np.array(last)), observed))
        self.num_steps += 1
        self.num_accepted += int(accepted.sum())
