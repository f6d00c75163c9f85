"""Speculation from the configuration to what a client reads, over workers in this process."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import LlamaForCausalLM

from cluster import attendance, worker
from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.front import offer
from cluster.local import LocalCluster, local_cluster
from cluster.membership import Member, Membership, Orders, Plan
from core.errors import InternalError, ModelError
from core.metrics import GatewayMetrics
from core.types import Request, Role, SamplingParams, SpeculationWish
from core.wire import SpeculationCounters
from gateway.app import create_app
from gateway.config import GatewayConfig
from gateway.tokenizer import ServedModel
from speculation.drafters.registry import registered
from speculation.in_batch import InBatch
from speculation.protocols import Drafter
from tests.e2e.conftest import save_tokenizer
from tests.speculation.copier import COPIER
from tests.speculation.failing import FAILING
from tests.speculation.hanging import HANGING, Hanging
from tests.tiny import all_handed_over

TIMEOUT_S = 60.0
LENGTH = 40
LAYOUTS: dict[str, dict[str, Any]] = {
    "disaggregated": {},
    "colocated": {"colocated": True},
    "split, colocated": {"pipeline_parallel_size": 2, "colocated": True},
    "split": {"pipeline_parallel_size": 2},
    "wider where prompts are computed": {"prefill_tensor_parallel_size": 2},
}
COPYING: dict[str, Any] = {"speculation": "copier", "speculation_controller": "fixed", "speculation_budget": 6}
PROMPTS = [random.Random(seed).choices(range(3, 128), k=5 + 9 * seed) for seed in range(1, 5)]


@pytest.fixture(autouse=True)
def copier() -> Iterator[None]:
    with registered(COPIER):
        yield


def config(**settings: Any) -> SlipstreamConfig:
    return load(None, all_handed_over({"dtype": "float32", "kv_cache_memory": "4MiB"} | settings))


def request(name: str, prompt: list[int], wish: SpeculationWish | None = None, **sampling: Any) -> Request:
    params = SamplingParams(**({"max_tokens": LENGTH, "temperature": 0.0} | sampling))
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling=params,
        deadline=time.time() + TIMEOUT_S,
        speculation=wish,
    )


@dataclass
class Answer:
    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0
    accepted: int = 0
    own: list[int] = field(default_factory=list)
    """Of each delta, the tokens that no drafter has proposed."""


async def run(cluster: LocalCluster, *jobs: Request) -> list[Answer]:
    async def one(job: Request) -> Answer:
        answer = Answer()
        async for delta in cluster.backend.generate(job):
            answer.token_ids += delta.token_ids
            answer.drafted += delta.num_drafted_tokens
            answer.accepted += delta.num_accepted_tokens
            answer.own.append(len(delta.token_ids) - delta.num_accepted_tokens)
        return answer

    return await asyncio.wait_for(asyncio.gather(*(one(job) for job in jobs)), TIMEOUT_S)


def expected(model: LlamaForCausalLM, prompt: Sequence[int]) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        ids = model.generate(torch.tensor([prompt]), max_new_tokens=LENGTH, do_sample=False)[0]
    return ids[len(prompt) :].tolist()


def counted(cluster: LocalCluster, worker: str) -> SpeculationCounters | None:
    return cluster.nodes[worker].status().counters.speculation


async def drafters_made(cluster: LocalCluster, name: str) -> None:
    async with asyncio.timeout(TIMEOUT_S):
        while counted(cluster, name) is None:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_greedy_output_is_that_of_transformers_and_drafts_are_counted_where_they_were_made(
    tiny: tuple[LlamaForCausalLM, Path], layout: str
) -> None:
    model, folder = tiny
    async with local_cluster(config(**COPYING, **LAYOUTS[layout]), folder) as cluster:
        wishes = [SpeculationWish(budget=0), SpeculationWish(budget=2), None, None]
        jobs = [request(f"r{i}", prompt, wishes[i]) for i, prompt in enumerate(PROMPTS)]
        answers = await run(cluster, *jobs)
        counters = {name: counted(cluster, name) for name in cluster.nodes}
        steps = {name: node.status().counters.steps for name, node in cluster.nodes.items()}
    assert [answer.token_ids for answer in answers] == [expected(model, prompt) for prompt in PROMPTS]
    assert (answers[0].drafted, answers[0].accepted) == (0, 0)
    assert all(answer.drafted >= answer.accepted > 0 for answer in answers[1:])
    decode = counters.pop("both-0" if "colocated" in layout else "decode-0")
    assert list(counters.values()) == [None] * len(counters)
    assert decode is not None
    [copier] = decode.drafters
    assert copier.draft_tokens == sum(answer.drafted for answer in answers)
    assert copier.accepted_tokens == sum(answer.accepted for answer in answers)
    assert copier.accepted_tokens == sum(copier.accepted_per_position)
    assert 0 < copier.alpha_sum <= copier.accepted_tokens
    assert copier.alpha_sum < copier.alpha_positions
    assert decode.draft_seconds > 0 < decode.verify_seconds
    assert steps["both-0" if "colocated" in layout else "decode-0"] > 0


async def test_a_drafter_that_fails_where_prompts_are_computed_is_told_of(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    with registered(FAILING):
        async with local_cluster(config(**COPYING | {"speculation": "failing"}), folder) as cluster:
            before = counted(cluster, "prefill-0")
            [answer] = await run(cluster, request("r", PROMPTS[2]))
            after = counted(cluster, "prefill-0")
    assert answer.token_ids == expected(model, PROMPTS[2])
    assert before is None
    assert after is not None
    assert (after.switched_off, after.drafters) == (["failing"], [])


async def test_a_worker_whose_drafter_never_comes_back_is_given_up_and_its_requests_go_elsewhere(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What Serve does once the worker says that it is not well, is done by hand here."""
    model, folder = tiny
    monkeypatch.setattr("speculation.crew.LOST_S", 0.3)
    two = {"speculation": "hanging", "decode_replicas": 2, "drain_timeout_s": 10 * TIMEOUT_S}
    with registered(HANGING):
        async with local_cluster(config(**COPYING | two), folder) as cluster:
            answers = asyncio.create_task(run(cluster, *(request(f"r{i}", prompt) for i, prompt in enumerate(PROMPTS))))
            async with asyncio.timeout(TIMEOUT_S):
                while (
                    len(lost := unwell(cluster)) != 1 or not Hanging.hangs.is_set()
                ):  # after a standstill others seem so
                    await asyncio.sleep(0.01)
                retiring = asyncio.create_task(cluster.retire_worker(*lost))
                found = await answers
            Hanging.wake.set()
            await retiring
            assert not unwell(cluster)
    assert "drafter hanging has not given the engine's thread back" in "".join(lost.values())
    assert [answer.token_ids for answer in found] == [expected(model, prompt) for prompt in PROMPTS]


def unwell(cluster: LocalCluster) -> dict[str, str]:
    """Workers whose health checks fail, and why."""
    found = {}
    for name, node in cluster.nodes.items():
        try:
            node.check_health()
        except InternalError as error:
            found[name] = error.message
    return found


async def test_what_counts_as_accepted_ends_with_a_stop_token_inside_a_draft(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    prompt = [*PROMPTS[3], *expected(model, PROMPTS[3])]  # which repeats itself, and so do its continuations
    want = expected(model, prompt)
    async with local_cluster(config(**COPYING, colocated=True), folder) as cluster:
        jobs = [request(f"r{token}", prompt, stop_token_ids=(token,)) for token in sorted(set(want))]
        answers = await run(cluster, *jobs)
    for job, answer in zip(jobs, answers, strict=True):
        assert answer.token_ids == want[: want.index(job.sampling.stop_token_ids[0]) + 1]
        assert set(answer.own[:-1]) <= {1}
    assert {answer.own[-1] for answer in answers} == {0, 1}


async def test_a_drawn_text_is_the_same_with_and_without_drafts_unless_its_rule_has_dice_of_its_own(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    drawn = {"temperature": 0.7, "seed": 3}
    async with local_cluster(config(**COPYING, colocated=True), tiny[1]) as cluster:
        wishes = [SpeculationWish(budget=0), None, SpeculationWish(rule="tree")]
        plain, sampled, tree = await run(
            cluster, *(request(f"r{i}", PROMPTS[3], wish, **drawn) for i, wish in enumerate(wishes))
        )
    assert plain.token_ids == sampled.token_ids != tree.token_ids
    assert min(sampled.drafted, tree.drafted) > 0


async def test_a_worker_that_is_given_another_role_speculates_from_then_on(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    model, folder = tiny
    async with local_cluster(config(**COPYING), folder) as cluster:
        await cluster.remove_worker("decode-0")
        left = cluster.nodes["prefill-0"]
        [before] = await run(cluster, request("before", PROMPTS[2]))
        assert (before.drafted, counted(cluster, "prefill-0")) == (0, None)
        underway = asyncio.create_task(run(cluster, request("underway", PROMPTS[1])))
        left.set_role(Role.BOTH, 512)
        await drafters_made(cluster, "prefill-0")
        [after] = await run(cluster, request("after", PROMPTS[2]))
        [overtaken] = await underway
    assert before.token_ids == after.token_ids == expected(model, PROMPTS[2])
    assert overtaken.token_ids == expected(model, PROMPTS[1])
    assert after.drafted > 0


async def test_a_drafter_that_cannot_be_made_on_a_worker_at_work_is_switched_off_there(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights may be gone since the cluster started; the worker decodes without it, and says so."""
    model, folder = tiny

    def gone(name: str, _surroundings: object) -> Drafter:
        raise ModelError(f"drafter {name}: its folder is gone")

    async with local_cluster(config(**COPYING), folder) as cluster:
        await cluster.remove_worker("decode-0")
        monkeypatch.setattr("speculation.make.make_drafter", gone)
        cluster.nodes["prefill-0"].set_role(Role.BOTH, 512)
        await drafters_made(cluster, "prefill-0")
        [answer] = await run(cluster, request("after", PROMPTS[2]))
        told = counted(cluster, "prefill-0")
    assert (answer.drafted, answer.token_ids) == (0, expected(model, PROMPTS[2]))
    assert told is not None
    assert told.switched_off == [COPIER.name]


async def test_a_worker_is_heard_of_and_decodes_while_its_drafters_are_made(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[Role] = []
    readable = threading.Event()
    readable.set()
    make, announce = worker.make_speculator, Membership.announce

    def announced(membership: Membership, member: Member, now: float) -> Orders:
        heard.append(member.role)
        return announce(membership, member, now)

    def slowly(*given: Any, at_work: bool = False) -> InBatch:
        assert readable.wait(TIMEOUT_S)
        return make(*given, at_work=at_work)

    monkeypatch.setattr(attendance, "ANNOUNCE_PERIOD_S", 0.01)
    monkeypatch.setattr(Membership, "announce", announced)
    monkeypatch.setattr(worker, "make_speculator", slowly)
    async with local_cluster(config(**COPYING), tiny[1]) as cluster:
        readable.clear()
        await cluster.remove_worker("decode-0")
        cluster.membership.plan = Plan(plan_id=1, wanted={Role.BOTH: 1})
        async with asyncio.timeout(TIMEOUT_S):
            while heard.count(Role.BOTH) < 4:
                await asyncio.sleep(0.01)
        [meanwhile] = await run(cluster, request("meanwhile", PROMPTS[2]))
        readable.set()
        await drafters_made(cluster, "prefill-0")
        [after] = await run(cluster, request("after", PROMPTS[2]))
    assert meanwhile.drafted == 0 < after.drafted
    assert meanwhile.token_ids == after.token_ids


@contextlib.asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    save_tokenizer(folder)
    served = config(**settings)
    async with local_cluster(served, folder) as cluster:
        model = ServedModel.load(folder, ["tiny"], max_model_len=256)
        metrics = GatewayMetrics(CollectorRegistry(), model_name="tiny")
        app = create_app(cluster.backend, model, GatewayConfig(speculation=offer(served)), metrics)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://gateway") as client:
            yield client


async def test_a_client_is_told_of_drafts_and_may_do_without(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with serving(tiny[1], **COPYING) as client:

        async def complete(**body: Any) -> httpx.Response:
            body = {"prompt": PROMPTS[3], "max_tokens": LENGTH, "temperature": 0, "ignore_eos": True, **body}
            return await client.post("/v1/completions", json=body, timeout=TIMEOUT_S)

        off, on = [(await complete(**said)).json() for said in ({"speculation": False}, {})]
        assert off["choices"][0]["text"] == on["choices"][0]["text"]
        assert off["usage"]["completion_tokens_details"]["drafted_tokens"] == 0
        details = on["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] > 0
        assert sum(details.values()) == 2 * details["drafted_tokens"]
        text = off["choices"][0]["text"]
        for start in range(3, len(text) - 3, len(text) // 5):  # some of these end within a draft, others between two
            stop = text[start : start + 2]
            ends = [(await complete(stop=stop, **said)).json() for said in ({"speculation": False}, {})]
            (plain, drafted), lengths = zip(
                *((end["choices"][0], end["usage"]["completion_tokens"]) for end in ends), strict=True
            )
            assert plain == drafted
            assert (plain["text"], plain["finish_reason"]) == (text[: text.index(stop)], "stop")
            assert lengths[0] == lengths[1]
        for wrong in ({"drafter": "hybrid"}, {"rule": "typical"}, {"rule": "chain"}, {"budget": 7}):
            response = await complete(speculation=wrong)
            [name] = wrong
            assert (response.status_code, response.json()["error"]["param"]) == (400, f"speculation.{name}")

        async with asyncio.timeout(TIMEOUT_S):  # the workers tell with their next heartbeat
            while "slipstream:drafter_accepted_tokens_total{" not in (await client.get("/metrics")).text:
                await asyncio.sleep(0.01)


async def test_a_rule_that_is_not_lossless_is_had_by_its_name(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    settings = COPYING | {"colocated": True, "speculation_rule": "typical"}
    async with local_cluster(config(**settings), tiny[1]) as cluster:
        [answer] = await run(cluster, request("r", PROMPTS[3], temperature=1.0, seed=1))
    assert len(answer.token_ids) == LENGTH
    assert answer.accepted > 0
