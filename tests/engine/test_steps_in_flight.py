"""The step scheduler with several steps out: who is in which, and what they may not do to each other."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import ceil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.errors import InvalidRequest
from engine.block_manager import BlockManager
from engine.schedule import Schedule
from engine.scheduler import Scheduler, SchedulerConfig
from engine.sequence import Sequence, Status
from tests.engine.scheduler_world import EVENTS, Histories, World, play
from tests.engine.scheduling import Job, Tally, age, make, most_steps
from tests.engine.test_preemption import jobs as any_job

DEPTHS = [1, 2, 3]


def config(
    depth: int, *, seqs: int = 32, step_tokens: int = 4096, model_len: int = 8192, min_decodes: int = 1
) -> SchedulerConfig:
    return SchedulerConfig(
        max_num_seqs=seqs,
        max_num_batched_tokens=step_tokens,
        max_model_len=model_len,
        max_steps_in_flight=depth,
        min_decodes_per_step=min_decodes,
    )


class Pipeline(Tally):
    """Keeps as many steps out as there may be."""

    def __init__(self, config: SchedulerConfig, num_blocks: int = 4000, block_size: int = 16) -> None:
        super().__init__(Scheduler(config, BlockManager(num_blocks, block_size)))
        self.out: list[Schedule] = []

    def fill(self) -> None:
        while len(self.out) < self.scheduler.config.max_steps_in_flight:
            schedule = self.schedule()
            if schedule.chunks:
                self.out.append(schedule)
            elif not schedule.granted:
                return

    def turn(self) -> None:
        """Fill up, and take in the oldest."""
        self.fill()
        if self.out:
            self.update(self.out.pop(0))


def names(schedule: Schedule) -> list[str]:
    return [chunk.sequence.request_id for chunk in schedule.chunks]


# --- who is in which step --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_decoding_sequences_are_spread_evenly_over_the_steps(depth: int, count: int) -> None:
    """Also those whose prompts were all in one step, or came while another was out."""
    pipeline = Pipeline(config(depth))
    for index in range(count):
        pipeline.scheduler.add(make(str(index), 3, max_tokens=500))
    for _ in range(3 * depth):
        pipeline.turn()
    pipeline.fill()
    sizes = [len(schedule.chunks) for schedule in pipeline.out]
    assert sum(sizes) == count
    assert max(sizes) == ceil(count / depth)


def test_uneven_steps_even_out() -> None:
    scheduler = Scheduler(config(2), BlockManager(100, 16))
    for name in "abcdef":
        scheduler.reserve(make(name, 15, max_tokens=50))
    scheduler.schedule()
    scheduler.join("f", [7])
    small = scheduler.schedule()
    for name in "abcde":
        scheduler.join(name, [7])
    assert names(small) == ["f"]
    large = scheduler.schedule()
    assert names(large) == ["a", "b", "c"]  # three of the six that run
    scheduler.update(small, [7])
    assert names(scheduler.schedule()) == ["d", "e", "f"]


def test_a_burst_of_prompts_is_shared_out_by_tokens() -> None:
    pipeline = Pipeline(config(2))
    for index, prompt in enumerate([600, 100, 200, 300, 400]):
        pipeline.scheduler.add(make(str(index), prompt))
    pipeline.fill()
    assert [names(schedule) for schedule in pipeline.out] == [["0", "1", "2"], ["3", "4"]]


def test_a_prompt_that_fits_a_step_is_not_cut() -> None:
    """Its pieces could not overlap: each needs the KV of the one before."""
    pipeline = Pipeline(config(2))
    pipeline.scheduler.add(make("a", 3000))
    pipeline.fill()
    assert [(chunk.start, chunk.num_tokens) for step in pipeline.out for chunk in step.chunks] == [(0, 3000)]


def test_two_long_prompts_take_turns_each_in_a_stage() -> None:
    pipeline = Pipeline(config(2, step_tokens=40))
    for name in "ab":
        pipeline.scheduler.add(make(name, 200))
    seen = []
    for _ in range(3):
        pipeline.fill()
        seen.append([names(schedule) for schedule in pipeline.out])
        pipeline.turn()
    assert seen == [[["a"], ["b"]], [["b"], ["a"]], [["a"], ["b"]]]


# --- steps that are worth it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "sizes"), [(7, [7]), (15, [15]), (16, [8, 8]), (23, [12, 11]), (30, [10, 10, 10])])
def test_few_sequences_decode_in_as_few_steps(count: int, sizes: list[int]) -> None:
    pipeline = Pipeline(config(3, min_decodes=8))
    for index in range(count):
        pipeline.scheduler.add(make(str(index), 3, max_tokens=500))
    for _ in range(9):
        pipeline.turn()
    pipeline.fill()
    assert sorted([len(schedule.chunks) for schedule in pipeline.out], reverse=True) == sizes


def test_a_prompt_has_a_step_of_its_own_and_its_sequence_then_joins_the_others() -> None:
    pipeline = Pipeline(config(2, min_decodes=8))
    for name in "abc":
        pipeline.scheduler.reserve(make(name, 3, max_tokens=500))
    pipeline.fill()
    assert [names(schedule) for schedule in pipeline.out] == [["a", "b", "c"]]
    pipeline.scheduler.add(make("new", 50, max_tokens=500))
    seen = []
    for _ in range(4):
        pipeline.fill()
        seen.append([names(schedule) for schedule in pipeline.out])
        pipeline.turn()
    together = ["a", "b", "c", "new"]
    assert seen == [[["a", "b", "c"], ["new"]], [["new"], ["a", "b", "c"]], [["a", "b", "c"]], [together]]


@settings(max_examples=150, deadline=None)
@given(
    depth=st.integers(2, 4),
    arrivals=st.lists(st.tuples(st.integers(1, 50), st.integers(0, 3)), min_size=1, max_size=24),
    step_tokens=st.integers(32, 200),
    min_decodes=st.sampled_from([1, 3, 8]),
)
def test_nobody_who_could_run_is_left_out_of_as_many_steps_as_are_in_flight(
    depth: int, arrivals: list[tuple[int, int]], step_tokens: int, min_decodes: int
) -> None:
    """Once nobody comes or goes any more, whatever the steps were when that began."""
    pipeline = Pipeline(config(depth, step_tokens=step_tokens, min_decodes=min_decodes))
    scheduler = pipeline.scheduler
    for index, (prompt, turns) in enumerate(arrivals):
        scheduler.add(make(str(index), prompt, max_tokens=5000))
        for _ in range(turns):
            pipeline.turn()
    while len(scheduler._waiting) or any(s.num_pending_tokens > 1 for s in scheduler._running):
        pipeline.turn()
    sequences = list(scheduler._running)
    steps = max(1, min(depth, len(sequences) // min_decodes))
    passed: Counter[Sequence] = Counter()
    for turn in range(6 * depth):
        pipeline.fill()
        for sequence in sequences:
            passed[sequence] = 0 if sequence.in_flight else passed[sequence] + 1
            assert passed[sequence] < depth
        if turn > 2 * depth:
            assert all(sequence.in_flight for sequence in sequences)
            assert max(len(schedule.chunks) for schedule in pipeline.out) == ceil(len(sequences) / steps)
        pipeline.turn()


# --- blocks ----------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    depth=st.integers(2, 3),
    jobs=st.lists(any_job, min_size=2, max_size=24),
    spare=st.integers(0, 6),
    step_tokens=st.integers(8, 40),
    min_decodes=st.sampled_from([1, 3]),
)
def test_whatever_comes_into_too_few_blocks_ends_once_within_a_bound(
    depth: int, jobs: list[Job], spare: int, step_tokens: int, min_decodes: int
) -> None:
    """The first in order may find all whose blocks it could take in flight, and wait for the next step to end. Steps
    are made one by one, so it is in one of any 2 * depth."""
    num_blocks = max(ceil((job.prompt + job.output + 1) / 8) for job in jobs) + spare
    limits = config(depth, seqs=8, step_tokens=step_tokens, model_len=512, min_decodes=min_decodes)
    pipeline = Pipeline(limits, num_blocks, block_size=8)
    for index, job in enumerate(jobs):
        for _ in range(job.after):
            pipeline.turn()
        sequence = job.sequence(index)
        (pipeline.scheduler.reserve if job.role == "reserve" else pipeline.scheduler.add)(sequence)
    limit = 2 * depth * most_steps(jobs, pipeline.scheduler.config)
    turns = 0
    while pipeline.scheduler.has_work:
        pipeline.turn()
        turns += 1
        assert turns <= limit, "no end in sight"
    assert pipeline.ends == {str(index): 1 for index in range(len(jobs))}
    wanted = [1 if job.role == "hold" else job.output + (job.role == "reserve") for job in jobs]
    assert [pipeline.tokens[str(index)] for index in range(len(jobs))] == wanted
    assert pipeline.scheduler.blocks.num_free == num_blocks


class PipelineWorld(World):
    """Over a device that works on several steps at a time."""

    def drain(self) -> None:
        """The first in order is in one of the next few steps, whatever has happened."""
        depth = self.scheduler.config.max_steps_in_flight
        idle: Counter[Sequence] = Counter()
        for _ in range(5000):
            for sequence in self.having(Status.HELD):
                self.release(sequence)
            for sequence in self.having(Status.RESERVED):
                self.join(sequence)
            granted = self.fill(depth)
            if not self.in_flight:
                if not granted and not self.scheduler.has_work and not self.having(Status.HELD):
                    break
                continue
            oldest = min(self.having(Status.RUNNING), key=age, default=None)
            if oldest is not None and not granted and not self.opened:
                idle[oldest] = 0 if oldest.in_flight else idle[oldest] + 1
                assert idle[oldest] <= depth, f"{oldest.request_id} is passed over"
            self.update(5)
            self.check()
        assert self.ended == set(self.sequences)
        assert self.scheduler.blocks.num_free == self.scheduler.blocks.num_blocks

    def fill(self, depth: int) -> bool:
        granted = False
        while len(self.in_flight) < depth:
            schedule = self.schedule()
            granted |= bool(schedule.granted)
            if not schedule.chunks:
                break
        return granted


@pytest.mark.parametrize("opening", EVENTS[:3])
def test_every_short_history_with_two_steps_out_keeps_the_laws_and_drains(opening: str) -> None:
    """All histories of four events after a sequence has come and a step was scheduled. The world runs a step as late as
    it may, and finds KV that another sequence has overwritten or that was published before it was written."""
    for events in product(EVENTS, repeat=4):
        world = PipelineWorld(num_blocks=5, block_size=8, config=config(2, seqs=2, step_tokens=16, model_len=64))
        for number, event in enumerate([opening, "schedule", *events]):
            play(world, event, number)
            world.check()
        world.drain()


class PipelineHistories(Histories):
    min_decodes = 1

    def __init__(self) -> None:
        super().__init__()
        limits = config(3, seqs=4, step_tokens=24, model_len=100, min_decodes=self.min_decodes)
        self.world = PipelineWorld(self.num_blocks, self.block_size, limits)


class HistoriesOfFewSteps(PipelineHistories):
    min_decodes = 2


SETTINGS = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPipelineHistories = PipelineHistories.TestCase
TestPipelineHistories.settings = SETTINGS
TestHistoriesOfFewSteps = HistoriesOfFewSteps.TestCase
TestHistoriesOfFewSteps.settings = SETTINGS


def test_what_a_step_computes_is_waited_for_by_who_can_share_it() -> None:
    pipeline = Pipeline(config(3))
    prompt = list(range(40))
    for name in "abc":
        pipeline.scheduler.add(make(name, prompt))
        pipeline.fill()
        if name == "b":
            pipeline.turn()
    assert [chunk.start for schedule in pipeline.out for chunk in schedule.chunks] == [40, 32, 32]


# --- ends ------------------------------------------------------------------------------------------------------------


def test_a_sequence_aborted_in_flight_keeps_its_blocks_until_its_own_step_is_done() -> None:
    pipeline = Pipeline(config(2), num_blocks=10)
    for name in "ab":
        pipeline.scheduler.add(make(name, 10, max_tokens=50))
    pipeline.turn()
    pipeline.fill()
    assert [names(schedule) for schedule in pipeline.out] == [["b"], ["a"]]
    pipeline.scheduler.abort("a")
    assert pipeline.scheduler.blocks.num_free == 8
    pipeline.scheduler.update(pipeline.out.pop(0), [5])
    assert pipeline.scheduler.blocks.num_free == 8
    assert pipeline.scheduler.update(pipeline.out.pop(0), [5]) == []
    assert pipeline.scheduler.blocks.num_free == 9


def test_a_name_used_again_while_its_first_bearer_is_in_flight_is_another_sequence() -> None:
    pipeline = Pipeline(config(2))
    pipeline.scheduler.add(make("a", 10))
    pipeline.fill()
    pipeline.scheduler.abort("a")
    again = make("a", 20, max_tokens=1)
    pipeline.scheduler.add(again)
    pipeline.fill()
    assert [schedule.chunks[0].num_tokens for schedule in pipeline.out] == [10, 20]
    assert pipeline.scheduler.update(pipeline.out.pop(0), [5]) == []
    (update,) = pipeline.scheduler.update(pipeline.out.pop(0), [5])
    assert update.sequence is again
    with pytest.raises(InvalidRequest):
        pipeline.scheduler.add(make("a", 9000))
