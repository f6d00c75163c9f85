"""Speculation inside continuous batching: the plain driver of a round, on the loop of an engine.

Each step that decodes is one round: the controller sets the budgets, drafters propose, the engine computes every tree
in the same forward, each rule judges its drafts, and everybody learns what came of it. A step whose budgets are all 0
is a plain one: no drafter and no rule is called for it.

A drafter that raises, proposes what is no tree, or takes longer than STALL_S is switched off for this worker: it is
counted, said in the log, and requests go on without it.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from core.types import TokenLogprobs
from engine.drafts import Candidate, Draft, Verdict
from engine.sampler import GREEDY_TEMPERATURE, sampling_law
from engine.schedule import Schedule
from engine.sequence import Sequence as EngineSequence
from engine.step import SamplingRow, StepBatch, StepOutput
from speculation.acceptance import Acceptance
from speculation.counters import Counters
from speculation.dice import KeyedDice
from speculation.grammars import follow_grammars
from speculation.protocols import Controller, Drafter
from speculation.rounds import Budgets, DraftRequest, Feedback, Load, Outcome, Tally, TargetRows, Timing
from speculation.rules.registry import DEFAULT_RULE, RULES, Rule
from speculation.seen import Step, observed
from speculation.tree import DraftBatch, ranges
from speculation.wishes import Wishes

logger = logging.getLogger(__name__)

T = TypeVar("T")

STALL_S = 1.0
"""No proposal, and no learning from one, is worth as long as this."""


@dataclass(frozen=True, slots=True)
class Part:
    """The drafts of a step that one drafter proposes and one rule judges."""

    drafter: str
    rule: Rule
    candidates: NDArray[np.int64]  # [requests] which of the step's
    drafts: DraftBatch
    masks: list[tuple[NDArray[np.uint32], ...] | None]
    """Per request, what its grammar allows after each row."""


@dataclass(slots=True)
class Round:
    """A step from proposal to settlement."""

    requests: list[DraftRequest]
    load: Load
    budgets: Budgets
    num_tokens: int
    """Rows of the step without drafts."""
    parts: list[Part] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0


class InBatch:
    """Implements engine.drafts.Speculator. `rules` has one for each drafter. Steps are settled in the order in which
    they were proposed for."""

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        rules: Mapping[str, Rule],
        controller: Controller,
        stats: Acceptance,
        *,
        vocab_size: int,
        max_budget: int,
    ) -> None:
        self.counters = Counters()
        self._drafters = dict(drafters)
        self._rules = dict(rules)
        self._controller = controller
        self._stats = stats
        self._vocab_size = vocab_size
        self._max_budget = max_budget
        self._keys = itertools.count()
        self._requests: dict[str, DraftRequest] = {}
        self._rounds: deque[Round] = deque()
        self.taps = tuple(sorted({tap for drafter in drafters.values() for tap in drafter.needs.taps}))
        self._always_reads_logits = any(drafter.needs.top for drafter in drafters.values())

    @property
    def reads_logits(self) -> bool:
        """For the step that was proposed for last. Which rules judge it is for its requests to say too."""
        judging = self._rounds[-1].parts if self._rounds else ()
        return self._always_reads_logits or any(part.rule.reads_laws for part in judging)

    # --- before the step -------------------------------------------------------------------------------------------

    def propose(self, candidates: Sequence[Candidate], num_other_tokens: int) -> Sequence[Draft | None] | None:
        wishes = [Wishes.of(candidate.sequence.request) for candidate in candidates]
        requests = [self._request(candidate.sequence) for candidate in candidates]
        load = Load(
            classes=[wish.kind for wish in wishes],
            context_tokens=np.array([len(request.token_ids) - 1 for request in requests]),
            limits=np.array(
                [min(c.room, w.budget(self._max_budget)) for c, w in zip(candidates, wishes, strict=True)], np.int64
            ),
            other_tokens=num_other_tokens,
        )
        budgets = self._controller.budget(load, self._stats)
        drafters = [wish.drafter or chosen for wish, chosen in zip(wishes, budgets.drafters, strict=True)]
        budgets = replace(budgets, drafters=drafters)
        round_ = Round(requests, load, budgets, num_other_tokens + len(candidates))
        self._rounds.append(round_)
        if not self._drafters or not budgets.candidates.any():
            return None
        started = time.perf_counter()
        drafts = self._draft(round_, candidates, wishes)
        round_.draft_seconds = time.perf_counter() - started
        return drafts

    def _draft(
        self, round_: Round, candidates: Sequence[Candidate], wishes: Sequence[Wishes]
    ) -> list[Draft | None] | None:
        groups: dict[tuple[str, str], list[int]] = {}
        for place, wish in enumerate(wishes):
            name = round_.budgets.drafters[place]
            if round_.budgets.candidates[place] and name in self._drafters:
                groups.setdefault((name, wish.rule or self._rule_for(name, candidates[place]).name), []).append(place)
        drafts: list[Draft | None] = [None] * len(candidates)
        for (name, rule), places in groups.items():
            part = self._propose(name, RULES[rule], np.array(places), round_, candidates)
            if part is not None and part.drafts.num_nodes:
                round_.parts.append(part)
                for index, place in enumerate(part.candidates):
                    drafts[place] = _draft_of(part, index)
        return drafts if round_.parts else None

    def _rule_for(self, drafter: str, candidate: Candidate) -> Rule:
        """Logprobs are those of the engine's own rows, so whoever wants them is verified by its tokens."""
        wanted = candidate.sequence.request.sampling.logprobs is not None
        return RULES[DEFAULT_RULE] if wanted else self._rules[drafter]

    def _propose(
        self, name: str, rule: Rule, places: NDArray[np.int64], round_: Round, candidates: Sequence[Candidate]
    ) -> Part | None:
        drafter, budgets = self._drafters[name], round_.budgets
        requests = [round_.requests[place] for place in places]

        def propose() -> DraftBatch:
            drafts = drafter.propose(requests, budgets.candidates[places], budgets.floor)
            drafts.validate(self._vocab_size)
            return drafts

        drafts = self._call(name, propose)
        if drafts is None:
            return None
        drafts = self._controller.trim(drafts, budgets, places).prune(round_.load.limits[places])
        drafts, masks = follow_grammars(drafts, [candidates[place].sequence.constraint for place in places])
        kept = np.flatnonzero(drafts.lengths)
        return Part(name, rule, places[kept], drafts.select(kept), [masks[index] for index in kept])

    # --- after it --------------------------------------------------------------------------------------------------

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:
        started = time.perf_counter()
        step = Step(schedule, batch, output)
        verdicts: list[int | Verdict] = output.token_ids[step.first_rows].tolist()
        if not step.num_candidates:
            return verdicts
        round_ = self._rounds[0]
        for part in round_.parts:
            rows = step.logit_rows_of(part.candidates)
            outcome = part.rule.verify(
                part.drafts, self._target_rows(part, round_, rows, batch, output), _dice(part, round_)
            )
            round_.outcomes.append(outcome)
            for index, place in enumerate(part.candidates):
                verdicts[step.sample_of(place)] = _verdict(part.drafts, outcome, index, step.logprobs_of(place))
        round_.verify_seconds += time.perf_counter() - started
        return verdicts

    def settle(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> None:
        step = Step(schedule, batch, output)
        started = time.perf_counter()
        round_ = self._rounds.popleft() if step.num_candidates else None
        if round_ is not None:
            for part, outcome in zip(round_.parts, round_.outcomes, strict=True):
                self._learn(part, outcome, round_, step)
        self._absorb(step, round_)
        if round_ is not None:
            round_.verify_seconds += time.perf_counter() - started
            self._record(round_, output.seconds)

    def forget(self, sequence: EngineSequence) -> None:
        request = self._requests.pop(sequence.request_id, None)
        if request is not None:
            for name in list(self._drafters):
                self._call(name, partial(self._drafters[name].finish, request.key))

    def _target_rows(
        self, part: Part, round_: Round, rows: NDArray[np.int64], batch: StepBatch, output: StepOutput
    ) -> TargetRows:
        tokens = output.token_ids[rows]
        if not part.rule.reads_laws or output.logits is None:
            return TargetRows(tokens)
        drafts = part.drafts
        warm = np.array([round_.requests[place].temperature >= GREEDY_TEMPERATURE for place in part.candidates])
        if not warm.any():
            return TargetRows(tokens)
        lengths = drafts.lengths + 1
        starts = np.where(warm, np.cumsum(np.where(warm, lengths, 0)) - lengths, -1)
        chosen = rows[ranges(drafts.root_rows[warm], lengths[warm])]
        wanted = [row for row in (batch.sampling[index] for index in chosen) if isinstance(row, SamplingRow)]
        return TargetRows(tokens, sampling_law(output.logits[chosen], wanted), starts)

    def _learn(self, part: Part, outcome: Outcome, round_: Round, step: Step) -> None:
        asked = round_.budgets.tokens[part.candidates]
        self._stats.observe(part.drafts, outcome, asked, [round_.load.classes[place] for place in part.candidates])
        self.counters.count(part.drafts, outcome, self._drawn_freely(part, round_))
        if (drafter := self._drafters.get(part.drafter)) is not None:
            requests = [round_.requests[place] for place in part.candidates]
            if any(request.key not in {known.key for known in self._requests.values()} for request in requests):
                return  # one was dropped while the step ran, and drafters have forgotten it
            seen = observed(step, drafter.needs, *step.path_rows(part.candidates, part.drafts, outcome))
            self._call(part.drafter, partial(drafter.observe, Feedback(requests, part.drafts, outcome, seen)))

    @staticmethod
    def _drawn_freely(part: Part, round_: Round) -> NDArray[np.bool_]:
        """[requests] that are neither greedy nor bound to a grammar: of others every draft may be right."""
        warm = [round_.requests[place].temperature >= GREEDY_TEMPERATURE for place in part.candidates]
        return np.array([hot and mask is None for hot, mask in zip(warm, part.masks, strict=True)], np.bool_)

    def _absorb(self, step: Step, round_: Round | None) -> None:
        """Rows that a drafter needs to know of and has not drafted."""
        for name, drafter in list(self._drafters.items()):
            if not (drafter.needs.taps or drafter.needs.top):
                continue
            own = {
                int(place)
                for part in (round_.parts if round_ else ())
                if part.drafter == name
                for place in part.candidates
            }
            rows = step.rows_beside(own, all_rows=bool(drafter.needs.taps))
            if rows is not None:
                self._call(
                    name,
                    partial(drafter.absorb, self._all(rows.sequences), observed(step, drafter.needs, *rows.places)),
                )

    def _record(self, round_: Round, step_seconds: float) -> None:
        drafted = sum(part.drafts.num_nodes for part in round_.parts)
        timing = Timing(
            batch_size=len(round_.requests),
            context_tokens=int(round_.load.context_tokens.sum()),
            batched_tokens=round_.num_tokens + drafted,
            step_seconds=step_seconds,
            draft_seconds=round_.draft_seconds,
            verify_seconds=round_.verify_seconds if round_.parts else 0.0,
        )
        self.counters.time(timing)
        tally = Tally(np.zeros(len(round_.requests), np.int64), np.ones(len(round_.requests), np.int64))
        for part, outcome in zip(round_.parts, round_.outcomes, strict=True):
            tally.drafted[part.candidates] = part.drafts.lengths
            tally.emitted[part.candidates] += outcome.num_accepted
        self._controller.record(round_.load, round_.budgets, tally, timing)

    # --- requests and drafters -------------------------------------------------------------------------------------

    def _all(self, sequences: Sequence[EngineSequence]) -> list[DraftRequest]:
        return [self._request(sequence) for sequence in sequences]

    def _request(self, sequence: EngineSequence) -> DraftRequest:
        known = self._requests.get(sequence.request_id)
        if known is not None:
            return known
        request = sequence.request
        known = self._requests[request.request_id] = DraftRequest(
            key=next(self._keys),
            token_ids=sequence.token_ids,
            num_prompt_tokens=sequence.num_prompt_tokens,
            seed=request.sampling.seed,
            temperature=request.sampling.temperature,
            scope=f"{request.cache_salt}\0{request.adapter}",
            remember=request.remember,
        )
        for name in list(self._drafters):
            self._call(name, partial(self._drafters[name].start, known))
        return known

    def _call(self, name: str, work: Callable[[], T]) -> T | None:
        """What a drafter gives, or None and no such drafter any more."""
        started = time.perf_counter()
        try:
            result = work()
        except Exception as error:  # noqa: BLE001 - a drafter may be anybody's code, and no request depends on it
            self._switch_off(name, f"it raised {type(error).__name__}: {error}", error)
            return None
        if (seconds := time.perf_counter() - started) > STALL_S:
            self._switch_off(name, f"it took {seconds:.1f} s")
        return result

    def _switch_off(self, name: str, reason: str, error: Exception | None = None) -> None:
        if self._drafters.pop(name, None) is not None:
            self.counters.switched_off[name] = reason
            logger.error("drafter %s is switched off on this worker: %s", name, reason, exc_info=error)


def _draft_of(part: Part, index: int) -> Draft:
    drafts, own = part.drafts, slice(part.drafts.offsets[index], part.drafts.offsets[index + 1])
    return Draft(drafts.tokens[own], drafts.parents[own], drafts.depths[own], part.masks[index])


def _dice(part: Part, round_: Round) -> KeyedDice:
    requests = [round_.requests[place] for place in part.candidates]
    return KeyedDice([request.seed for request in requests], [request.position for request in requests])


def _verdict(
    drafts: DraftBatch, outcome: Outcome, index: int, logprobs: Sequence[TokenLogprobs | None] | None
) -> Verdict:
    path = outcome.path[outcome.path_offsets[index] : outcome.path_offsets[index + 1]] - drafts.offsets[index]
    emitted = outcome.emitted[outcome.emitted_offsets[index] : outcome.emitted_offsets[index + 1]]
    rows = (0, *(1 + node for node in path.tolist()))
    found = None if logprobs is None else [one for row in rows if (one := logprobs[row]) is not None]
    return Verdict(emitted.tolist(), path.tolist(), found)
