"""Two workers that swap their roles have hand-offs in both directions, and each may hold the blocks the other needs."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.local import LocalCluster
from cluster.turns import Turns
from core.links import Link, LinkClient
from core.types import Request, Role, SamplingParams
from core.wire import WORKER_SERVICE, Abort, FromWorker, Opened, Prefill, Receive, Step, ToWorker
from kv_transfer.giver import Giver
from kv_transfer.messages import SequenceState

TIMEOUT_S = 60.0


class Side:
    """A worker as the gateway of this test has it."""

    def __init__(self, cluster: LocalCluster, name: str) -> None:
        self.node = cluster.nodes[name]
        self.address = cluster.address(name)
        self.client = LinkClient(self.address)
        self.heard: list[FromWorker] = []

    async def open(self) -> None:
        self.link: Link[FromWorker, ToWorker] = await self.client.open(WORKER_SERVICE, FromWorker, ToWorker)  # type: ignore[arg-type]
        self.reading = asyncio.ensure_future(self.read())

    async def read(self) -> None:
        async for message in self.link:
            self.heard.append(message)

    def opened(self, request_id: str) -> bool:
        return Opened(request_id) in self.heard

    def finished(self, request_id: str) -> bool:
        deltas = [d for m in self.heard if isinstance(m, Step) for d in m.deltas if d.request_id == request_id]
        return any(delta.finish is not None for delta in deltas)

    async def close(self) -> None:
        self.link.close()
        await self.client.close()
        await self.reading


async def until(condition: object) -> None:
    assert callable(condition)
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


@pytest_asyncio.fixture
async def sides(tiny: tuple[LlamaForCausalLM, Path]) -> AsyncIterator[tuple[Side, Side]]:
    """Two workers with 8 blocks of 16 tokens each."""
    config = load(None, {"dtype": "float32", "kv_cache_memory": "96KiB", "handoff_min_tokens": 0})
    cluster = LocalCluster(config, tiny[1])
    for name in "ab":
        await cluster.add_worker(name, Role.BOTH)
    pair = Side(cluster, "a"), Side(cluster, "b")
    for side in pair:
        await side.open()
    yield pair
    for side in pair:
        await side.close()
    await cluster.stop()


def job(name: str, length: int = 100) -> Request:
    return Request(
        request_id=name,
        prompt_token_ids=random.Random(name).choices(range(3, 128), k=length),
        sampling=SamplingParams(max_tokens=4, temperature=0.0),
        deadline=time.time() + TIMEOUT_S,
    )


def hand_off(request: Request, giver: Side, taker: Side) -> None:
    """As dispatch.start has it."""
    taker.link.send(Receive(request, request.request_id, giver.address, TIMEOUT_S))
    giver.link.send(Prefill(request, request.request_id))


async def test_prompts_that_fill_both_workers_are_handed_over_in_both_directions(sides: tuple[Side, Side]) -> None:
    a, b = sides
    hand_off(job("there"), giver=a, taker=b)
    await until(lambda: a.opened("there"))
    hand_off(job("back"), giver=b, taker=a)
    await until(lambda: b.opened("back") or b.node.status().num_waiting == 2)
    b.link.send(Opened("there"))  # each worker's blocks may all be held for the other by now
    if b.opened("back"):
        a.link.send(Opened("back"))
    await until(lambda: b.finished("there"))
    await until(lambda: b.opened("back"))
    a.link.send(Opened("back"))
    await until(lambda: a.finished("back"))
    for side in sides:
        await until(lambda side=side: side.node.status().num_free_blocks == 8)


async def test_a_first_token_is_sent_before_the_giver_hears_that_its_kv_is_complete(
    sides: tuple[Side, Side], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = sides
    order: list[str] = []
    send, complete = Link.send, Giver.complete

    def sending(link: Link[ToWorker, FromWorker], message: FromWorker) -> None:
        if isinstance(message, Step):
            order.append("token")
        send(link, message)

    def completing(giver: Giver, transfer_id: str, state: SequenceState) -> None:
        order.append("complete")
        complete(giver, transfer_id, state)

    monkeypatch.setattr(Link, "send", sending)
    monkeypatch.setattr(Giver, "complete", completing)
    hand_off(job("soon"), giver=a, taker=b)
    await until(lambda: a.opened("soon"))
    b.link.send(Opened("soon"))
    await until(lambda: b.finished("soon"))
    assert order[:2] == ["token", "complete"]


async def test_a_prompt_behind_a_reservation_that_is_given_up_has_its_turn(sides: tuple[Side, Side]) -> None:
    a, b = sides
    b.link.send(Receive(job("there"), "there", a.address, TIMEOUT_S))
    hand_off(job("back"), giver=b, taker=a)
    await until(lambda: b.node.status().num_waiting == 2)
    b.link.send(Abort("there"))
    await until(lambda: b.opened("back"))
    a.link.send(Opened("back"))
    await until(lambda: a.finished("back"))


def test_a_prompt_waits_for_the_reservations_ahead_of_it_and_for_no_other() -> None:
    turns = Turns()
    assert not turns.prompt("first")
    turns.reserve("r1")
    assert turns.prompt("second")
    turns.reserve("r2")
    assert turns.settle("r1") == ["second"]
    assert turns.settle("r1") == []
    assert turns.settle("r2") == []
    assert not turns.prompt("third")


Worker = int
HandOff = tuple[Worker, Worker]
"""Giver and taker."""


def _stuck(order: tuple[HandOff, ...], opening: tuple[int, ...], gated: bool) -> bool:
    """Whether some hand-offs never end. Each worker has room for one prompt. `order`: how the gateway asks; `opening`:
    who tries to take blocks first."""
    turns = {worker: Turns() for worker in range(3)}
    waiting: set[int] = set()
    for number, (giver, taker) in enumerate(order):
        turns[taker].reserve(str(number))
        if turns[giver].prompt(str(number)) and gated:
            waiting.add(number)
    holds: dict[Worker, int] = {}
    left, opened = set(range(len(order))), set[int]()
    moved = True
    while moved and left:
        moved = False
        for number in opening:
            giver, taker = order[number]
            if number in left and number not in opened and number not in waiting and giver not in holds:
                holds[giver], moved = number, True
                opened.add(number)
        for number in sorted(opened & left):
            giver, taker = order[number]
            if taker not in holds:  # it takes the KV, decodes, ends
                del holds[giver]
                left.discard(number)
                waiting -= {int(prompt) for prompt in turns[taker].settle(str(number))}
                moved = True
    return bool(left)


def test_no_circle_of_hand_offs_waits_for_itself_in_whatever_order_they_come() -> None:
    pairs = [(giver, taker) for giver in range(3) for taker in range(3) if giver != taker]
    orders = [order for count in (2, 3) for order in itertools.product(pairs, repeat=count)]
    cases = [(order, opening) for order in orders for opening in itertools.permutations(range(len(order)))]
    assert any(_stuck(order, opening, gated=False) for order, opening in cases)
    assert not any(_stuck(order, opening, gated=True) for order, opening in cases)
