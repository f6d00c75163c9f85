"""Real workers over links in one process: what a client sees, and what is left behind."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec.structs import replace
from transformers import LlamaForCausalLM

from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.dispatch import Dispatch
from cluster.local import LocalCluster, local_cluster
from cluster.node import WorkerNode
from cluster.router import Candidate, Route
from cluster.routes import Way
from core.errors import InternalError
from core.types import Finish, FinishReason, Request, SamplingParams, TokenDelta
from engine.step import StepOutput
from tests.held import Held
from tests.tiny import all_handed_over

TIMEOUT_S = 60.0
LAYOUTS: dict[str, dict[str, Any]] = {
    "disaggregated": {},
    "colocated": {"colocated": True},
    "chunked": {"max_num_batched_tokens": 16, "max_num_seqs": 16},
    "two-by-two": {"prefill_replicas": 2, "decode_replicas": 2},
    "split": {"tensor_parallel_size": 2},
    "split, colocated": {"pipeline_parallel_size": 2, "colocated": True},
    "prefill split": {"prefill_tensor_parallel_size": 2},
    "decode split": {"tensor_parallel_size": 2, "prefill_tensor_parallel_size": 1, "prefill_pipeline_parallel_size": 2},
}


def config(**settings: Any) -> SlipstreamConfig:
    return load(None, all_handed_over({"dtype": "float32", "kv_cache_memory": "4MiB"} | settings))


def request(name: str, prompt: list[int], max_tokens: int = 8, **sampling: Any) -> Request:
    params = SamplingParams(**({"max_tokens": max_tokens, "temperature": 0.0} | sampling))
    return Request(request_id=name, prompt_token_ids=prompt, sampling=params, deadline=time.time() + TIMEOUT_S)


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(3, 128), k=length)


async def collect(deltas: AsyncIterator[TokenDelta]) -> tuple[list[int], Finish | None]:
    tokens, finish = [], None
    async for delta in deltas:
        assert finish is None, "something came after the end"
        assert delta.index == len(tokens)
        tokens += delta.token_ids
        finish = delta.finish
    return tokens, finish


async def run(cluster: LocalCluster, job: Request) -> tuple[list[int], Finish | None]:
    return await asyncio.wait_for(collect(cluster.backend.generate(job)), TIMEOUT_S)


def expected(model: LlamaForCausalLM, ids: list[int], count: int) -> list[int]:
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        return model.generate(torch.tensor([ids]), max_new_tokens=count, do_sample=False)[0, len(ids) :].tolist()


async def all_free(cluster: LocalCluster) -> None:
    """Wait until every block of every worker is free."""

    def busy() -> bool:
        return any(n.status().num_free_blocks != n.status().num_blocks for n in cluster.nodes.values())

    async with asyncio.timeout(TIMEOUT_S):
        while busy():  # the engines report between two steps
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_greedy_output_is_that_of_transformers_in_every_layout(
    tiny: tuple[LlamaForCausalLM, Path], layout: str
) -> None:
    model, folder = tiny
    prompts = [prompt(5 + 9 * i, i) for i in range(12)]
    async with local_cluster(config(**LAYOUTS[layout]), folder) as cluster:
        alone = [(await run(cluster, request("a", prompts[0])))[0]]
        results = await asyncio.gather(*(run(cluster, request(f"r{i}", p)) for i, p in enumerate(prompts)))
        await all_free(cluster)
    want = [expected(model, p, 8) for p in prompts]
    assert alone == want[:1]
    assert [tokens for tokens, _ in results] == want
    assert {finish.reason for _, finish in results if finish} == {FinishReason.LENGTH}


async def test_two_that_come_when_all_workers_are_idle_go_to_one_each(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """Whatever the workers said while the one before was there."""
    async with local_cluster(config(colocated=True, decode_replicas=2), tiny[1]) as cluster:
        for turn in range(4):
            await run(cluster, request(f"before-{turn}", prompt(5, turn)))
            both = [run(cluster, request(f"{turn}-{n}", prompt(5, 10 * turn + n), 40)) for n in (1, 2)]
            tasks = [asyncio.create_task(one) for one in both]
            under_way = cluster.backend._attempts.values()
            while len(under_way) < 2:
                await asyncio.sleep(0)
            assert len({flight.way.route.decode.worker_id for flight in under_way}) == 2
            await asyncio.gather(*tasks)


@pytest.mark.parametrize("transport", ["tcp", "torch_distributed"])
async def test_a_transport_that_was_asked_for_carries_every_hand_off(
    tiny: tuple[LlamaForCausalLM, Path], transport: str
) -> None:
    model, folder = tiny
    settings = LAYOUTS["disaggregated"] | {"kv_transport": transport}
    async with local_cluster(config(**settings), folder) as cluster:
        assert (await run(cluster, request("a", prompt(40))))[0] == expected(model, prompt(40), 8)
        decode = cluster.nodes["decode-0"].status().counters
        assert (decode.transfers_committed, decode.transport_fallbacks) == (1, 0)


@pytest.mark.parametrize(("setting", "codec"), [("none", "none"), ("int8", "int8"), ("auto", "none")])
async def test_a_codec_makes_hand_offs_smaller_and_what_it_changes_is_no_prefix_for_others(
    tiny: tuple[LlamaForCausalLM, Path], setting: str, codec: str
) -> None:
    """So little KV tells `auto` nothing of the link."""
    model, folder = tiny
    async with local_cluster(config(kv_codec=setting, kv_transport="tcp"), folder) as cluster:
        for name in "ab":
            deltas = [delta async for delta in cluster.backend.generate(request(name, prompt(100)))]
            tokens = [token for delta in deltas for token in delta.token_ids]
            assert len(tokens) == 8
            assert codec != "none" or tokens == expected(model, prompt(100), 8)
            assert {delta.inexact_kv for delta in deltas[1:]} == {codec != "none"}  # those of the decode worker
        await all_free(cluster)
        prefill, decode = (cluster.nodes[name].status().counters for name in ("prefill-0", "decode-0"))
    assert list(decode.transfer_wire_bytes) == [codec]
    if codec == "none":
        assert decode.transfer_wire_bytes[codec] == decode.transfer_bytes
        assert prefill.transfer_encode_seconds == decode.transfer_decode_seconds == 0
    else:
        assert decode.transfer_wire_bytes[codec] < decode.transfer_bytes
        assert min(prefill.transfer_encode_seconds, decode.transfer_decode_seconds) > 0
    assert prefill.prefix_cache_hits > 0
    assert (decode.prefix_cache_hits > 0) == (codec == "none")


async def test_a_transport_that_cannot_be_used_costs_the_hand_off_and_not_the_request(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    monkeypatch.setattr("kv_transfer.transports.shared_memory.host_identity", lambda: uuid.uuid4().hex)
    settings = LAYOUTS["disaggregated"] | {"kv_transport": "shared_memory"}
    async with local_cluster(config(**settings), folder) as cluster:
        assert (await run(cluster, request("a", prompt(40))))[0] == expected(model, prompt(40), 8)
        decode = cluster.nodes["decode-0"].status().counters
        assert decode.transfers_committed == 0
        assert decode.transport_fallbacks > 0


async def test_a_hand_off_counts_once_where_it_is_taken_and_its_offer_where_it_is_given(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        await run(cluster, request("a", prompt(40)))
        await all_free(cluster)
        counted = {name: node.status().counters for name, node in cluster.nodes.items()}
    assert {n: c.transfers_committed for n, c in counted.items()} == {"prefill-0": 0, "decode-0": 1}
    assert {n: c.offers_committed for n, c in counted.items()} == {"prefill-0": 1, "decode-0": 0}


async def test_hand_offs_whose_order_differs_on_the_two_sides_do_not_wait_for_each_others_blocks(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each side has room for two prompts. While the prefill worker computes, two come, then two more urgent ones."""
    async with local_cluster(config(kv_cache_memory="264KiB"), tiny[1]) as cluster:
        held = Held(monkeypatch, cluster.nodes["prefill-0"].runner)
        ends = [asyncio.create_task(run(cluster, request("first", prompt(20), max_tokens=1)))]
        await asyncio.to_thread(held.begun.wait, TIMEOUT_S)
        for priority in (1, 0):
            jobs = [request(f"{priority}.{i}", prompt(150, 2 * priority + i), max_tokens=3) for i in range(2)]
            ends += [asyncio.create_task(run(cluster, replace(job, priority=priority))) for job in jobs]
            async with asyncio.timeout(TIMEOUT_S):
                while cluster.nodes["decode-0"].num_owned < len(ends) - 1:
                    await asyncio.sleep(0.01)
        held.go_on.set()
        assert [len(tokens) for tokens, _ in await asyncio.gather(*ends)] == [1, 3, 3, 3, 3]
        await all_free(cluster)


async def test_the_same_seed_gives_the_same_text_wherever_it_runs(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    job = request("s", prompt(30), max_tokens=20, temperature=1.0, seed=5, top_p=0.9)
    texts = []
    for layout in ("disaggregated", "colocated"):
        async with local_cluster(config(**LAYOUTS[layout]), tiny[1]) as cluster:
            others = [request(f"o{i}", prompt(9, i), temperature=1.0, seed=i) for i in range(5)]
            results = await asyncio.gather(*(run(cluster, r) for r in [job, *others]))
            texts.append(results[0][0])
    assert texts[0] == texts[1]
    assert len(texts[0]) == 20


async def test_a_request_that_ends_with_its_first_token_never_reaches_the_decode_worker(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        tokens, finish = await run(cluster, request("one", prompt(20), max_tokens=1))
        await all_free(cluster)
        assert cluster.nodes["decode-0"].status().counters.generated_tokens == 0
    assert len(tokens) == 1
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH


async def test_stop_tokens_end_the_output_on_either_side(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    want = expected(model, prompt(20), 8)
    async with local_cluster(config(), folder) as cluster:
        for position in (0, 4):
            stop = want[position]
            tokens, finish = await run(cluster, request(f"s{position}", prompt(20), stop_token_ids=(stop,)))
            assert tokens == want[: want.index(stop) + 1]
            assert finish == Finish(reason=FinishReason.STOP, stop_token_id=stop)


async def test_a_repeated_prompt_comes_from_the_prefix_caches_of_both_sides(
    tiny: tuple[LlamaForCausalLM, Path],
) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        first = await run(cluster, request("a", prompt(100)))
        deltas = [d async for d in cluster.backend.generate(request("b", prompt(100)))]
        moved = cluster.nodes["decode-0"].status().counters.transfer_bytes
    assert [t for d in deltas for t in d.token_ids] == first[0]
    assert deltas[0].num_cached_tokens == 96
    per_token = 3 * 2 * 2 * 16 * 4
    assert moved == (100 + 4) * per_token


@pytest.mark.parametrize("handoff_min_tokens", [0, 32])
async def test_choices_of_one_request_have_their_prompt_computed_and_handed_over_once(
    tiny: tuple[LlamaForCausalLM, Path], handoff_min_tokens: int
) -> None:
    """Either each is handed over, of which only the first brings more than its last tokens, or the others are computed
    where the first is decoded."""
    model, folder = tiny
    ids, num_choices = prompt(200), 4
    async with local_cluster(config(handoff_min_tokens=handoff_min_tokens), folder) as cluster:
        results = await asyncio.gather(*(run(cluster, request(f"r{i}", ids)) for i in range(num_choices)))
        await all_free(cluster)
        prefill, decode = (cluster.nodes[name].status().counters for name in ("prefill-0", "decode-0"))
        token_bytes = cluster.nodes["decode-0"].runner.layout.token_bytes
    assert [tokens for tokens, _ in results] == [expected(model, ids, 8)] * num_choices
    assert decode.transfers_committed == (num_choices if handoff_min_tokens == 0 else 1)
    shared = 200 // 16 * 16
    assert decode.transfer_bytes <= token_bytes * (200 + (num_choices - 1) * (200 - shared))
    assert prefill.step_tokens + decode.step_tokens <= 200 + num_choices * (200 - shared + 8)


async def test_a_lost_decode_worker_costs_time_and_no_token(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    async with local_cluster(config(), folder) as cluster:
        stream = cluster.backend.generate(request("r", prompt(20), max_tokens=100))
        tokens = [t for _ in range(5) for t in (await anext(stream)).token_ids]
        await cluster.remove_worker("decode-0")
        rest, finish = [], None
        async for delta in stream:
            rest += delta.token_ids
            finish = delta.finish
        await all_free(cluster)
    assert tokens + rest == expected(model, prompt(20), 100)
    assert finish is not None
    assert finish.reason is FinishReason.LENGTH


async def test_without_its_prefill_worker_the_decode_worker_does_it_all(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    async with local_cluster(config(), folder) as cluster:
        await cluster.remove_worker("prefill-0")
        tokens, _ = await run(cluster, request("r", prompt(20)))
    assert tokens == expected(model, prompt(20), 8)


async def test_a_prompt_no_worker_can_hold_ends_with_the_callers_error(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        tokens, finish = await run(cluster, request("big", prompt(300)))
    assert tokens == []
    assert finish is not None
    assert finish.error == "InvalidRequest"


async def test_the_deadline_ends_a_request_and_frees_it(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        held = Held(monkeypatch, cluster.nodes["decode-0"].runner)
        _, finish = await run(cluster, replace(request("late", prompt(20)), deadline=time.time() + 0.05))
        held.go_on.set()
        await all_free(cluster)
    assert finish is not None
    assert finish.error == "DeadlineExceeded"


async def test_requests_cancelled_at_random_moments_leave_nothing_behind(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    """200 requests, most of them dropped by the client at some point: every block is free at the end."""
    rng = random.Random(4)  # 52 have all the time there is, and 52 none
    ends: list[str] = []
    async with local_cluster(config(), tiny[1]) as cluster:

        async def one(index: int) -> None:
            job = request(f"c{index}", prompt(rng.randrange(1, 120), index % 7), max_tokens=rng.randrange(1, 40))
            patience = rng.choice([None, 0.0, rng.random() * 0.2, rng.random() * 2])
            try:
                async with asyncio.timeout(patience):
                    _, finish = await collect(cluster.backend.generate(job))
                    assert finish is not None
                    ends.append(finish.reason)
            except TimeoutError:
                ends.append("cancelled")

        limit = asyncio.Semaphore(24)

        async def bounded(index: int) -> None:
            async with limit:
                await one(index)

        await asyncio.wait_for(asyncio.gather(*(bounded(i) for i in range(200))), TIMEOUT_S)
        await all_free(cluster)
        for node in cluster.nodes.values():
            assert node.num_owned == 0
    assert len(ends) == 200
    assert ends.count("cancelled") > 40
    assert ends.count(FinishReason.LENGTH) > 40


def break_engine(monkeypatch: pytest.MonkeyPatch, node: WorkerNode) -> None:
    """As it computes its next step."""

    def fail(_: object) -> Future[StepOutput]:
        future: Future[StepOutput] = Future()
        future.set_exception(RuntimeError("device lost"))
        return future

    monkeypatch.setattr(node.runner, "submit", fail)


@pytest.mark.parametrize("broken", ["prefill-0", "decode-0"])
async def test_a_broken_engine_is_left_at_once_for_the_workers_that_compute(
    tiny: tuple[LlamaForCausalLM, Path], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = tiny
    async with local_cluster(config(), folder) as cluster:
        break_engine(monkeypatch, cluster.nodes[broken])
        results = await asyncio.gather(*(run(cluster, request(f"r{i}", prompt(20))) for i in range(4)))
        assert [tokens for tokens, _ in results] == [expected(model, prompt(20), 8)] * 4
        with pytest.raises(InternalError, match="device lost"):
            cluster.nodes[broken].check_health()
        async with asyncio.timeout(TIMEOUT_S):
            while {w.worker_id for w in cluster.backend.status().workers} & {broken}:
                await asyncio.sleep(0.01)


async def test_an_attempt_that_failed_does_not_count_where_the_next_may_go(
    tiny: tuple[LlamaForCausalLM, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with local_cluster(config(), tiny[1]) as cluster:
        routes, seen = cluster.backend._routes, list[dict[str, int]]()
        choose = routes.choose

        def looked_at(way: Way, dispatch: Dispatch, candidates: Sequence[Candidate], local_to: str | None) -> Route:
            seen.append({candidate.worker_id: candidate.in_flight for candidate in candidates})
            return choose(way, dispatch, candidates, local_to)

        monkeypatch.setattr(routes, "choose", looked_at)
        break_engine(monkeypatch, cluster.nodes["prefill-0"])
        assert len((await run(cluster, request("alone", prompt(20))))[0]) == 8
    assert len(seen) > 1
    assert {count for candidates in seen for count in candidates.values()} == {0}


async def test_a_request_from_which_no_token_can_be_drawn_ends_alone(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    model, folder = tiny
    everything = tuple(range(128))
    async with local_cluster(config(), folder) as cluster:
        poison = run(cluster, request("p", prompt(20), stop_token_ids=everything, min_tokens=2))
        good = run(cluster, request("g", prompt(30)))
        (_, finish), (tokens, _) = await asyncio.gather(poison, good)
        for node in cluster.nodes.values():
            node.check_health()
        await all_free(cluster)
    assert finish is not None
    assert finish.error == "Undrawable"
    assert tokens == expected(model, prompt(30), 8)


async def test_short_prompts_are_prefilled_where_they_are_decoded(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    _, folder = tiny
    async with local_cluster(config(handoff_min_tokens=40), folder) as cluster:
        await run(cluster, request("short", prompt(39)))
        await run(cluster, request("long", prompt(40, seed=1)))
        assert cluster.backend.status().routes == {
            "handoff": 1,
            "colocated": 0,
            "not_worth_it": 1,
            "prefill_only": 0,
            "fallback": 0,
        }


async def test_a_conversation_goes_on_where_its_kv_is(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    _, folder = tiny
    async with local_cluster(config(handoff_min_tokens="auto"), folder) as cluster:
        question = prompt(64)
        answer, _ = await run(cluster, request("first", question, max_tokens=60))
        follow_up = [*question, *answer, *prompt(8, seed=1)]
        text, _ = await run(cluster, request("second", follow_up))
        assert cluster.backend.status().routes["handoff"] == 1
        assert cluster.backend.status().routes["not_worth_it"] == 1
        await run(cluster, request("other", prompt(64, seed=2)))
        assert cluster.backend.status().routes["handoff"] == 2
    async with local_cluster(config(colocated=True), folder) as alone:
        assert text == (await run(alone, request("again", follow_up)))[0]


async def test_without_a_prefix_cache_everything_has_to_be_computed(tiny: tuple[LlamaForCausalLM, Path]) -> None:
    _, folder = tiny
    async with local_cluster(config(handoff_min_tokens="auto", prefix_caching=False), folder) as cluster:
        for name in ("first", "second"):
            await run(cluster, request(name, prompt(64)))
        assert cluster.backend.status().routes["handoff"] == 2
