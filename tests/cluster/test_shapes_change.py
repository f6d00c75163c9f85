"""Workers give way to such of another TP or PP under load: every request ends once, with the tokens it should have, and
no device is held twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from transformers import LlamaForCausalLM

from cluster.local import LocalCluster, local_cluster
from cluster.moving import Moving
from cluster.node import WorkerNode
from cluster.worker import load_runner
from core.errors import InternalError, Unavailable
from core.types import Role
from placement.arrangement import Arrangement
from placement.load import Load as Told
from placement.moving import Held
from placement.replanner import Replanner
from placement.worker_shape import WorkerShape
from tests.cluster.test_live_changes import Load, all_free, config, job, right, until
from tests.cluster.test_replanning import Script

P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH
ONE, TWO, STAGES = WorkerShape(1, 1), WorkerShape(2, 1), WorkerShape(1, 2)
BUDGET = 3
SINGLES = Arrangement(0, 0, 3, 256, ONE, ONE)
DOUBLE = Arrangement(0, 0, 1, 256, TWO, TWO)


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps a test waiting."""
    monkeypatch.setattr("cluster.attendance.ANNOUNCE_PERIOD_S", 0.05)
    monkeypatch.setattr("cluster.client.MEMBERS_PERIOD_S", 0.05)
    monkeypatch.setattr("cluster.replanning.LOOK_PERIOD_S", 0.05)


class Devices:
    """How many are held: from before a worker loads until it has stopped."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.most = 0
        stop = WorkerNode.stop

        def load(folder: Path, engine: Any, *rest: Any) -> Any:
            self.now += engine.ranks
            self.most = max(self.most, self.now)
            runner = load_runner(folder, engine, *rest)
            runner.held_ranks = engine.ranks  # type: ignore[union-attr]
            return runner

        async def stopped(node: WorkerNode) -> None:
            await stop(node)
            self.now -= node.runner.held_ranks  # type: ignore[union-attr]

        monkeypatch.setattr("cluster.local.load_runner", load)
        monkeypatch.setattr(WorkerNode, "stop", stopped)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Devices:
    return Devices(monkeypatch)


class Said(Script):
    """Decides what the test says, as soon as it does."""

    def __init__(self, start: Arrangement, budget: int) -> None:
        super().__init__()
        self.settings.shapes, self.settings.devices = (ONE, TWO, STAGES), budget
        self.arrangement = start

    def say(self, to: Arrangement) -> None:
        self._changes.append(to)


@asynccontextmanager
async def changing(
    folder: Path, start: Arrangement, budget: int = BUDGET, **settings: Any
) -> AsyncIterator[tuple[LocalCluster, Said]]:
    shape = start.decode_shape
    assert shape is not None
    given = {
        "replan": "on",
        "replan_shapes": "1x1,2x1,1x2",
        "replan_slo": "ttft=1,tpot=1",
        "replan_profile": "unread.json",
        "replan_max_workers": budget // shape.devices,
        "tensor_parallel_size": shape.tp,
        "pipeline_parallel_size": shape.pp,
        "max_num_seqs": 8,
    }
    roles = {"colocated": True, "decode_replicas": start.both} if start.both else {}
    said = Said(start, budget)
    async with local_cluster(
        config(**given | roles | settings), folder, replan=(cast("Replanner", said), "on")
    ) as made:
        yield made, said


def there(cluster: LocalCluster) -> dict[Role, Counter[WorkerShape]]:
    """As the gateway sees them."""
    found: dict[Role, Counter[WorkerShape]] = {}
    for worker in cluster.backend.status().workers:
        if not worker.leaving:
            found.setdefault(worker.role, Counter())[cluster.shapes[worker.worker_id]] += 1
    return found


async def arranged(cluster: LocalCluster, to: Arrangement) -> None:
    wanted = {role: Counter({to.shape(role): to.of(role)}) for role in Role if to.of(role)}
    await until(lambda: there(cluster) == wanted and len(cluster.nodes) == to.workers)


async def test_tp_goes_from_one_to_two_and_back_under_load_and_no_request_is_lost_or_doubled(
    tiny: tuple[LlamaForCausalLM, Path], devices: Devices
) -> None:
    model, folder = tiny
    async with changing(folder, SINGLES) as (cluster, said):
        assert cluster.membership.plan.shapes == {B: ONE}
        load = Load(cluster)
        await load.more()
        for to in (DOUBLE, SINGLES):
            said.say(to)
            await arranged(cluster, to)
            await load.more()
        answers = await load.stop()
        await all_free(cluster)
        assert said.adopted == [DOUBLE, SINGLES]
        status = cluster.replanning.status if cluster.replanning else None
        assert status is not None
        assert (status.shapes, status.arrangement) == ({"both": "1x1"}, str(SINGLES))
        assert len(said.starts) >= 3 + 1 + 3, "how long each took is told"
        assert min(said.starts) > 0
        assert devices.now == 3
    assert devices.most <= BUDGET
    assert len(answers) > 20
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


async def test_each_role_may_have_a_shape_of_its_own_and_kv_goes_from_one_to_the_other(
    tiny: tuple[LlamaForCausalLM, Path], devices: Devices
) -> None:
    model, folder = tiny
    apart = Arrangement(2, 1, 0, 256, ONE, ONE)
    unlike = Arrangement(1, 1, 0, 256, ONE, STAGES)
    async with changing(folder, apart, prefill_replicas=2) as (cluster, said):
        load = Load(cluster)
        await load.more()
        for to in (unlike, apart):
            said.say(to)
            await arranged(cluster, to)
            await load.more()
        answers = await load.stop()
        await all_free(cluster)
        assert sum(count for route, count in cluster.backend.status().routes.items() if "handoff" in str(route)) > 10
    assert devices.most <= BUDGET
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


@pytest.mark.parametrize("moment", ["one of the old", "the new one as soon as it is up"])
async def test_a_worker_that_dies_in_the_middle_of_a_change_takes_no_request_along(
    tiny: tuple[LlamaForCausalLM, Path], devices: Devices, moment: str
) -> None:
    model, folder = tiny
    four = Arrangement(0, 0, 4, 256, ONE, ONE)
    async with changing(folder, four, budget=4, lease_s=1.0) as (cluster, said):
        load = Load(cluster)
        await load.more()
        said.say(DOUBLE)
        if moment == "one of the old":
            await until(lambda: len(cluster.nodes) == 2)
        else:
            await until(lambda: TWO in there(cluster)[B])
        shape = ONE if moment == "one of the old" else TWO
        await cluster.remove_worker(next(name for name in cluster.nodes if cluster.shapes[name] == shape))
        await arranged(cluster, DOUBLE)
        await load.more()
        answers = await load.stop()
        await all_free(cluster)
    assert devices.most <= 4
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


async def test_shapes_that_do_not_start_leave_somebody_who_serves_and_the_way_back_open(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    tried = 0

    def broken(folder: Path, engine: Any, *rest: Any) -> Any:
        nonlocal tried
        if engine.ranks > 1:
            tried += 1
            raise InternalError("no memory")
        return load_runner(folder, engine, *rest)

    monkeypatch.setattr("cluster.local.load_runner", broken)
    async with changing(folder, SINGLES) as (cluster, said):
        load = Load(cluster)
        said.say(DOUBLE)
        await until(lambda: tried >= 2)
        assert there(cluster) == {B: Counter({ONE: 1})}
        await load.more()
        said.say(SINGLES)
        await arranged(cluster, SINGLES)
        answers = await load.stop()
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


# --- a step at a time ------------------------------------------------------------------------------------------------


class Replicas:
    """A fleet in which everything takes as long as the test wants."""

    def __init__(self, **held: int) -> None:
        self.holding = {ONE: Held(serving=held.get("one", 0)), TWO: Held(serving=held.get("two", 0))}
        self.asked: list[dict[WorkerShape, int]] = []
        self.answers = True

    @property
    def seen(self) -> dict[WorkerShape, int]:
        return {shape: one.serving for shape, one in self.holding.items()}

    async def held(self) -> dict[WorkerShape, Held]:
        if not self.answers:
            raise Unavailable("no Serve")
        return self.holding

    async def ask(self, counts: Any) -> None:
        self.asked.append(dict(counts))


async def test_a_start_is_timed_from_when_it_was_asked_for_until_it_serves() -> None:
    fleet = Replicas(one=1)
    moving = Moving(fleet, BUDGET)
    assert await moving.step({TWO: 1}, 100.0, fleet.seen) == []
    assert fleet.asked[-1] == {ONE: 1, TWO: 1}
    fleet.holding = {ONE: Held(serving=1), TWO: Held(starting=1)}
    assert await moving.step({TWO: 1}, 103.0, fleet.seen) == []
    fleet.holding = {ONE: Held(serving=1), TWO: Held(serving=1)}
    assert await moving.step({TWO: 1}, 107.0, fleet.seen) == [7.0]
    assert fleet.asked[-1] == {ONE: 0, TWO: 1}
    assert await moving.step({TWO: 1}, 108.0, fleet.seen) == []


async def test_nobody_stops_for_a_worker_that_some_gateway_does_not_know_yet() -> None:
    fleet = Replicas(one=1)
    moving = Moving(fleet, BUDGET)
    await moving.step({TWO: 1}, 100.0, {ONE: 1})
    fleet.holding = {ONE: Held(serving=1), TWO: Held(serving=1)}
    assert await moving.step({TWO: 1}, 101.0, {ONE: 1}) == []
    assert fleet.asked[-1] == {ONE: 1, TWO: 1}
    assert await moving.step({TWO: 1}, 102.0, {ONE: 1, TWO: 1}) == [2.0]
    assert fleet.asked[-1] == {ONE: 0, TWO: 1}


async def test_a_start_that_was_given_up_is_not_timed() -> None:
    fleet = Replicas(one=1)
    moving = Moving(fleet, BUDGET)
    await moving.step({TWO: 1}, 100.0, fleet.seen)
    assert await moving.step({ONE: 1}, 110.0, fleet.seen) == []
    assert fleet.asked[-1] == {ONE: 1, TWO: 0}
    assert await moving.step({ONE: 1}, 120.0, fleet.seen) == []


async def test_a_new_controller_goes_on_with_what_is_there() -> None:
    fleet = Replicas(one=1, two=1)
    assert await Moving(fleet, BUDGET).step({TWO: 1}, 0.0, fleet.seen) == []
    assert fleet.asked == [{ONE: 0, TWO: 1}]
    assert await Moving(fleet, BUDGET).step({TWO: 1}, 0.0, {TWO: 1}) == []
    assert fleet.asked[-1] == {ONE: 1, TWO: 1}, "it has not heard of all, so perhaps not of the plan"
    nobody = Replicas(two=1)
    assert await Moving(nobody, BUDGET).step({ONE: 1}, 0.0, {}) == []
    assert nobody.asked == [{}], "nothing is known yet"
    fleet.answers = False
    with pytest.raises(Unavailable):
        await Moving(fleet, BUDGET).step({TWO: 1}, 0.0, fleet.seen)


async def test_load_is_told_by_shape() -> None:
    from cluster.replanning import load_of
    from tests.cluster.test_replanning import worker

    told: Told = load_of([worker("a"), worker("b"), worker("c", D)], 0, shapes={"a": ONE, "b": TWO, "c": TWO})
    assert (told.of(P).shapes, told.of(D).shapes) == ({ONE: 1, TWO: 1}, {TWO: 1})
