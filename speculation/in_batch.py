"""Speculation inside continuous batching: the plain driver of a round, on the loop of an engine.

Each step that decodes is one round: the controller sets the budgets, drafters propose, the engine computes every tree
in the same forward, each rule judges its drafts, and everybody learns what came of it. A step whose budgets are all 0
is a plain one: no drafter and no rule is called for it.

Drafters work on a thread of their own; one that fails or stalls is switched off (crew.py), and requests go on.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray

from core.draft_state import DraftStates
from engine.drafts import Candidate, Draft, Verdict
from engine.schedule import Schedule
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput
from speculation import native
from speculation.acceptance import Acceptance
from speculation.allowance import Allowance
from speculation.counters import Counters
from speculation.crew import PATIENCE_S, Crew
from speculation.grammars import follow_grammars
from speculation.overlap import Overlap, overlap
from speculation.protocols import Controller, Drafter
from speculation.rounds import Feedback, Load, Outcome, Tally, Timing
from speculation.rules.registry import DEFAULT_RULE, RULES, Rule
from speculation.seen import Step, observed
from speculation.sounding import NO_TOKEN, TOKENS, Sounding, soundable
from speculation.tree import DraftBatch
from speculation.under_way import Part, Rest, Round
from speculation.wishes import Wishes

MOST_UNTOLD = 16
"""Steps whose hidden states are kept until drafters are told of them."""


class InBatch:
    """Implements engine.speculator.Speculator. `rules` has one for each drafter. Steps are settled in the order in
    which they were proposed for."""

    def __init__(
        self,
        drafters: Mapping[str, Drafter],
        rules: Mapping[str, Rule],
        controller: Controller,
        stats: Acceptance,
        *,
        vocab_size: int,
        max_budget: int,
        patience_s: float = PATIENCE_S,
    ) -> None:
        """`patience_s`: how long a drafter may take, at least; see crew.py. Takes as long as the C++ of this package
        takes to compile where nobody has yet, so that no drafter seems to stall meanwhile."""
        native.load()
        self.counters = Counters()
        self._crew = Crew(drafters, self.counters.switched_off, patience_s)
        self._allowance = Allowance()
        self._rules = dict(rules)
        self._controller = controller
        self._stats = stats
        self._vocab_size = vocab_size
        self._max_budget = max_budget
        self._rounds: deque[Round | None] = deque()  # None: the controller rests
        self._rest = Rest([], 0)
        self._num_rested = 0
        self._untold: list[Step] = []  # plain ones in a row of the same sequences, for who reads hidden states
        self._soon = True  # whether drafts may be asked for right after the step that was proposed for last
        self._under_way = 0  # steps
        self._wishes: dict[str, Wishes] = {}

    @property
    def lost(self) -> str | None:
        """As Crew.lost."""
        return self._crew.lost

    @property
    def taps(self) -> tuple[int, ...]:
        """For the step that was proposed for last."""
        return self._crew.taps(soon=self._soon)

    @property
    def reads_logits(self) -> bool:
        """For the step that was proposed for last. Which rules judge it is for its requests to say too, and of greedy
        ones no rule wants more than their tokens."""
        last = self._rounds[-1] if self._rounds else None
        return last is not None and any(part.rule.reads_laws and last.warm(part).any() for part in last.parts)

    @property
    def reads_top(self) -> int:
        """For any step: who drafts from the likeliest tokens learns them from plain steps too."""
        return self._crew.reads_top

    # --- before the step -------------------------------------------------------------------------------------------

    def rests(self, schedule: Schedule) -> bool:
        self._under_way += 1
        if not self._rest.covers(schedule.chunks):
            self._soon = True
            return False
        self._rest.left -= 1
        self._soon = not self._rest.left
        self._rounds.append(None)
        return True

    def propose(self, candidates: Sequence[Candidate], num_other_tokens: int) -> Sequence[Draft | None] | None:
        began = time.perf_counter()
        wishes = [self._wishes_of(candidate.sequence) for candidate in candidates]
        requests = self._crew.requests([candidate.sequence for candidate in candidates])
        load = Load(
            classes=[wish.kind for wish in wishes],
            context_tokens=np.array([len(request.token_ids) - 1 for request in requests]),
            limits=np.array(
                [min(c.room, w.budget(self._max_budget)) for c, w in zip(candidates, wishes, strict=True)], np.int64
            ),
            other_tokens=num_other_tokens,
            wishes=[wish.drafter for wish in wishes],
        )
        budgets = self._controller.budget(load, self._stats)
        round_ = Round(requests, load, budgets, num_other_tokens + len(candidates), began, alone=self._under_way == 1)
        self._rounds.append(round_)
        self._rest = Rest([c.sequence.request_id for c in candidates] if budgets.rest else [], budgets.rest)
        self._soon = not budgets.rest or num_other_tokens > 0  # a prompt's last row may be handed over
        started = time.perf_counter()
        if not self._crew or not budgets.candidates.any():
            round_.began = started
            return None
        drafts = self._draft(round_, candidates, wishes)
        round_.draft_seconds = time.perf_counter() - started
        return drafts

    def _wishes_of(self, sequence: EngineSequence) -> Wishes:
        wishes = self._wishes.get(sequence.request_id)
        if wishes is None:
            wishes = self._wishes[sequence.request_id] = Wishes.of(sequence.request)
        return wishes

    def _draft(
        self, round_: Round, candidates: Sequence[Candidate], wishes: Sequence[Wishes]
    ) -> list[Draft | None] | None:
        self._tell_untold()
        groups: dict[tuple[str, str], list[int]] = {}
        for place, wish in enumerate(wishes):
            name = round_.budgets.drafters[place]
            if round_.budgets.candidates[place] and name in self._crew:
                groups.setdefault((name, wish.rule or self._rule_for(name, candidates[place]).name), []).append(place)
        drafts: list[Draft | None] = [None] * len(candidates)
        for (name, rule), places in groups.items():
            if name not in self._crew:  # what it was asked for by another rule was too much for it
                continue
            part = self._propose(name, RULES[rule], np.array(places), round_, candidates)
            if part is not None and part.drafts.num_nodes:
                round_.parts.append(part)
                for index, place in enumerate(part.candidates):
                    drafts[place] = part.draft(index)
        for name in {name for name, _ in groups}:
            self._sound(name, round_, candidates)
        return drafts if round_.parts else None

    def _sound(self, name: str, round_: Round, candidates: Sequence[Candidate]) -> None:
        """Also ask who may be of no use about requests of the step that nobody tries."""
        if name not in self._crew or not self.counters.doubts(name):
            return
        budgets = round_.budgets
        places = soundable(self._crew[name].needs, round_.load, budgets.candidates, candidates)
        places = np.array([place for place in places if budgets.drafters[place] == name], np.int64)
        if len(places) and (drafts := self._ask(name, round_, places, np.full(len(places), TOKENS), 0.0)) is not None:
            round_.soundings.append(Sounding(places, drafts))

    def _rule_for(self, drafter: str, candidate: Candidate) -> Rule:
        """Logprobs are those of the engine's own rows, so whoever wants them is verified by its tokens."""
        wanted = candidate.sequence.request.sampling.logprobs is not None
        return RULES[DEFAULT_RULE] if wanted else self._rules[drafter]

    def _propose(
        self, name: str, rule: Rule, places: NDArray[np.int64], round_: Round, candidates: Sequence[Candidate]
    ) -> Part | None:
        budgets = round_.budgets
        drafts = self._ask(name, round_, places, budgets.candidates[places], budgets.floor)
        if drafts is None:
            return None
        drafts = self._controller.trim(drafts, budgets, places).prune(round_.load.limits[places])
        drafts, masks = follow_grammars(drafts, [candidates[place].sequence.constraint for place in places])
        kept = np.flatnonzero(drafts.lengths)
        if len(kept) < drafts.num_requests:
            drafts, places, masks = drafts.select(kept), places[kept], [masks[index] for index in kept]
        return Part(name, rule, places, drafts, masks)

    def _ask(
        self, name: str, round_: Round, places: NDArray[np.int64], budgets: NDArray[np.int64], floor: float
    ) -> DraftBatch | None:
        """What the drafter proposes for these requests of the step, or None and no such drafter any more."""
        drafter, requests = self._crew[name], [round_.requests[place] for place in places]

        def propose() -> DraftBatch:
            drafts = drafter.propose(requests, budgets, floor)
            drafts.validate(self._vocab_size, len(requests), drafter.law)
            return drafts

        return self._crew.call(name, propose)

    # --- after it --------------------------------------------------------------------------------------------------

    def judge(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> list[int | Verdict]:
        started = time.perf_counter()
        step = Step(schedule, batch, output)
        verdicts: list[int | Verdict] = output.token_ids[step.first_rows].tolist()
        round_ = self._rounds[0]
        assert round_ is not None, "there are drafts in the step"
        for part in round_.parts:
            warm = round_.warm(part)
            target = part.target_rows(warm, step.logit_rows_of(part.candidates), batch, output)
            outcome = part.rule.verify(part.drafts, target, round_.dice(part))
            round_.outcomes.append(outcome)
            round_.overlaps.append(overlap(part.drafts, target, outcome, ~warm))
            for index, place in enumerate(part.candidates):
                verdicts[step.sample_of(place)] = part.verdict(outcome, index, step.logprobs_of(place))
        round_.verify_seconds += time.perf_counter() - started
        return verdicts

    def settle(self, schedule: Schedule, batch: StepBatch, output: StepOutput) -> None:
        started = time.perf_counter()
        self._under_way -= 1
        num_decodes = sum(chunk.decodes for chunk in schedule.chunks)
        round_ = self._rounds.popleft() if num_decodes else None
        drafted = False
        if round_ is not None:
            drafted = bool(round_.parts)
            for part, outcome, shared in zip(round_.parts, round_.outcomes, round_.overlaps, strict=True):
                self._count(part, outcome, shared, round_)
            for sounding in round_.soundings:
                self._count_sounding(sounding, round_)
        plain = num_decodes == len(schedule.chunks) and not drafted
        if learners := list(self._crew) if drafted else self._readers(output, plain=plain):
            step = Step(schedule, batch, output)
            if plain:
                learners = self._tell_later(learners, step)
            else:
                self._tell_untold()
            self._teach(learners, step, round_, plain=plain)
        self._allowance.earn(output.seconds)
        self._crew.step_took(output.seconds)
        if round_ is not None:
            round_.verify_seconds += time.perf_counter() - started
            self._record(round_, output.seconds)
        elif num_decodes:
            self._num_rested += 1
            self.counters.step_seconds += output.seconds

    def forget(self, sequence: EngineSequence) -> None:
        self._tell_untold()
        self._wishes.pop(sequence.request_id, None)
        self._crew.forget(sequence)

    def pack(self, sequence: EngineSequence) -> DraftStates:
        return self._crew.pack(sequence)

    def unpack(self, sequence: EngineSequence, states: DraftStates) -> None:
        self._crew.unpack(sequence, states)

    def _count(self, part: Part, outcome: Outcome, shared: Overlap, round_: Round) -> None:
        asked = round_.budgets.tokens[part.candidates]
        self._stats.observe(part.drafts, outcome, asked, [round_.load.classes[place] for place in part.candidates])
        keys = [request.key for request in round_.asked(part)]
        free = round_.warm(part) & np.array([mask is None for mask in part.masks])
        self.counters.count(part.drafts, outcome, shared, free, keys)

    def _count_sounding(self, sounding: Sounding, round_: Round) -> None:
        """Of requests that have got a token."""
        requests = [round_.requests[place] for place in sounding.places]
        firsts = (round_.load.context_tokens[sounding.places] + 1).tolist()
        said = [request.token_ids[first : first + 1] for request, first in zip(requests, firsts, strict=True)]
        emitted = np.array([tokens[0] if tokens else NO_TOKEN for tokens in said], np.int64)
        kept = np.flatnonzero((emitted != NO_TOKEN) & (sounding.drafts.lengths > 0))
        keys = [requests[index].key for index in kept]
        self.counters.sounded(sounding.drafts, sounding.right(emitted)[kept], keys)

    def _readers(self, output: StepOutput, *, plain: bool) -> list[str]:
        """Drafters that want to see rows that nobody drafted for; of plain steps, those that need not see every row do
        as far as the allowance goes, and who wants hidden states does where they were asked for."""
        spared = plain and not self._allowance.left
        wants = ((name, self._crew[name].needs) for name in self._crew)
        return [
            name
            for name, needs in wants
            if (output.taps.keys() >= set(needs.taps) if needs.taps else needs.top and not spared)
        ]

    def _tell_later(self, learners: Sequence[str], step: Step) -> list[str]:
        """Those who are told of a plain step at once; the others are before they draft, together with what follows,
        which takes a fraction of the time of telling them of each."""
        now = [name for name in learners if not self._crew[name].needs.can_wait]
        if len(now) < len(learners):
            if len(self._untold) == MOST_UNTOLD or (self._untold and self._untold[0].sequences != step.sequences):
                self._tell_untold()
            self._untold.append(step)
        return now

    def _tell_untold(self) -> None:
        """Of plain steps that were kept, those who can wait."""
        steps, self._untold = self._untold, []
        for name in self._crew if steps else ():
            needs = self._crew[name].needs
            if needs.can_wait and (seen := [step for step in steps if step.output.taps.keys() >= set(needs.taps)]):
                self._crew.call(name, self._crew.absorbing_all(name, seen))

    def _teach(self, names: Sequence[str], step: Step, round_: Round | None, *, plain: bool) -> None:
        for name in names:
            if name not in self._crew:  # what another was told was too much for it
                continue
            started, allowed = time.perf_counter(), plain and not self._crew[name].needs.taps
            if lessons := self._lessons(name, step, round_):
                self._crew.call(name, partial(_tell, lessons))
            if allowed:
                self._allowance.spend(time.perf_counter() - started)

    def _lessons(self, name: str, step: Step, round_: Round | None) -> list[Callable[[], None]]:
        """What the drafter is to be told of a step: what came of its drafts, and of other rows what it wants to see."""
        drafter, own = self._crew[name], set[int]()
        lessons: list[Callable[[], None]] = []
        for part, outcome in zip(round_.parts, round_.outcomes, strict=True) if round_ is not None else ():
            if part.drafter != name:
                continue
            own.update(part.candidates.tolist())
            requests = round_.asked(part) if round_ is not None else []
            seen = observed(step, drafter.needs, *step.path_rows(part.candidates, part.drafts, outcome))
            lessons.append(partial(drafter.observe, Feedback(requests, part.drafts, outcome, seen)))
        if (absorbing := self._crew.absorbing(name, step, own)) is not None:
            lessons.append(absorbing)
        return lessons

    def _record(self, round_: Round, step_seconds: float) -> None:
        """What the engine does around the step counts with it, where no other step was computed meanwhile: there is
        more of it where drafts are attached and judged."""
        if round_.alone:
            step_seconds = time.perf_counter() - round_.began - round_.draft_seconds - round_.verify_seconds
        drafted = sum(part.drafts.num_nodes for part in round_.parts)
        timing = Timing(
            batch_size=len(round_.requests),
            context_tokens=int(round_.load.context_tokens.sum()),
            batched_tokens=round_.num_tokens + drafted,
            step_seconds=step_seconds,
            draft_seconds=round_.draft_seconds,
            verify_seconds=round_.verify_seconds if round_.parts else 0.0,
            rested=self._num_rested,
        )
        self._num_rested = 0
        self.counters.time(timing)
        tally = Tally(np.zeros(len(round_.requests), np.int64), np.ones(len(round_.requests), np.int64))
        for part, outcome in zip(round_.parts, round_.outcomes, strict=True):
            tally.drafted[part.candidates] = part.drafts.lengths
            tally.emitted[part.candidates] += outcome.num_accepted
        self._controller.record(round_.load, round_.budgets, tally, timing)


def _tell(lessons: Sequence[Callable[[], None]]) -> None:
    for lesson in lessons:
        lesson()
