"""What speculation has done on a worker, for its metrics. Monotonic since start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from core.wire import DrafterCounters, SpeculationCounters
from speculation.alarm import Record, Watch
from speculation.overlap import Overlap
from speculation.rounds import Outcome, Timing
from speculation.tree import DraftBatch

MAX_POSITIONS = 32
"""Depths that are told apart."""


@dataclass(slots=True)
class DrafterCounts:
    """Of one drafter in one version."""

    watch: Watch
    drafts: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0
    alpha_sum: float = 0.0
    alpha_positions: int = 0
    """As Overlap."""
    reached: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_POSITIONS, np.int64))
    """[depth - 1] drafts that had a node there."""
    accepted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(MAX_POSITIONS, np.int64))
    """[depth - 1] drafts of which one was accepted there."""


@dataclass(slots=True)
class Counters:
    """Counted on the engine's thread."""

    by_drafter: dict[tuple[str, str], DrafterCounts] = field(default_factory=dict)
    """By name and version."""
    records: defaultdict[str, Record] = field(default_factory=lambda: defaultdict(Record))
    """By name."""
    switched_off: dict[str, str] = field(default_factory=dict)
    """Drafters that failed on this worker, and why."""
    draft_seconds: float = 0.0
    step_seconds: float = 0.0
    """Of steps in which somebody could have been drafted for."""
    verify_seconds: float = 0.0

    def count(
        self,
        drafts: DraftBatch,
        outcome: Outcome,
        shared: Overlap,
        free: NDArray[np.bool_],
        requests: Sequence[int],
    ) -> None:
        """`free` and `requests` [requests]: as for Watch; they draw freely if they are neither greedy nor bound to a
        grammar: of others every draft may be right."""
        counts = self._of(drafts)
        counts.drafts += drafts.num_requests
        counts.draft_tokens += drafts.num_nodes
        counts.accepted_tokens += len(outcome.path)
        counts.alpha_sum += shared.total
        counts.alpha_positions += shared.positions
        deepest = np.zeros(drafts.num_requests, np.int64)
        np.maximum.at(deepest, drafts.request_of, drafts.depths)
        counts.reached += _at_least(deepest)
        counts.accepted += _at_least(outcome.num_accepted)
        counts.watch.count(outcome.num_accepted > 0, free, requests)

    def doubts(self, drafter: str) -> bool:
        """Whether one of its versions may be of no use."""
        return any(counts.watch.doubts for (name, _), counts in self.by_drafter.items() if name == drafter)

    def sounded(self, drafts: DraftBatch, right: NDArray[np.bool_], requests: Sequence[int]) -> None:
        """Drafts for `requests`, some of those of `drafts`, that were not verified: whether a first token of each was
        `right` [requests]. They say how good the drafter is, and nothing of whether drafts are verified."""
        if len(right):
            self._of(drafts).watch.count(right, np.zeros(len(right), np.bool_), requests)

    def _of(self, drafts: DraftBatch) -> DrafterCounts:
        key = drafts.drafter, drafts.version
        if key not in self.by_drafter:
            name = " ".join(filter(None, ("drafter", *key)))
            self.by_drafter[key] = DrafterCounts(Watch(name, self.records[drafts.drafter]))
        return self.by_drafter[key]

    def time(self, timing: Timing) -> None:
        self.draft_seconds += timing.draft_seconds
        self.step_seconds += timing.step_seconds
        self.verify_seconds += timing.verify_seconds

    def snapshot(self) -> SpeculationCounters:
        """From any thread; what a step is about to add may be there in part."""
        return SpeculationCounters(
            drafters=[
                DrafterCounters(
                    drafter=drafter,
                    version=version,
                    drafts=counts.drafts,
                    draft_tokens=counts.draft_tokens,
                    accepted_tokens=counts.accepted_tokens,
                    alpha_sum=counts.alpha_sum,
                    alpha_positions=counts.alpha_positions,
                    drafts_per_position=np.trim_zeros(counts.reached, "b").tolist(),
                    accepted_per_position=np.trim_zeros(counts.accepted, "b").tolist(),
                    alarm=counts.watch.alarm.value,
                )
                for (drafter, version), counts in list(self.by_drafter.items())
            ],
            switched_off=list(self.switched_off),
            draft_seconds=self.draft_seconds,
            verify_seconds=self.verify_seconds,
        )


def _at_least(depths: NDArray[np.int64]) -> NDArray[np.int64]:
    """[MAX_POSITIONS] how many of the depths are 1, 2, ... or more."""
    at: NDArray[np.int64] = np.bincount(np.minimum(depths, MAX_POSITIONS), minlength=MAX_POSITIONS + 1)
    return at[::-1].cumsum()[::-1][1:]
