"""The parts of speculation. A new drafter, rule or controller is one file and one line of the registry beside it.

One round, for all requests of a step:

    budgets = controller.budget(load, stats)             all 0: a plain step, nothing below runs
    drafts  = drafter.propose(requests, budgets.candidates, budgets.floor)
    drafts  = controller.trim(drafts, budgets, requests)
    rows    = target.forward(drafts, rule.reads_laws)
    outcome = rule.verify(drafts, rows, dice)
    target.commit(drafts, outcome)
    drafter.observe(feedback);  stats.observe(…);  controller.record(…)

Whoever runs these, in this order or overlapped, is the Driver. The target is the engine, which calls the driver around
each of its steps: a step computes the roots and all nodes of all requests, each node seeing its ancestors only, and by
what the driver says of them (Verdict) the KV of accepted paths moves to where plain decodes would have left it.

The output follows the target's law if the rule is lossless for the law of the drafts (rules/registry.py: `check`) and
each random number is used once: see dice.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from engine.speculator import Speculator
from speculation.acceptance import Acceptance
from speculation.laws import DraftLaw
from speculation.rounds import (
    Budgets,
    DraftRequest,
    Feedback,
    Load,
    Needs,
    Observed,
    Outcome,
    Tally,
    TargetRows,
    Timing,
)
from speculation.tree import DraftBatch


class Drafter(Protocol):
    """Proposes token trees. For each request: start, then absorb, propose and observe in any number, then finish. Of a
    request that is decoded elsewhere it sees the prompt only: absorb in any number, then pack, then finish.

    `token_ids` of a request is the truth: other steps than its own may have made it longer since the last call, and a
    drafter with state of its own brings that up to date before it proposes. It never fails a request: one that it knows
    nothing to say of gets no nodes. Whatever it raises switches it off for the worker.
    """

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str:
        """Of its weights; empty if it has none."""
        ...

    @property
    def law(self) -> DraftLaw:
        """Of all that it proposes."""
        ...

    @property
    def branches(self) -> bool:
        """Whether a node may have more than one child."""
        ...

    @property
    def max_budget(self) -> int:
        """More nodes than this it never proposes for a request."""
        ...

    @property
    def needs(self) -> Needs: ...

    def start(self, request: DraftRequest) -> None:
        """The request is about to decode: its prompt, and what it may have emitted elsewhere, is in token_ids."""
        ...

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        """Rows that the target computed without a draft of this drafter: a prompt's, before or after `start`, and those
        of plain steps, before the next `propose`. Only called if it `needs` something of them. One that needs no taps
        is not told of every plain step: what that may take is bounded (allowance.py)."""
        ...

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        """Trees for all `requests`, in this order, of at most budgets[r] nodes. Random numbers come from
        dice.draft_uniforms, so the same state proposes the same.

        `floor`: a node whose path is accepted with a lower probability than this, all of it, is not worth drafting;
        0 is no bound. A drafter that has such estimates stops there. If its tokens are sampled, only the estimates of
        the nodes before may decide whether a node is drawn; once drawn it stays."""
        ...

    def observe(self, feedback: Feedback) -> None:
        """What came of the last proposal; token_ids have the emitted tokens already."""
        ...

    def finish(self, key: int) -> None:
        """The request has gone; what was kept of it is freed, or kept within bounds if it may be remembered."""
        ...

    def pack(self, key: int) -> dict[str, torch.Tensor]:
        """What a drafter on another worker needs to go on as this one would; empty if token_ids are enough. Asked when
        the prompt of a request that was not started here is computed."""
        ...

    def unpack(self, request: DraftRequest, state: dict[str, torch.Tensor]) -> None:
        """`pack` of the same drafter and version elsewhere, after `start`. It comes from another process: raises
        TransferError, with nothing changed, for what no `pack` can have been (packing.expect)."""
        ...

    @property
    def memory_bytes(self) -> int:
        """That it holds now, weights included. Bounded by what it was made with, whatever comes."""
        ...


class Dice(Protocol):
    """The chance that rules need. What is decided and what is drawn never share a random number: a uniform below p / q
    is no longer uniform."""

    def accept(
        self,
        requests: NDArray[np.int64],
        depths: NDArray[np.int64],
        tries: NDArray[np.int64],
        chances: NDArray[np.float64],
    ) -> NDArray[np.bool_]:
        """[n] true with probability chances [n]; of one not below 1 always. The decision about the child that is tried
        after `tries` others at `depth`, which is 1 for the first token that the round emits."""
        ...

    def draw(self, requests: NDArray[np.int64], depths: NDArray[np.int64], laws: torch.Tensor) -> NDArray[np.int64]:
        """[n] tokens from laws [n, vocab], which need not sum to one; UNDRAWABLE where there is nothing to draw."""
        ...

    def select(self, requests: NDArray[np.int64]) -> Dice:
        """For some of the requests."""
        ...


class VerifyRule(Protocol):
    """Says which nodes are accepted and what is emitted."""

    @property
    def name(self) -> str: ...

    @property
    def laws(self) -> Collection[DraftLaw]:
        """Of the drafts that it can verify; lossless for each if it is `lossless`."""
        ...

    @property
    def lossless(self) -> bool:
        """Whether the output follows the target's law. If not, it is only used when asked for by name."""
        ...

    @property
    def branches(self) -> bool:
        """Whether it can verify trees, or chains only."""
        ...

    @property
    def reads_laws(self) -> bool:
        """Whether it needs the target's law in every row of the requests that are not greedy, or one drawn token."""
        ...

    def verify(self, drafts: DraftBatch, rows: TargetRows, dice: Dice) -> Outcome: ...


class Controller(Protocol):
    """Decides how much is drafted, and by whom. Pure: what it knows it was told."""

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        """Who asked for a drafter is given that one or nothing (Load.wishes)."""
        ...

    def trim(self, drafts: DraftBatch, budgets: Budgets, requests: NDArray[np.int64]) -> DraftBatch:
        """`drafts` without what is not worth verifying, by what the drafter says of its nodes. They are for `requests`
        of the step, in this order, and all of these stay."""
        ...

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        """What came of a step, plain ones included. Without them nobody knows what speculation saves."""
        ...


Driver = Speculator
"""in_batch.py takes a round's parts in turn; in_prefill.py only looks on. An engine is given either (Engine.speculate),
or another that overlaps them."""


class Learner(Protocol):
    """Makes better versions of a drafter out of what was served."""

    def ingest(self, feedback: Feedback) -> None:
        """Within a bounded memory; requests that may not be remembered are left out."""
        ...

    def step(self) -> Any | None:
        """Trains a while; a candidate once there is one."""
        ...

    def gate(self, candidate: Any) -> bool:
        """Whether it is better on traffic it was not trained on, by more than chance."""
        ...

    def publish(self, candidate: Any) -> str:
        """Its version, from now on what drafters load."""
        ...

    def rollback(self, version: str) -> str:
        """Takes a version back; the one that is used instead."""
        ...
