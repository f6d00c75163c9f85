"""How much workers that serve slow each other down, found out from what requests saw."""

from __future__ import annotations

import numpy as np
import pytest

from bench.planning.load import Computed
from bench.profiling.serving import _Asked
from bench.profiling.together import Together
from bench.serving.timeline import Timeline
from engine.checkpoints import Silent
from placement.latency import Contention
from placement.workload import Workload
from tests.placement.layouts import STEP

PROMPT_S, TOKEN_S, OVERHEAD_S = 0.1, 0.01, 0.005
TOGETHER = Together(
    prompt_tokens=128,
    prompt_ms=1e3 * PROMPT_S,
    decode_ms=1e3 * TOKEN_S,
    overhead_ms=1e3 * OVERHEAD_S,
    max_tokens=1024,
)


class Workers:
    """Each request has one of its own, and takes so many times as long beside others of either kind."""

    def __init__(self, contention: Contention) -> None:
        self.contention = contention
        self.loads: list[tuple[int, int]] = []
        self.slow: set[int] = set()
        """Loads during which the machine is half as fast, by their place."""
        self.drift = 0.0
        """What each load takes longer than the one before."""

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]:
        at = workload.arrivals_ms(rate) / 1e3
        answers = int((workload.output_tokens > 1).sum())
        turns = sorted({float(one) for one in at[answers:]})
        prompts = (len(workload) - answers) // max(1, len(turns))
        self.loads.append((answers, prompts))
        number = len(self.loads) - 1
        more, times = self.contention.more, (1 + (number in self.slow)) * (1.0 + self.drift * number)
        took = times * PROMPT_S * (1 + (prompts - 1) * more(1, 1) + answers * more(1, 0))
        beside = times * TOKEN_S * (1 + (answers - 1) * more(0, 0)), times * prompts * TOKEN_S * more(0, 1)
        found = []
        for index, (start, tokens) in enumerate(zip(at.tolist(), workload.output_tokens.tolist(), strict=True)):
            one = Timeline(index=index, start=start, finished=True, completion_tokens=tokens)
            one.chunks = [start + OVERHEAD_S + (PROMPT_S / 8 if tokens > 1 else took)]
            while len(one.chunks) < tokens:
                now = one.chunks[-1]
                slow = any(turn + OVERHEAD_S <= now < turn + OVERHEAD_S + took for turn in turns)
                one.chunks.append(now + beside[0] + beside[1] * slow)
            one.end = one.chunks[-1]
            found.append(one)
        return found


@pytest.mark.parametrize("others", [1, 3])
def test_what_each_kind_of_work_costs_the_other_is_found(others: int) -> None:
    workers = Workers(Contention(prompt=(1.05, 1.12), decode=(1.08, 1.25)))
    found = TOGETHER.contention(workers, others, 2, Silent())
    assert found is not None
    assert found.contention.prompt == pytest.approx(workers.contention.prompt)
    assert found.contention.decode == pytest.approx(workers.contention.decode)
    alone_and_beside = {(0, 1), (1, 0), (0, 1 + others), (others, 1), (1, others), (1 + others, 0)}
    assert set(workers.loads) == alone_and_beside
    assert len(workers.loads) == 2 * len(alone_and_beside)  # by turns, in as many rounds


def test_a_machine_that_is_slow_for_a_while_slows_nobody_beside_others() -> None:
    """Nor alone: it is slow in fewer than half of the rounds."""
    workers = Workers(Contention(prompt=(1.05, 1.12), decode=(1.08, 1.25)))
    workers.slow = {0, 1, 2, 6}
    found = TOGETHER.contention(workers, 1, 5, Silent())
    assert found is not None
    assert found.contention.prompt == pytest.approx(workers.contention.prompt)
    assert found.contention.decode == pytest.approx(workers.contention.decode)


def test_a_machine_that_becomes_slower_all_the_time_slows_nobody_beside_others() -> None:
    """At the end it takes 1.8 times as long; in rounds of one order what comes later would seem to be slowed down."""
    workers = Workers(Contention(prompt=(1.05, 1.12), decode=(1.08, 1.25)))
    workers.drift = 0.01
    found = TOGETHER.contention(workers, 1, 16, Silent())
    assert found is not None
    assert found.contention.prompt == pytest.approx(workers.contention.prompt, rel=0.003)
    assert found.contention.decode == pytest.approx(workers.contention.decode, rel=0.003)
    low, high = found.quartiles
    for quartile, side in ((low, -1), (high, 1)):
        assert 0.0 < side * (quartile.decode[1] - found.contention.decode[1]) < 0.05


@pytest.mark.parametrize("seed", range(5))
def test_of_a_machine_that_goes_from_one_speed_to_another_and_back_most_rounds_tell_the_truth(seed: int) -> None:
    """A quarter of the time it is half as fast, some loads in a row."""
    workers, rng = Workers(Contention(prompt=(1.05, 1.12), decode=(1.08, 1.25))), np.random.default_rng(seed)
    workers.slow = {place + more for place in rng.choice(75, 3, replace=False).tolist() for more in range(7)}
    found = TOGETHER.contention(workers, 1, 16, Silent())
    assert found is not None
    assert found.contention.prompt == pytest.approx(workers.contention.prompt)
    assert found.contention.decode == pytest.approx(workers.contention.decode)


def test_nobody_is_faster_beside_others() -> None:
    found = TOGETHER.contention(Workers(Contention(prompt=(0.9, 0.9), decode=(0.8, 0.9))), 1, 1, Silent())
    assert found is not None
    assert found == (Contention(), (Contention(), Contention()))


def test_answers_that_end_before_the_prompts_come_tell_nothing() -> None:
    short = Together(prompt_tokens=64, prompt_ms=5.0, decode_ms=1.0, overhead_ms=4.0, max_tokens=256)
    assert short.contention(Workers(Contention()), 1, 1, Silent()) is None


def test_answers_go_on_while_prompts_come_one_after_the_other() -> None:
    workers = Workers(Contention())
    answers, turns = TOGETHER._asked(workers, 2, 3)
    assert [len(turn) for turn in turns] == [3] * len(turns)
    starts = np.array([[one.start for one in turn] for turn in turns])
    assert (starts == starts[:, :1]).all()
    assert min(np.diff(starts[:, 0])) >= 0.25  # by then the router knows who has nothing to do
    assert min(answer.end for answer in answers) > max(one.end for turn in turns for one in turn)


def test_prompts_that_came_when_no_answer_went_on_any_more_tell_nothing() -> None:
    """The machine has become twice as fast since it was told what a token takes."""
    expected = Together(prompt_tokens=128, prompt_ms=100.0, decode_ms=20.0, overhead_ms=5.0, max_tokens=1024)
    workers = Workers(Contention(prompt=(1.0, 1.2), decode=(1.1, 1.0)))
    answers, turns = expected._asked(workers, 1, 1)
    assert max(one.end for turn in turns for one in turn) <= answers[0].end
    found = expected.contention(workers, 1, 1, Silent())
    assert found is not None
    assert (found.contention.prompt[1], found.contention.decode[0]) == pytest.approx((1.2, 1.1))


class Served:
    """A worker whose steps take `slower` times as long as they were measured to. Around it requests take 5 ms and 0.01
    for each token of the prompt before the first token, and steps that decode 0.4 ms and 0.05 for each sequence."""

    def __init__(self, slower: float) -> None:
        self.slower, self.told = slower, Computed(0.0, 0.0)

    def computed(self) -> Computed:
        return self.told

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]:
        columns = (workload.prompt_tokens.tolist(), workload.output_tokens.tolist())
        found, at_once = [], len(workload) if workload.gaps.max() == 0 else 1
        for prompt, tokens, at_ms in zip(*columns, workload.arrivals_ms(rate).tolist(), strict=True):
            prompt_ms = self.slower * STEP.prompt_ms(at_once * prompt, at_once * prompt**2)
            decode_ms = self.slower * STEP.step_ms(0, 0.0, at_once * prompt, at_once, at_once)
            around_ms = 0.4 + 0.05 * at_once
            first = at_ms + 5.0 + 0.01 * prompt + prompt_ms
            one = Timeline(index=len(found), start=at_ms / 1e3, prompt_tokens=prompt)
            one.chunks = [(first + n * (decode_ms + around_ms)) / 1e3 for n in range(tokens)]
            one.end = one.chunks[-1]
            found.append(one)
            steps = Computed(prompt_ms + (tokens - 1) * decode_ms, tokens)
            self.told = Computed(*(a + b / at_once for a, b in zip(self.told, steps, strict=True)))
        return found


@pytest.mark.parametrize("slower", [0.8, 1.0, 1.3])
def test_what_is_around_steps_does_not_hang_on_how_fast_the_machine_is(slower: float) -> None:
    found = _Asked(STEP, [64, 256]).around(Served(slower))
    assert (found.overhead_ms, found.prompt_token_ms) == pytest.approx((5.0, 0.01))
    assert (found.step_ms, found.sequence_ms) == pytest.approx((0.4, 0.05), rel=0.1)


class Apart:
    """Prompts and answers apart: an answer of a token needs no hand-off, which takes 7 ms, and 9 before the second
    token; but 4 and 3 as long as no other answer is computed. The first answer's tokens come every 10 ms, and every 11
    while a prompt is computed that is handed over."""

    def timelines(self, workload: Workload, rate: float) -> list[Timeline]:
        columns = (
            workload.prompt_tokens.tolist(),
            workload.output_tokens.tolist(),
            workload.arrivals_ms(rate).tolist(),
        )
        found: list[Timeline] = []
        for prompt, tokens, at_ms in zip(*columns, strict=True):
            beside = any(at_ms < 1e3 * other.end for other in found)
            ttft = STEP.prompt.at(prompt, prompt**2) + 5.0 + ((7.0 if beside else 4.0) if tokens > 1 else 0.0)
            later = [0.0] + [(19.0 if beside else 13.0) + 10.0 * n for n in range(tokens - 1)]
            one = Timeline(index=len(found), start=at_ms / 1e3, prompt_tokens=prompt)
            one.chunks = [one.start + (ttft + more) / 1e3 for more in later]
            one.end = one.chunks[-1]
            found.append(one)
        first, *others = found
        steps = [(t.start, t.chunks[0]) for t in others if len(t.chunks) > 1]
        at = first.chunks[0]
        for n in range(1, len(first.chunks)):
            at += 0.011 if any(began <= at < ended for began, ended in steps) else 0.010
            first.chunks[n] = at
        first.end = first.chunks[-1]
        return found


def test_a_hand_off_costs_what_the_same_prompts_take_longer_than_where_there_is_none() -> None:
    """And while another answer is computed, for as long as that can be."""
    asked = _Asked(STEP, [64, 256])
    for most_tokens in (8192, 100):
        found = asked.handed_over(Apart(), most_tokens)  # type: ignore[arg-type]
        assert (found.step_ms, found.gap_ms) == pytest.approx((7.0, 3.0))
        assert found.decode == pytest.approx(1.1)
    found = asked.handed_over(Apart(), 17)  # type: ignore[arg-type]
    assert (found.step_ms, found.gap_ms) == pytest.approx((4.0, 3.0))
    assert found.decode is None, "nothing went on beside them"
