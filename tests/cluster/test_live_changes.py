"""Roles, numbers and steps of workers change under load: every request ends once, with the tokens it should have."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.local import LocalCluster, local_cluster
from cluster.membership import Plan
from cluster.node import WorkerNode
from cluster.worker import load_runner
from core.errors import Unavailable
from core.links import Link, LinkClient
from core.types import FinishReason, Request, Role, SamplingParams, TokenDelta
from core.wire import WORKER_SERVICE, FromWorker, ToWorker
from engine.parallel.runner import GroupRunner
from engine.runner import ModelRunner
from tests.held import Held
from tests.tiny import all_handed_over

TIMEOUT_S = 60.0
P, D, B = Role.PREFILL, Role.DECODE, Role.BOTH


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers announce themselves, and the gateway asks who is there, without keeping a test waiting."""
    monkeypatch.setattr("cluster.attendance.ANNOUNCE_PERIOD_S", 0.05)
    monkeypatch.setattr("cluster.client.MEMBERS_PERIOD_S", 0.05)


def config(**settings: object) -> SlipstreamConfig:
    given = {"dtype": "float32", "kv_cache_memory": "512KiB", "drain_timeout_s": TIMEOUT_S}
    return load(None, all_handed_over(given | settings))


def job(number: int) -> Request:
    rng = random.Random(number)
    return Request(
        request_id=f"r{number}",
        prompt_token_ids=rng.choices(range(3, 128), k=rng.randrange(10, 100)),
        sampling=SamplingParams(max_tokens=rng.randrange(2, 60), temperature=0.0),
        deadline=time.time() + TIMEOUT_S,
    )


def right(model: LlamaForCausalLM, request: Request, tokens: list[int]) -> bool:
    """Whether these are all that greedy decoding gives, by one pass of Transformers over them."""
    prompt = request.prompt_token_ids
    with torch.inference_mode():
        likeliest = model(torch.tensor([[*prompt, *tokens[:-1]]])).logits[0, len(prompt) - 1 :].argmax(-1)
    return len(tokens) == request.sampling.max_tokens and likeliest.tolist() == tokens


async def collect(deltas: AsyncIterator[TokenDelta]) -> list[int]:
    tokens: list[int] = []
    ended = 0
    async for delta in deltas:
        assert ended == 0, "something came after the end"
        assert delta.index == len(tokens), "tokens came twice, or not at all"
        tokens += delta.token_ids
        ended += delta.finish is not None
        if delta.finish is not None:
            assert delta.finish.reason is FinishReason.LENGTH, delta.finish
    assert ended == 1
    return tokens


class Load:
    """So many requests at once, over and over, until it is told to stop."""

    def __init__(self, cluster: LocalCluster, at_once: int = 6) -> None:
        self.cluster = cluster
        self.answers: dict[int, list[int]] = {}
        self.stopped = False
        self.tasks = [asyncio.create_task(self.ask(first, at_once)) for first in range(at_once)]

    async def ask(self, number: int, step: int) -> None:
        while not self.stopped:
            self.answers[number] = await collect(self.cluster.backend.generate(job(number)))
            number += step

    async def more(self, count: int = 6) -> None:
        """Until so many more have ended."""
        target = len(self.answers) + count
        async with asyncio.timeout(TIMEOUT_S):
            while len(self.answers) < target:
                await asyncio.wait(self.tasks, timeout=0.02, return_when=asyncio.FIRST_EXCEPTION)
                for task in self.tasks:
                    if task.done():
                        task.result()

    async def stop(self) -> dict[int, list[int]]:
        self.stopped = True
        await asyncio.wait_for(asyncio.gather(*self.tasks), TIMEOUT_S)
        return self.answers


def roles(cluster: LocalCluster) -> Counter[Role]:
    """As the gateway sees them."""
    return Counter(w.role for w in cluster.backend.status().workers if not w.leaving)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def arranged(cluster: LocalCluster, wanted: dict[Role, int]) -> None:
    await until(lambda: roles(cluster) == Counter(wanted))


def replan(cluster: LocalCluster, wanted: dict[Role, int], step_tokens: int | None = None) -> None:
    before = cluster.membership.plan
    cluster.membership.plan = Plan(plan_id=before.plan_id + 1, wanted=wanted, step_tokens=step_tokens)


async def all_free(cluster: LocalCluster) -> None:
    def idle(node: WorkerNode) -> bool:
        return node.status().num_free_blocks == node.status().num_blocks and not node.num_owned

    await until(lambda: all(map(idle, cluster.nodes.values())))


async def test_no_request_is_lost_or_doubled_while_roles_numbers_and_steps_change(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    async with local_cluster(config(max_num_seqs=8), folder) as cluster:
        load = Load(cluster)
        await load.more()
        for wanted, step_tokens in (
            ({P: 1, D: 2}, None),
            ({P: 2, D: 1}, 16),
            ({P: 1, D: 2}, 64),
            ({B: 3}, 32),
            ({P: 1, D: 1}, None),
            ({P: 2, D: 1}, None),
        ):
            replan(cluster, wanted, step_tokens)
            await cluster.scale(sum(wanted.values()))
            await arranged(cluster, wanted)
            await load.more()
        answers = await load.stop()
        await all_free(cluster)
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


async def test_two_workers_that_swap_their_roles_under_load_keep_nobody_waiting(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    settings = config(kv_cache_memory="192KiB", max_num_seqs=8)  # room for two prompts or three
    async with local_cluster(settings, folder) as cluster:
        load = Load(cluster, at_once=8)
        a, b = cluster.nodes.values()
        for _ in range(6):
            await load.more(3)
            first, second = (P, D) if a.role is D else (D, P)
            a.set_role(first, 256)
            b.set_role(second, 256)
        answers = await load.stop()
        await all_free(cluster)
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


async def test_a_worker_whose_coming_is_cancelled_is_closed(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = threading.Event(), threading.Event()
    loaded: list[ModelRunner | GroupRunner] = []

    def slowly(*given: Any) -> ModelRunner | GroupRunner:
        begun.set()
        assert go_on.wait(TIMEOUT_S)
        loaded.append(load_runner(*given))
        return loaded[0]

    async with local_cluster(config(colocated=True), tiny[1]) as cluster:
        monkeypatch.setattr("cluster.local.load_runner", slowly)
        coming = asyncio.create_task(cluster.add_worker("late", B))
        await asyncio.to_thread(begun.wait, TIMEOUT_S)
        coming.cancel()
        asyncio.get_running_loop().call_later(0, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await asyncio.wait_for(coming, TIMEOUT_S)
        assert list(cluster.nodes) == [member.worker_id for member in cluster.membership.members()] == ["both-0"]
        assert loaded[0].pool.fd is None


async def test_a_worker_that_fails_as_it_stops_holds_no_devices_any_more(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or none would ever be started in its place."""
    async with local_cluster(config(colocated=True, decode_replicas=2), tiny[1]) as cluster:
        stop = cluster.nodes["both-1"].stop

        async def fail() -> None:
            await stop()
            raise RuntimeError("it hung")

        monkeypatch.setattr(cluster.nodes["both-1"], "stop", fail)
        with pytest.raises(RuntimeError, match="it hung"):
            await cluster.remove_worker("both-1")
        assert not cluster.stopping


async def test_a_worker_that_leaves_ends_what_it_has_and_gets_nothing_more(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    async with local_cluster(config(colocated=True, decode_replicas=2), folder) as cluster:
        held = {name: Held(monkeypatch, node.runner) for name, node in cluster.nodes.items()}
        answer = asyncio.create_task(collect(cluster.backend.generate(job(2))))
        await until(lambda: any(node.num_owned for node in cluster.nodes.values()))
        (busy,) = [name for name, node in cluster.nodes.items() if node.num_owned]
        (idle,) = held.keys() - {busy}
        held[idle].go_on.set()
        leaving = asyncio.create_task(cluster.retire_worker(busy))
        await until(lambda: any(w.leaving for w in cluster.backend.status().workers))
        other = await collect(cluster.backend.generate(job(1)))
        assert cluster.nodes[busy].num_owned == 1, "the request is still there, and nothing else"
        held[busy].go_on.set()
        tokens = await answer
        await asyncio.wait_for(leaving, TIMEOUT_S)
        assert busy not in cluster.nodes
        routes = cluster.backend.status().routes
    assert right(model, job(2), tokens)
    assert right(model, job(1), other)
    assert sum(routes.values()) == 2, "nothing was tried twice"


async def test_what_a_leaving_worker_does_not_end_in_its_time_goes_on_elsewhere(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    async with local_cluster(config(drain_timeout_s=0.0, lease_s=1.0), folder) as cluster:
        load = Load(cluster)
        await load.more()
        await cluster.retire_worker("decode-0")
        await load.more()
        answers = await load.stop()
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


async def test_what_a_worker_has_said_is_heard_though_it_stops(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """As when a worker that leaves has just ended its last request."""
    async with local_cluster(config(colocated=True), tiny[1]) as cluster:
        client = LinkClient(cluster.address("both-0"))
        link: Link[FromWorker, ToWorker] = await client.open(WORKER_SERVICE, FromWorker, ToWorker)  # type: ignore[arg-type]
        heard = aiter(link)
        await anext(heard)
        for number in range(1000):
            cluster.nodes["both-0"].set_role(B, 100 + number)
        stopping = asyncio.create_task(cluster.remove_worker("both-0"))
        assert len([message async for message in heard]) >= 1000
        await stopping
        await client.close()


async def test_the_last_worker_is_asked_even_as_it_leaves(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_cluster(config(colocated=True), tiny[1]) as cluster:
        node = cluster.nodes["both-0"]
        held = Held(monkeypatch, node.runner)
        first = asyncio.create_task(collect(cluster.backend.generate(job(1))))
        await until(lambda: node.num_owned == 1)
        leaving = asyncio.create_task(cluster.retire_worker("both-0"))
        await until(lambda: cluster.backend.status().workers[0].leaving)
        second = asyncio.create_task(collect(cluster.backend.generate(job(2))))
        await until(lambda: node.num_owned == 2)
        held.go_on.set()
        await asyncio.gather(first, second, leaving)
        await until(lambda: not cluster.backend.status().workers)  # its link ends a moment after it
        with pytest.raises(Unavailable):
            await collect(cluster.backend.generate(job(3)))
