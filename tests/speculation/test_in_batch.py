"""Speculation in the batch of an engine: the output is what it would have been without."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from core.types import SamplingParams, SpeculationWish
from engine.batching import build_batch
from engine.drafts import Candidate
from engine.runner import ModelRunner
from engine.schedule import Chunk, Schedule
from engine.sequence import Sequence as EngineSequence
from engine.step import StepBatch, StepOutput
from speculation.acceptance import Acceptance
from speculation.controllers.base import BaseController, Limits, plain_step
from speculation.controllers.registry import make_controller
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.protocols import Controller
from speculation.rounds import Budgets, DraftRequest, Feedback, Load, Needs, Observed, Tally, Timing
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch, offsets_of
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import TINY, tokens
from tests.engine.late import LateRunner, Output, check_same, engine_over

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


class Clock(Moods):
    def __init__(self) -> None:
        super().__init__()
        self.timings: list[Timing] = []

    def record(self, load: Load, budgets: Budgets, tally: Tally, timing: Timing) -> None:
        self.timings.append(timing)


class Boasting(LateRunner):
    """Says of its steps that they took no time."""

    def submit(self, batch: StepBatch) -> Future[StepOutput]:
        future = super().submit(batch)
        said: Future[StepOutput] = Future()
        future.add_done_callback(lambda done: said.set_result(replace(done.result(), seconds=0.0)))
        return said


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


@pytest.fixture(scope="module")
def model(make_checkpoint: Callable[..., Path]) -> ModelRunner:
    return ModelRunner.load(make_checkpoint(), dtype="float32", device="cpu", num_blocks=64, block_size=8)


def outputs(
    runner: LateRunner, jobs: list[reproducible.Job], *, num_blocks: int, step_tokens: int, speculator: InBatch | None
) -> list[Output]:
    with engine_over(runner, num_blocks=num_blocks, step_tokens=step_tokens, speculator=speculator) as harness:
        found = harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)])
        assert harness.blocks.num_free == num_blocks
    return found


# The same examples every run: at a tie of two logits within float32 rounding a nucleus may end on either side.
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    jobs=st.lists(reproducible.jobs, min_size=1, max_size=8),
    **ENGINES,
)
def test_outputs_are_what_they_are_without_it(
    model: ModelRunner, jobs: list[reproducible.Job], step_tokens: int, spare: int, depth: int, seed: int
) -> None:
    """Greedy and drawn, with penalties, logprobs, stop tokens, priorities, shared prefixes and too few blocks."""
    wanted = outputs(LateRunner(model, 1), jobs, num_blocks=64, step_tokens=64, speculator=None)
    drafter = Prompter(seed=seed)
    for job, output in zip(jobs, wanted, strict=True):
        drafter.outputs[tuple(tokens(job.prompt, seed=job.prompt))] = output.token_ids
    speculator = in_batch(drafter)
    found = outputs(
        LateRunner(model, depth), jobs, num_blocks=11 + spare, step_tokens=step_tokens, speculator=speculator
    )
    for ours, theirs in zip(found, wanted, strict=True):
        check_same(ours, theirs)
    assert not drafter.alive
    assert not speculator.counters.switched_off


def test_right_drafts_save_steps_and_are_counted(model: ModelRunner) -> None:
    job = reproducible.Job(20, SamplingParams(max_tokens=40, temperature=0.0))
    (wanted,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=None)
    drafter = Prompter()
    drafter.outputs[tuple(tokens(20, seed=20))] = wanted.token_ids
    speculator = in_batch(drafter)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        (found,) = harness.outputs([job.sequence("a")])
        steps = harness.engine.stats.steps
    assert found.token_ids == wanted.token_ids
    (counts,) = speculator.counters.by_drafter.values()
    assert steps + counts.accepted_tokens == 40
    assert counts.accepted_tokens == sum(len(round_.outcome.path) for round_ in drafter.seen) > 10
    assert counts.accepted.sum() == counts.accepted_tokens
    assert counts.draft_tokens >= counts.reached.sum() > counts.accepted_tokens


def test_a_request_is_drafted_for_by_the_one_that_it_asked_for(model: ModelRunner) -> None:
    first, other = Prompter(), Prompter()
    other.name = "other"  # type: ignore[misc]
    drafters = {first.name: first, other.name: other}
    speculator = InBatch(
        drafters,
        dict.fromkeys(drafters, RULES["sampled"]),
        make_controller("fixed", Limits(BUDGET, tuple(drafters))),
        Acceptance(BUDGET),
        vocab_size=VOCAB,
        max_budget=BUDGET,
    )
    job = reproducible.Job(20, SamplingParams(max_tokens=20, temperature=0.0)).sequence("r")
    asked = msgspec.structs.replace(job.request, speculation=SpeculationWish(drafter="other"))
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        harness.outputs([EngineSequence(asked)])
    assert not first.seen
    assert other.seen
    assert {name for name, _ in speculator.counters.by_drafter} == {"other"}


def test_what_a_drafter_is_shown_is_what_the_model_says_of_its_tokens(model: ModelRunner) -> None:
    """Hidden states and likeliest tokens of root and path are those of a plain pass over the same tokens."""
    job = reproducible.Job(12, SamplingParams(max_tokens=30, temperature=0.0))
    (wanted,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=None)
    drafter = Prompter(Needs(taps=(1,), top=3))
    drafter.outputs[tuple(tokens(12, seed=12))] = wanted.token_ids
    speculator = in_batch(drafter)
    outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=speculator)
    text = [*tokens(12, seed=12), *wanted.token_ids]
    assert any(len(round_.observed.indices) > 2 for round_ in drafter.seen)
    for round_ in drafter.seen:
        seen = round_.observed
        assert seen.top_ids is not None
        assert seen.taps[1].shape[0] == len(seen.indices)
        assert seen.top_ids[:, 0].tolist() == [text[index + 1] for index in seen.indices]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    jobs=st.lists(reproducible.jobs, min_size=1, max_size=5),
    **ENGINES,
)
def test_who_reads_all_rows_is_shown_each_in_its_order_and_in_time(
    model: ModelRunner, jobs: list[reproducible.Job], step_tokens: int, spare: int, depth: int, seed: int
) -> None:
    """Through rests, preemptions and batches that change, while other steps are under way."""
    drafter = Reader(Needs(taps=(1,)), seed=seed)
    speculator = in_batch(drafter, controller=Moods(seed=seed, longest_rest=20))
    outputs(LateRunner(model, depth), jobs, num_blocks=11 + spare, step_tokens=step_tokens, speculator=speculator)
    assert not speculator.counters.switched_off
    assert drafter.ready == drafter.asked
    following: dict[int, int] = {}
    for key, index, _ in drafter.rows():
        assert index <= following.get(key, index)  # a sequence that was preempted is computed again
        following[key] = max(following.get(key, 0), index + 1)


class Hand:
    """Takes steps of a speculator by hand, each of some sequences that decode."""

    def __init__(self, speculator: InBatch) -> None:
        self._speculator = speculator
        self._sequences = {
            name: reproducible.Job(20, SamplingParams(max_tokens=90, temperature=0.0)).sequence(name) for name in "ab"
        }
        for sequence in self._sequences.values():
            sequence.block_table.extend(range(8))
        self._asked: dict[int, tuple[int, ...]] = {}

    def begin(self, names: str) -> Schedule:
        sequences = [self._sequences[name] for name in names]
        chunks = [Chunk(one, start=len(one.token_ids) - 1, num_tokens=1, samples=True) for one in sequences]
        schedule = Schedule(16, chunks, num_tokens=len(chunks))
        if not self._speculator.rests(schedule):
            self._speculator.propose([Candidate(one, BUDGET) for one in sequences], 0)
        for one in sequences:
            one.token_ids.append(1)
        self._asked[id(schedule)] = self._speculator.taps
        return schedule

    def end(self, schedule: Schedule) -> None:
        hidden = torch.tensor([[float(chunk.start)] for chunk in schedule.chunks])
        count = len(schedule.chunks)
        batch = build_batch(schedule)
        taps = {1: hidden} if self._asked.pop(id(schedule)) else {}
        self._speculator.settle(schedule, batch, StepOutput(np.ones(count, np.int64), taps=taps))

    def forget(self, name: str) -> None:
        self._speculator.forget(self._sequences[name])


class AsksForTwo(Rests):
    """For drafts of a batch of two, and else to be left alone."""

    def budget(self, load: Load, stats: Acceptance) -> Budgets:
        budgets = super().budget(load, stats)
        asked = np.full(2, BUDGET)
        return budgets if len(load.classes) < 2 else Budgets(asked, asked, budgets.drafters)


@pytest.mark.parametrize("needs", [Needs(taps=(1,)), Needs(taps=(1,), only_latest=True)])
def test_who_reads_hidden_states_is_told_of_plain_steps_before_it_drafts(needs: Needs) -> None:
    drafter = Reader(needs)
    hand = Hand(in_batch(drafter, controller=AsksForTwo(1)))
    for names in ("a", "a", "a", "a"):
        hand.end(hand.begin(names))
    assert not drafter.absorbed
    hand.begin("ab")
    assert [index for _, index, _ in drafter.rows()] == ([22] if needs.only_latest else [19, 20, 21, 22])
    assert (drafter.asked, drafter.ready) == (2, 1)  # of the other nothing was computed here


def test_steps_that_are_settled_after_others_were_begun_are_told_of_in_their_order() -> None:
    drafter = Reader(Needs(taps=(1,)))
    hand = Hand(in_batch(drafter, controller=Rests(100)))
    hand.end(hand.begin("a"))
    resting = hand.begin("a")
    both = hand.begin("ab")
    for schedule in (resting, both):
        hand.end(schedule)
    hand.forget("a")
    told = [(key, index, int(state)) for key, index, state in drafter.rows()]
    assert told == [(0, 19, 19), (0, 20, 20), (0, 21, 21), (1, 19, 19)]


@pytest.mark.parametrize("needs", [Needs(taps=(1,)), Needs(taps=(1,), only_latest=True)])
def test_hidden_states_of_plain_steps_are_read_at_once_or_not_at_all(model: ModelRunner, needs: Needs) -> None:
    jobs = [reproducible.Job(20 + more, SamplingParams(max_tokens=23, temperature=0.0)) for more in (0, 3)]
    every, drafter = Reader(Needs(taps=(1,), top=1)), Reader(needs)
    for one in (every, drafter):
        speculator = in_batch(one, controller=Rests(4))
        outputs(LateRunner(model, 1), jobs, num_blocks=64, step_tokens=64, speculator=speculator)
    states = {(key, index): state for key, index, state in every.rows()}
    shown = [index for key, index, state in drafter.rows() if key == 0 and torch.equal(state, states[key, index])]
    steps = [requests for requests, _ in drafter.absorbed]
    if needs.only_latest:  # of the prompt, and of the last step after which drafts could have been asked for
        assert shown == [19, 39]
        assert len(steps) == 2
    else:
        assert shown == list(range(42))
        assert len(steps) == 1 + 2  # prompts, 16 steps, and 6


def test_what_the_engine_does_around_a_step_counts_with_it(model: ModelRunner) -> None:
    """Unless others are computed meanwhile."""
    jobs = [reproducible.Job(20, SamplingParams(max_tokens=20, temperature=0.0)) for _ in range(2)]
    told = []
    for depth in (1, 2):
        clock = Clock()
        outputs(
            Boasting(model, depth),
            jobs,
            num_blocks=64,
            step_tokens=64,
            speculator=in_batch(Prompter(), controller=clock),
        )
        told.append([timing.step_seconds for timing in clock.timings])
    assert min(told[0]) > 0.0
    assert min(told[1]) == 0.0


def test_a_controller_that_rests_is_asked_again_when_its_steps_are_over(model: ModelRunner) -> None:
    job, controller = reproducible.Job(20, SamplingParams(max_tokens=23, temperature=0.0)), Rests(4)
    speculator = in_batch(Prompter(), controller=controller)
    outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=speculator)
    assert controller.rested == [0, 4, 4, 4, 4]  # 22 steps decode, and the last one rests


def test_or_when_other_requests_are_decoded_or_a_prompt_beside_them() -> None:
    controller = Rests(100)
    speculator = in_batch(Prompter(), controller=controller)
    job = reproducible.Job(20, SamplingParams(max_tokens=23, temperature=0.0))
    a, b = (Chunk(job.sequence(name), start=20, num_tokens=1, samples=True) for name in "ab")
    prompt = Chunk(job.sequence("c"), start=0, num_tokens=5, samples=False)
    for chunks in ([a], [a], [a, b], [a, b], [b], [b, prompt], [b]):
        if not speculator.rests(Schedule(16, chunks)):
            candidates = [Candidate(chunk.sequence, BUDGET) for chunk in chunks if chunk.decodes]
            assert speculator.propose(candidates, 5 if prompt in chunks else 0) is None
    assert controller.asked == [1, 2, 1, 1]


class Broken(Prompter):
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        if len(self.seen) > 3:
            raise RuntimeError("no more ideas")
        return super().propose(requests, budgets, floor)


class Lying(Prompter):
    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        return DraftBatch.of_chains([[VOCAB + 1] for _ in requests], self.law, self.name)


@pytest.mark.parametrize(("drafter", "reason"), [(Broken(), "no more ideas"), (Lying(), "not in a vocabulary")])
def test_a_drafter_that_fails_is_switched_off_and_requests_go_on(
    model: ModelRunner, drafter: Prompter, reason: str
) -> None:
    job = reproducible.Job(20, SamplingParams(max_tokens=60, temperature=0.0))
    (wanted,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=None)
    drafter.outputs[tuple(tokens(20, seed=20))] = wanted.token_ids
    speculator = in_batch(drafter)
    (found,) = outputs(LateRunner(model, 1), [job], num_blocks=64, step_tokens=64, speculator=speculator)
    assert found.token_ids == wanted.token_ids
    assert reason in speculator.counters.switched_off["prompter"]
