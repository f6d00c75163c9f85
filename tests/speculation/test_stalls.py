"""A drafter that does not come back: requests go on without it, and nobody waits for it a second time."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from core import compiler
from core.types import SamplingParams, SpeculationWish
from engine.runner import ModelRunner
from speculation import native
from speculation.acceptance import Acceptance
from speculation.aside import Aside, Stalled
from speculation.controllers.base import Limits
from speculation.controllers.registry import make_controller
from speculation.drafters.base import BaseDrafter, Surroundings
from speculation.in_batch import InBatch
from speculation.laws import DraftLaw
from speculation.protocols import Drafter
from speculation.rounds import DraftRequest, Feedback, Needs, Observed
from speculation.rules.registry import RULES
from speculation.tree import DraftBatch
from tests.engine.driver import TINY
from tests.engine.late import LateRunner, engine_over
from tests.engine.test_reproducible import Job
from tests.speculation.copier import Copier

VOCAB, BUDGET, WAIT_S = TINY["vocab_size"], 4, 60
SURROUNDINGS = Surroundings(
    vocab_size=VOCAB, max_budget=BUDGET, max_requests=8, max_memory_bytes=1 << 20, law=DraftLaw.POINT_MASS
)


class Sleeper(Copier):
    """Blocks where it is told to, until it is woken."""

    name = "sleeper"

    def __init__(self, where: str, after: int) -> None:
        super().__init__(SURROUNDINGS)
        self.asleep, self.wake, self.woken = (threading.Event() for _ in range(3))
        self.calls: list[str] = []
        self._where, self._left = where, after

    def _call(self, what: str) -> None:
        self.calls.append(what)
        self._left -= what == self._where
        if self._left == 0:
            self.asleep.set()
            self.wake.wait(WAIT_S)
            self.woken.set()

    def start(self, request: DraftRequest) -> None:
        self._call("start")

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        self._call("propose")
        return super().propose(requests, budgets, floor)

    def observe(self, feedback: Feedback) -> None:
        self._call("observe")

    def absorb(self, requests: Sequence[DraftRequest], observed: Observed) -> None:
        self._call("absorb")

    def finish(self, key: int) -> None:
        self._call("finish")


def in_batch(*drafters: BaseDrafter, patience_s: float) -> InBatch:
    names = tuple(drafter.name for drafter in drafters)
    return InBatch(
        {drafter.name: cast("Drafter", drafter) for drafter in drafters},
        dict.fromkeys(names, RULES["sampled"]),
        make_controller("fixed", Limits(BUDGET, names)),
        Acceptance(BUDGET),
        vocab_size=VOCAB,
        max_budget=BUDGET,
        patience_s=patience_s,
    )


@pytest.mark.parametrize(
    ("where", "after"), [("start", 1), ("propose", 1), ("propose", 5), ("observe", 2), ("finish", 1)]
)
def test_requests_go_on_without_a_drafter_that_stalls(model: ModelRunner, where: str, after: int) -> None:
    jobs = [Job(20 + n, SamplingParams(max_tokens=40, temperature=0.0)) for n in range(3)]
    with engine_over(LateRunner(model, 1)) as plain:
        wanted = plain.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)])
    drafter = Sleeper(where, after)
    speculator = in_batch(drafter, patience_s=0.3)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        found = harness.outputs([job.sequence(str(index)) for index, job in enumerate(jobs)])
        calls = len(drafter.calls)
        assert "was not done after" in speculator.counters.switched_off["sleeper"]
        assert not drafter.woken.is_set()
        drafter.wake.set()
        assert drafter.woken.wait(WAIT_S)
        again = harness.outputs([jobs[0].sequence("again")])
    assert [output.token_ids for output in found] == [output.token_ids for output in wanted]
    assert again[0].token_ids == wanted[0].token_ids
    assert len(drafter.calls) == calls, "it was asked for something after it was given up"
    assert harness.blocks.num_free == 64


class Busy(Copier):
    """Works on the engine's thread; from its third proposal on it takes long."""

    name = "busy"
    needs = Needs(thread=False)
    proposals = 0

    def propose(self, requests: Sequence[DraftRequest], budgets: NDArray[np.int64], floor: float) -> DraftBatch:
        self.proposals += 1
        end = time.thread_time() + (0.4 if self.proposals > 2 else 0.0)
        while time.thread_time() < end:
            pass
        return super().propose(requests, budgets, floor)


def test_one_that_works_on_the_engines_thread_is_asked_no_more_once_it_took_too_long(model: ModelRunner) -> None:
    job = Job(20, SamplingParams(max_tokens=40, temperature=0.0))
    with engine_over(LateRunner(model, 1)) as plain:
        (wanted,) = plain.outputs([job.sequence("a")])
    drafter = Busy(SURROUNDINGS)
    speculator = in_batch(drafter, patience_s=0.3)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        (found,) = harness.outputs([job.sequence("a")])
    assert found.token_ids == wanted.token_ids
    assert drafter.proposals == 3
    assert "it took 0.4 s, and may take 0.3" in speculator.counters.switched_off["busy"]


@pytest.mark.parametrize("where", ["start", "propose", "observe", "finish"])
def test_one_on_the_engines_thread_that_never_comes_back_is_seen_from_other_threads(
    model: ModelRunner, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its name, and by the engine that does not go on; and no more if it does come back."""
    monkeypatch.setattr("speculation.crew.LOST_S", 0.1)
    drafter = Sleeper(where, 1)
    drafter.needs = Needs(thread=False)
    speculator = in_batch(drafter, patience_s=0.05)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        assert (speculator.lost, harness.engine.seconds_in_step) == (None, 0.0)
        harness.engine.add(Job(20, SamplingParams(max_tokens=9, temperature=0.0)).sequence("a"))
        assert drafter.asleep.wait(WAIT_S)
        seen = time.monotonic()
        while speculator.lost is None:
            assert time.monotonic() < seen + WAIT_S
        assert speculator.lost == "sleeper"
        assert harness.engine.seconds_in_step >= 0.1
        drafter.wake.set()
        while speculator.lost is not None or harness.engine.seconds_in_step:
            assert time.monotonic() < seen + WAIT_S


def test_on_a_machine_where_nothing_is_compiled_yet_nobody_stalls(
    model: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever makes the drafters waits for the compiler, not who waits for them."""
    load, compiled_by = compiler.load, []
    monkeypatch.setattr(compiler, "load", lambda *args: compiled_by.append(threading.current_thread()) or load(*args))
    native.load.cache_clear()
    speculator = in_batch(Copier(SURROUNDINGS), patience_s=WAIT_S)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        harness.outputs([Job(20, SamplingParams(max_tokens=20, temperature=0.0)).sequence("a")])
    assert compiled_by == [threading.current_thread()]
    assert not speculator.counters.switched_off
    assert speculator.counters.by_drafter


def test_a_drafter_that_is_lost_to_one_rule_is_not_asked_by_the_next(model: ModelRunner) -> None:
    drafter = Sleeper("propose", 1)
    speculator = in_batch(drafter, patience_s=0.3)
    sequences = [Job(20, SamplingParams(max_tokens=9, temperature=0.0)).sequence(name) for name in "ab"]
    sequences[1].request = replace(sequences[1].request, speculation=SpeculationWish(rule="tree"))
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        outputs = harness.outputs(sequences)
    drafter.wake.set()
    assert [len(output.token_ids) for output in outputs] == [9, 9]
    assert drafter.calls.count("propose") == 1


def test_a_drafter_that_is_lost_when_it_is_told_of_a_request_is_told_no_more(model: ModelRunner) -> None:
    """It wants to see the prompt, and so is started in the midst of what it is to be told."""
    drafter = Sleeper("start", 1)
    drafter.needs = Needs(top=2)
    speculator = in_batch(drafter, patience_s=0.3)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        harness.outputs([Job(20, SamplingParams(max_tokens=9, temperature=0.0)).sequence("a")])
    drafter.wake.set()
    assert drafter.calls == ["start"]


def test_other_drafters_go_on(model: ModelRunner) -> None:
    class Other(Copier):
        name = "other"

    stuck, other = Sleeper("start", 1), Other(SURROUNDINGS)
    names = ("other", "sleeper")
    speculator = in_batch(other, stuck, patience_s=0.3)
    with engine_over(LateRunner(model, 1), speculator=speculator) as harness:
        harness.outputs([Job(30, SamplingParams(max_tokens=60, temperature=0.0)).sequence("a")])
    stuck.wake.set()
    assert list(speculator.counters.switched_off) == [names[1]]
    assert speculator.counters.by_drafter["other", ""].draft_tokens > 0


# --- the thread ----------------------------------------------------------------------------------------------------


def test_what_work_gives_or_raises_comes_back() -> None:
    aside = Aside("test")
    assert aside.run(lambda: 3, 5.0) == 3
    with pytest.raises(KeyError, match="gone"):
        aside.run(lambda: dict[str, int]()["gone"], 5.0)
    assert aside.run(threading.get_ident, 5.0) == aside.run(threading.get_ident, 5.0) != threading.get_ident()


def test_a_late_thread_is_left_to_itself_and_ends_when_it_comes_back() -> None:
    aside, wake = Aside("test"), threading.Event()
    first = aside.run(threading.current_thread, 5.0)
    with pytest.raises(Stalled):
        aside.run(lambda: wake.wait(WAIT_S), 0.05)
    second = aside.run(threading.current_thread, 5.0)
    assert first is not second
    wake.set()
    first.join(WAIT_S)
    assert not first.is_alive()


def test_a_process_that_stood_still_has_not_waited_meanwhile() -> None:
    """It is stopped for a second, five times as long as it would wait, while work that takes a moment is under way."""
    code = (
        "import os, subprocess, time\n"
        "from speculation.aside import Aside\n"
        "aside = Aside('test')\n"
        "aside.run(lambda: None, 5.0)\n"
        "again = subprocess.Popen(['sh', '-c', f'sleep 1; kill -CONT {os.getpid()}'])\n"
        "aside.run(lambda: os.kill(os.getpid(), 19) or time.sleep(0.02), 0.2)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=WAIT_S)


def test_its_thread_ends_with_it() -> None:
    aside = Aside("test")
    thread, gone = aside.run(threading.current_thread, 5.0), weakref.ref(aside)
    del aside
    gc.collect()
    assert gone() is None
    thread.join(WAIT_S)
    assert not thread.is_alive()
