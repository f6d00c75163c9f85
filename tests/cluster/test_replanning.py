"""What gateways report reaches the replanner, and what it decides is carried out, or only told."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from cluster.membership import Member, Membership, Plan
from cluster.recorder import MOST_KEPT, Recorder, Report
from cluster.replanning import REPORT_TIMEOUT_S, Replanning, arrangement_of, load_of, plan_of
from cluster.traffic_log import TrafficLog
from core.errors import ConfigError, Unavailable
from core.served import Served, UnderWay
from core.types import Finish, FinishReason, Request, Role, SamplingParams, TokenDelta
from core.wire import WorkerCounters, WorkerStatus
from engine.kv_layout import KVLayout
from placement.arrangement import Arrangement
from placement.goodput import Goal
from placement.live_log import MOST_REQUESTS, Met
from placement.load import Load, RoleLoad
from placement.outcome import Targets
from placement.replanner import Change, Replanner
from placement.seen import Seen
from placement.traces import read_trace

LAYOUT = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="a")
P, D = Role.PREFILL, Role.DECODE
CONFIGURED = Arrangement(2, 1, 0, 2048)
GOAL = Goal(Targets(ttft_ms=1000.0, tpot_ms=50.0))


def worker(name: str, role: Role = P, *, leaving: bool = False, waiting: int = 0) -> WorkerStatus:
    return WorkerStatus(
        worker_id=name,
        role=role,
        num_running=1,
        num_waiting=waiting,
        num_waiting_tokens=100 * waiting,
        num_free_blocks=10,
        num_blocks=20,
        block_size=16,
        max_num_seqs=8,
        leaving=leaving,
        counters=WorkerCounters(),
    )


def served(number: int = 0, ended: FinishReason = FinishReason.LENGTH) -> Served:
    return Served(1000.0 + number, 10 + number, 0, 5, 100.0, 20.0, ended)


def report(gateway: str = "g", *answers: Served, in_flight: int = 0) -> Report:
    return Report(
        gateway_id=gateway,
        served=list(answers),
        in_flight=in_flight,
        workers=[worker("a"), worker("b", D)],
        under_way=[UnderWay(1.0, 7, 0, tokens) for tokens in range(in_flight)],
    )


def change(to: Arrangement) -> Change:
    return Change(to=to, by="predictive", why="because", gain=10.0, cost=1.0, before=0.5, after=0.9)


class Script:
    """Decides what the test says, and keeps what it was told."""

    def __init__(self, *changes: Arrangement | None, most_workers: int = 4) -> None:
        self.settings = SimpleNamespace(recent_s=10.0, most_workers=most_workers, goal=GOAL, shapes=())
        self.arrangement = CONFIGURED
        self.seen = Seen(prompts=1.5)
        self.startup_s, self.starts = 7.0, list[float]()
        self.traffic = self
        self.recorded: list[Served] = []
        self.loads: list[Load] = []
        self.adopted: list[Arrangement] = []
        self.threads: set[int] = set()
        self.meanwhile: Callable[[], None] = lambda: None
        self._changes = list(changes)

    def record(self, answers: Sequence[Served]) -> None:
        self.recorded += answers

    def started(self, seconds: float) -> None:
        self.starts.append(seconds)

    def decide(self, _now: float, load: Load) -> Change | None:
        self.loads.append(load)
        self.threads.add(threading.get_ident())
        self.meanwhile()
        to = self._changes.pop(0) if self._changes else None
        return None if to is None else change(to)

    def adopt(self, arrangement: Arrangement, _now: float) -> None:
        self.adopted.append(arrangement)

    def met(self, _now: float) -> Met:
        return Met(judged=20, missed=5, late=5, slow=0)


class World:
    def __init__(self, mode: str, *changes: Arrangement | None, scales: bool = True, most_workers: int = 4) -> None:
        self.script = Script(*changes, most_workers=most_workers)
        self.membership = Membership(Plan(wanted={P: 2, D: 1}))
        self.scaled: list[int] = []
        self.scales = scales
        replanner = cast("Replanner", self.script)
        self.replanning = Replanning(replanner, mode, self.membership, self.scale)  # type: ignore[arg-type]

    async def scale(self, workers: int) -> None:
        if not self.scales:
            raise Unavailable("no Serve")
        self.scaled.append(workers)


async def test_what_was_reported_is_recorded_once_and_the_status_says_how_it_stands() -> None:
    world = World("on")
    world.replanning.report(report("g", served(1), served(2), in_flight=3), 0.0)
    world.replanning.report(report("h", served(3), in_flight=4), 0.0)
    await world.replanning.look(1.0)
    await world.replanning.look(2.0)
    assert world.script.recorded == [served(1), served(2), served(3)]
    assert (world.script.loads[0].in_flight, world.script.loads[0].told_by) == (7, {"g", "h"})
    assert [request.output_tokens for request in world.script.loads[0].under_way] == [0, 1, 2, 0, 1, 2, 3]
    assert world.script.loads[0].of(P).workers == 1
    status = world.replanning.report(report(), 2.0)
    assert (status.attainment, status.goodput_rps, status.plan_id) == (0.75, 1.5, 0)
    assert status.correction == {"prompts": 1.5, "decodes": 1.0}


async def test_a_gateway_that_says_nothing_any_more_is_not_counted() -> None:
    world = World("on")
    world.replanning.report(report("g", in_flight=3), 0.0)
    await world.replanning.look(REPORT_TIMEOUT_S + 0.1)
    assert world.script.loads[-1] == Load(roles={}, in_flight=0)


async def test_a_change_becomes_the_plan_and_the_number_of_workers_follows() -> None:
    world = World("on", Arrangement(1, 2, 0, 2048), None, Arrangement(1, 3, 0, 512))
    await world.replanning.look(0.0)
    assert world.membership.plan == Plan(plan_id=1, wanted={P: 1, D: 2})
    assert world.scaled == []
    await world.replanning.look(1.0)
    await world.replanning.look(2.0)
    assert world.membership.plan == Plan(plan_id=2, wanted={P: 1, D: 3}, step_tokens=512)
    assert world.scaled == [4]
    assert world.script.adopted == [Arrangement(1, 2, 0, 2048), Arrangement(1, 3, 0, 512)]
    status = world.replanning.report(report(), 2.0)
    assert status.decided == {"predictive": 2}
    assert status.arrangement == status.decisions[-1].to
    assert [decided.carried_out for decided in status.decisions] == [True, True]


async def test_advice_changes_nothing_and_is_given_once() -> None:
    to = Arrangement(1, 2, 0, 2048)
    world = World("advise", to, to, Arrangement(1, 1, 0, 2048))
    for now in range(3):
        await world.replanning.look(float(now))
    assert (world.membership.plan.plan_id, world.scaled, world.script.adopted) == (0, [], [])
    decisions = world.replanning.report(report(), 3.0).decisions
    assert [decided.to for decided in decisions] == [str(to), str(Arrangement(1, 1, 0, 2048))]
    assert not any(decided.carried_out for decided in decisions)


async def test_where_the_number_cannot_be_changed_the_roles_are(caplog: pytest.LogCaptureFixture) -> None:
    world = World("on", Arrangement(1, 3, 0, 2048), scales=False)
    await world.replanning.look(0.0)
    assert world.membership.plan.wanted == {P: 1, D: 3}
    assert "no Serve" in caplog.text


async def test_a_number_that_could_not_be_had_is_asked_for_again_with_the_next_change() -> None:
    world = World(
        "on", Arrangement(1, 3, 0, 2048), Arrangement(2, 2, 0, 2048), Arrangement(1, 3, 0, 2048), scales=False
    )
    await world.replanning.look(0.0)
    world.scales = True
    await world.replanning.look(1.0)
    await world.replanning.look(2.0)
    assert world.scaled == [4]


async def test_a_number_that_is_not_to_change_is_left_to_serve_which_may_still_replace_a_worker() -> None:
    world = World("on", Arrangement(1, 1, 0, 2048), most_workers=0)
    await world.replanning.look(0.0)
    assert (world.membership.plan.wanted, world.scaled) == ({P: 1, D: 1}, [])


async def test_what_was_decided_for_another_plan_is_not_carried_out() -> None:
    world = World("on", Arrangement(1, 2, 0, 2048))
    newer = Plan(plan_id=7, wanted={P: 2, D: 1}, step_tokens=256)
    member = Member(worker_id="a", address="a:1", role=D, layout=LAYOUT, plan=newer)
    world.script.meanwhile = lambda: world.membership.announce(member, 0.0) and None
    await world.replanning.look(0.0)
    assert world.membership.plan == newer
    assert world.replanning.status.decisions == []


async def test_deciding_may_take_long_and_keeps_nobody_waiting_nor_is_more_kept_than_is_looked_at() -> None:
    world = World("on")
    went_on = threading.Event()
    world.script.meanwhile = lambda: went_on.wait(10.0) and None
    looking = asyncio.create_task(world.replanning.look(0.0))
    await asyncio.sleep(0)
    for _ in range(3):
        world.replanning.report(report("g", *map(served, range(MOST_REQUESTS // 2))), 0.0)
    went_on.set()
    await looking
    assert threading.get_ident() not in world.script.threads
    await world.replanning.look(1.0)
    assert len(world.script.recorded) == MOST_REQUESTS


async def test_the_plan_that_workers_bring_to_a_new_controller_is_adopted() -> None:
    world = World("on")
    plan = Plan(plan_id=7, wanted={P: 1, D: 2}, step_tokens=256)
    world.membership.announce(Member(worker_id="a", address="a:1", role=D, layout=LAYOUT, plan=plan), 0.0)
    await world.replanning.look(0.0)
    assert world.script.adopted == [Arrangement(1, 2, 0, 256)]
    assert world.replanning.report(report(), 0.0).plan_id == 7


def test_the_load_is_summed_by_role_without_those_who_leave_and_each_worker_counts_once() -> None:
    told = [worker("a", waiting=5), worker("a", waiting=2), worker("b", waiting=1), worker("c", D, leaving=True)]
    role = RoleLoad(workers=2, waiting_requests=3, waiting_prompt_tokens=300, running=2, free_kv_tokens=320)
    assert load_of(told, 4) == Load(roles={P: role}, in_flight=4)


def test_steps_stay_as_configured_until_an_arrangement_has_others_and_then_are_as_planned() -> None:
    first = plan_of(Arrangement(1, 2, 0, 2048), Plan(wanted={P: 2, D: 1}), CONFIGURED)
    assert first.step_tokens is None
    second = plan_of(Arrangement(1, 2, 0, 512), first, CONFIGURED)
    assert (second.plan_id, second.step_tokens) == (2, 512)
    assert plan_of(Arrangement(1, 2, 0, 2048), second, CONFIGURED).step_tokens == 2048
    assert arrangement_of(first, CONFIGURED) == Arrangement(1, 2, 0, 2048)
    assert arrangement_of(second, CONFIGURED) == Arrangement(1, 2, 0, 512)


def request(prompt_tokens: int = 7) -> Request:
    params = SamplingParams(max_tokens=4)
    return Request(request_id="r", prompt_token_ids=[1] * prompt_tokens, sampling=params, deadline=0.0)


def delta(index: int, count: int, *, cached: int = 0, ended: FinishReason | None = None) -> TokenDelta:
    finish = None if ended is None else Finish(reason=ended)
    return TokenDelta(request_id="r", index=index, token_ids=[5] * count, num_cached_tokens=cached, finish=finish)


def test_a_request_is_recorded_once_when_it_ends() -> None:
    recorder = Recorder()
    before = time.time()
    record = recorder.begin(request())
    assert recorder.in_flight == 1
    record.heard(delta(0, 1, cached=4))
    record.heard(delta(1, 2))
    record.heard(delta(3, 0, ended=FinishReason.STOP))
    record.end(FinishReason.ABORT)
    (found,) = recorder.take()
    assert (found.prompt_tokens, found.cached_tokens, found.output_tokens) == (7, 4, 3)
    assert found.ended is FinishReason.STOP
    assert before <= found.arrived_s <= time.time()
    assert found.ttft_ms is not None
    assert found.tpot_ms is not None
    assert (recorder.in_flight, recorder.under_way(), recorder.take()) == (0, [], [])


def test_of_a_request_under_way_it_is_known_how_far_it_is() -> None:
    recorder = Recorder()
    early, _ = recorder.begin(request()), recorder.begin(request(9))
    early.heard(delta(0, 3, cached=4))
    new, old = recorder.under_way()
    assert (old.prompt_tokens, old.cached_tokens, old.output_tokens) == (7, 4, 3)
    assert (new.prompt_tokens, new.cached_tokens, new.output_tokens) == (9, 0, 0)
    assert 0 <= new.for_s <= old.for_s < 60


def test_without_a_token_there_is_no_latency() -> None:
    recorder = Recorder()
    recorder.begin(request()).end(FinishReason.ERROR)
    (found,) = recorder.take()
    assert (found.ttft_ms, found.tpot_ms, found.output_tokens, found.ended) == (None, None, 0, FinishReason.ERROR)


def test_what_could_not_be_told_is_told_next_and_the_oldest_are_forgotten() -> None:
    recorder = Recorder()
    recorder.begin(request()).end(FinishReason.STOP)
    taken = recorder.take()
    recorder.begin(request(8)).end(FinishReason.STOP)
    recorder.keep(taken)
    assert [found.prompt_tokens for found in recorder.take()] == [7, 8]
    recorder.begin(request(9)).end(FinishReason.STOP)
    recorder.keep([served(number) for number in range(MOST_KEPT)])
    kept = recorder.take()
    assert len(kept) == MOST_KEPT
    assert (kept[0], kept[-1].prompt_tokens) == (served(1), 9)


def test_the_log_is_a_trace_and_stays_within_its_bound(tmp_path: Path) -> None:
    path = tmp_path / "traffic.jsonl"
    log = TrafficLog(path, most_bytes=1000)
    for number in range(100):
        log.append([served(number), served(number)])
    old = path.with_name("traffic.jsonl.1")
    assert 1000 <= old.stat().st_size < 1300
    assert path.stat().st_size < 1300
    log.append([served(number) for number in range(5)])
    assert read_trace(path).workload.prompt_tokens.tolist()[:5] == [10, 11, 12, 13, 14]


def test_a_log_that_cannot_be_written_is_refused_at_start_up(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can't be written"):
        TrafficLog(tmp_path / "nowhere" / "traffic.jsonl")
