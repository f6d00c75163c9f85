"""What drafters are shown of the steps of an engine, also of those that rest, and what controllers are told of them."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.types import SamplingParams
from engine.batching import build_batch
from engine.drafts import Candidate
from engine.runner import ModelRunner
from engine.schedule import Chunk, Schedule
from engine.step import StepBatch, StepOutput
from speculation.acceptance import Acceptance
from speculation.in_batch import InBatch
from speculation.rounds import Budgets, Load, Needs, Tally, Timing
from tests.engine import test_reproducible as reproducible
from tests.engine.driver import tokens
from tests.engine.late import LateRunner
from tests.speculation.prompting import BUDGET, ENGINES, Moods, Prompter, Reader, Rests, in_batch, outputs


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


# --- what drafters are shown ------------------------------------------------------------------------------------------


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


# --- what controllers are told ----------------------------------------------------------------------------------------


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
