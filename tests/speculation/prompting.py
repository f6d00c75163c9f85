"""A drafter that knows how outputs go on, controllers of every mood, and an engine with them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from numpy.typing import NDArray

from speculation.acceptance import Acceptance
from speculation.controllers.base import BaseController, Limits, plain_step
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.protocols import Controller
from speculation.rounds import Budgets, DraftRequest, Feedback, Load, Needs, Observed, Tally, Timing
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch, offsets_of
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import TINY
from tests.engine.late import LateRunner, Output, engine_over

ENGINES = {
    "step_tokens": st.integers(10, 80),
    "spare": st.integers(0, 30),
    "depth": st.integers(1, 2),
    "seed": st.integers(0, 2**32),
}
VOCAB = TINY["vocab_size"]
BUDGET = 9


class Prompter:
    """Knows how some outputs go on, and hides what it knows among wrong tokens in trees of every shape."""

    name, version, law, branches, max_budget, memory_bytes = "prompter", "", DraftLaw.POINT_MASS, True, BUDGET, 0

    def __init__(self, needs: Needs = Needs(), seed: int = 0, vocab: int = VOCAB) -> None:  # noqa: B008
        self.needs = needs
        self.outputs: dict[tuple[int, ...], list[int]] = {}
        """By prompt."""
        self.alive: set[int] = set()
        self.seen: list[Feedback] = []
        self.absorbed: list[tuple[list[DraftRequest], Observed]] = []
        self._rng = np.random.default_rng(seed)
        self._vocab = vocab

    def start(self, request: DraftRequest) -> None:
        self.alive.add(request.key)

    def finish(self, key: int) -> None:
        self.alive.remove(key)

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        self.absorbed.append((list(requests), observed))

    def observe(self, feedback: Feedback) -> None:
        self.seen.append(feedback)
        self.absorb(feedback.requests, feedback.observed)

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        trees = [self._tree(request, int(budget)) for request, budget in zip(requests, budgets, strict=True)]
        offsets = offsets_of(np.array([len(tree[0]) for tree in trees], np.int64))
        nodes, parents = (np.array([x for tree in trees for x in tree[side]], np.int64) for side in (0, 1))
        return DraftBatch(nodes, parents, offsets, self.law, self.name)

    def _tree(self, request: DraftRequest, budget: int) -> tuple[list[int], list[int]]:
        prompt = tuple(request.token_ids[: request.num_prompt_tokens])
        known = self.outputs.get(prompt, [])[request.position :]
        nodes: list[int] = []
        parents: list[int] = []
        good = [-1]  # nodes whose paths are right, from the root down
        for _ in range(int(self._rng.integers(0, budget + 1))):
            right = len(good) <= len(known) and self._rng.random() < 0.6
            parent = good[-1] if right else int(self._rng.integers(-1, len(nodes)))
            taken = {node for node, above in zip(nodes, parents, strict=True) if above == parent}
            token = known[len(good) - 1] if right else int(self._rng.integers(self._vocab))
            if token not in taken:
                nodes.append(token)
                parents.append(parent)
                if right:
                    good.append(len(nodes) - 1)
        return nodes, parents


class Moods(BaseController):
    """Budgets of every size, none included, and rests."""

    def __init__(self, drafters: Sequence[str] = ("prompter",), seed: int = 0, longest_rest: int = 3) -> None:
        super().__init__(Limits(BUDGET, tuple(drafters)))
        self._rng = np.random.default_rng(seed)
        self._longest_rest = longest_rest

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        room = self.room(load)
        asked = self._rng.integers(0, room + 1) * self._rng.integers(0, 2)
        rest = 0 if asked.any() else int(self._rng.integers(0, self._longest_rest + 1))
        return Budgets(asked, asked, [self.limits.drafters[0]] * len(room), rest=rest)


class Reader(Prompter):
    """Proposes only where it was shown the row before the root, as heads do."""

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        latest = {
            request.key: int(seen.indices[end - 1])
            for requests, seen in self.absorbed
            for request, end in zip(requests, seen.offsets[1:], strict=True)
        }
        ready = [latest.get(request.key) == len(request.token_ids) - 2 for request in requests]
        self.asked += len(ready)
        self.ready += sum(ready)
        return super().propose(requests, np.where(ready, budgets, 0), floor)

    asked = ready = 0

    def rows(self) -> list[tuple[int, int, torch.Tensor]]:
        """Request, index and hidden state of all that it was shown."""
        return [
            (request.key, int(seen.indices[row]), seen.taps[1][row])
            for requests, seen in self.absorbed
            for request, start, end in zip(requests, seen.offsets[:-1], seen.offsets[1:], strict=True)
            for row in range(start, end)
        ]


class Rests(BaseController):
    """Wants no drafts, and to be asked again after so many steps."""

    def __init__(self, rest: int) -> None:
        super().__init__(Limits(BUDGET, ("prompter",)))
        self.asked: list[int] = []
        """Requests in the step."""
        self.rested: list[int] = []
        self._rest = rest

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        self.asked.append(len(load.classes))
        return plain_step(["prompter"] * len(load.classes), self._rest)

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        self.rested.append(timing.rested)


def in_batch(
    drafter: Prompter, rule: str = "sampled", vocab: int = VOCAB, controller: Controller | None = None
) -> InBatch:
    return InBatch(
        {drafter.name: drafter},
        {drafter.name: RULES[rule]},
        controller or Moods(),
        Acceptance(BUDGET),
        vocab_size=vocab,
        max_budget=BUDGET,
    )


def outputs(
    runner: LateRunner, jobs: list[reproducible.Job], *, num_blocks: int, step_tokens: int, speculator: InBatch | None
) -> list[Output]:
    with engine_over(runner, num_blocks=num_blocks, step_tokens=step_tokens, speculator=speculator) as harness:
        found = harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)])
        assert harness.blocks.num_free == num_blocks
    return found
