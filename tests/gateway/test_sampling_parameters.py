"""best_of, logprobs of the prompt, and the seeds of requests that bring none."""

from __future__ import annotations

import random
import struct
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import MakeGateway, events

from core.types import Finish, FinishReason, PromptLogprobs, Request, TokenDelta, TokenLogprobs
from gateway import seeds
from gateway.params import derived_seed
from gateway.seeds import RepeatableSeeds, make_seeds
from gateway.tokenizer import ServedModel

PROMPT = [5, 6, 7]


def scores(num_top: int = 2) -> PromptLogprobs:
    """Of PROMPT: token 6 is the most likely, 7 the third and outside the top."""
    tops = [[(6, -0.5), (9, -1.5)], [(10, -0.25), (11, float("-inf"))]]
    flat = [entry for top in tops for entry in top[:num_top]]
    return PromptLogprobs(
        num_top,
        struct.pack("<2f", -0.5, -3.0),
        struct.pack("<2i", 1, 3),
        struct.pack(f"<{len(flat)}i", *(token_id for token_id, _ in flat)),
        struct.pack(f"<{len(flat)}f", *(logprob for _, logprob in flat)),
    )


def answers(outputs: dict[int, tuple[list[int], float]]) -> Any:
    """By candidate: its tokens and the logprob of each. Prompt logprobs come with the first, as asked."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        sampling = request.sampling
        tokens, logprob = outputs[int(request.request_id.rpartition("-")[2])]
        if not sampling.max_tokens:
            tokens = []
        yield TokenDelta(
            request_id=request.request_id,
            index=0,
            token_ids=tokens,
            logprobs=[TokenLogprobs(logprob, []) for _ in tokens] if sampling.logprobs is not None else None,
            prompt_logprobs=scores(sampling.prompt_logprobs) if sampling.prompt_logprobs is not None else None,
            finish=Finish(reason=FinishReason.LENGTH),
        )

    return script


# --- best_of ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
async def test_the_best_by_logprob_per_token_are_returned_and_all_are_counted(
    gateway: MakeGateway, model: ServedModel, path: str
) -> None:
    outputs = {0: (model.encode("hello"), -2.0), 1: (model.encode("hello world"), -0.5), 2: (model.encode("fox"), -1.0)}
    one = gateway(answers(outputs))
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    answer = (await one.post("/v1/" + path, best_of=3, n=2, **body)).json()
    texts = [c["message"]["content"] if "chat" in path else c["text"] for c in answer["choices"]]
    assert texts == ["hello world", "fox"]
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    assert [c["logprobs"] for c in answer["choices"]] == [None, None]
    assert answer["usage"]["completion_tokens"] == sum(len(tokens) for tokens, _ in outputs.values())
    assert answer["usage"]["prompt_tokens"] == len(one.backend.requests[0].prompt_token_ids)
    assert one.ends() == {"length": 3}


async def test_best_of_is_chosen_for_each_prompt_by_itself(gateway: MakeGateway, model: ServedModel) -> None:
    names = ["hello", "world", "quick", "fox"]
    outputs = {
        i: (model.encode(name), logprob) for i, (name, logprob) in enumerate(zip(names, [-3, -2, -5, -9], strict=True))
    }
    answer = (await gateway(answers(outputs)).complete(prompt=["a", "b"], best_of=2, echo=True)).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "aworld"), (1, "bquick")]


async def test_candidates_have_seeds_of_their_own_and_the_first_has_the_requests(gateway: MakeGateway) -> None:
    one = gateway(answers({i: ([5], -1.0) for i in range(4)}))
    await one.complete(best_of=4, seed=7)
    assert {r.sampling.seed for r in one.backend.requests} == {derived_seed(7, i) for i in range(4)}


async def test_best_of_equal_to_n_streams_like_n(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(answers({0: (model.encode("hello"), -1.0), 1: (model.encode("fox"), -0.1)}))
    chunks = events(await one.complete(best_of=2, n=2, stream=True))
    texts = {i: "".join(c["text"] for e in chunks for c in e["choices"] if c["index"] == i) for i in (0, 1)}
    assert texts == {0: "hello", 1: "fox"}
    assert [r.sampling.logprobs for r in one.backend.requests] == [None, None]


# --- logprobs of the prompt ------------------------------------------------------------------------------------------


def vllm_shape(model: ServedModel, num_top: int) -> list[Any]:
    def entry(token_id: int, rank: int, logprob: float) -> dict[str, Any]:
        return {"logprob": logprob, "rank": rank, "decoded_token": model.token_text(token_id)}

    whole = [
        {"6": entry(6, 1, -0.5), "9": entry(9, 2, -1.5)},
        {"7": entry(7, 3, -3.0), "10": entry(10, 1, -0.25), "11": entry(11, 2, -9999.0)},
    ]
    return [None, *(dict(list(row.items())[: num_top + (i == 1)]) for i, row in enumerate(whole))]


@pytest.mark.parametrize("num_top", [1, 2])
async def test_prompt_logprobs_have_vllms_shape(gateway: MakeGateway, model: ServedModel, num_top: int) -> None:
    one = gateway(answers({0: ([8], -1.0), 1: ([9], -1.0)}))
    answer = (await one.complete(prompt=PROMPT, prompt_logprobs=num_top, n=2)).json()
    assert [c["prompt_logprobs"] for c in answer["choices"]] == [vllm_shape(model, num_top)] * 2
    assert [c["logprobs"] for c in answer["choices"]] == [None, None]
    asked = {r.request_id[-1]: r.sampling.prompt_logprobs for r in one.backend.requests}
    assert asked == {"0": num_top, "1": None}  # computed once


async def test_chat_has_prompt_logprobs_beside_its_choices(gateway: MakeGateway) -> None:
    one = gateway(answers({0: ([8], -1.0)}))

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        rows = len(request.prompt_token_ids) - 1
        yield TokenDelta(
            request_id=request.request_id,
            index=0,
            token_ids=[8],
            prompt_logprobs=PromptLogprobs(0, bytes(4 * rows), struct.pack("<i", 1) * rows, b"", b""),
            finish=Finish(reason=FinishReason.LENGTH),
        )

    one.backend.script = script
    answer = (await one.chat(prompt_logprobs=0)).json()
    first, *rest = answer["prompt_logprobs"]
    prompt = one.backend.requests[0].prompt_token_ids
    assert first is None
    assert [list(entries) for entries in rest] == [[str(token)] for token in prompt[1:]]
    assert "prompt_logprobs" not in (await one.chat()).json()


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_logprobs_covers_prompt_and_output(
    gateway: MakeGateway, model: ServedModel, stream: bool
) -> None:
    one = gateway(answers({0: ([8], -1.0), 1: ([8], -1.0)}))
    response = await one.complete(prompt=PROMPT, echo=True, logprobs=2, n=2, stream=stream)
    for index in (0, 1):
        chunks = events(response) if stream else [response.json()]
        choices = [c for e in chunks for c in e["choices"] if c["index"] == index]
        texts = [model.token_text(i) for i in [*PROMPT, 8]]
        assert "".join(c["text"] for c in choices) == model.decode([*PROMPT, 8])
        assert joined(choices, "tokens") == texts
        assert joined(choices, "token_logprobs") == [None, -0.5, -3.0, -1.0]
        assert joined(choices, "text_offset") == [len("".join(texts[:i])) for i in range(4)]
        first, second, third, last = joined(choices, "top_logprobs")
        assert first is None
        assert second == {model.token_text(6): -0.5, model.token_text(9): -1.5}
        assert third == {model.token_text(7): -3.0, model.token_text(10): -0.25, model.token_text(11): -9999.0}
        assert last == {texts[3]: -1.0}


def joined(choices: Iterable[dict[str, Any]], name: str) -> list[Any]:
    return [item for choice in choices for item in choice["logprobs"][name]]


@pytest.mark.parametrize("stream", [False, True])
async def test_max_tokens_0_with_echo_is_the_prompt_alone(
    gateway: MakeGateway, model: ServedModel, stream: bool
) -> None:
    one = gateway(answers({0: ([], 0.0)}))
    options = {"stream_options": {"include_usage": True}} if stream else {}
    response = await one.complete(prompt=PROMPT, echo=True, logprobs=1, max_tokens=0, stream=stream, **options)
    chunks = events(response) if stream else [response.json()]
    choices = [c for e in chunks for c in e["choices"]]
    assert "".join(c["text"] for c in choices) == model.decode(PROMPT)
    assert joined(choices, "token_logprobs") == [None, -0.5, -3.0]
    assert choices[-1]["finish_reason"] == "length"
    usage = chunks[-1]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 0)
    assert one.backend.requests[0].sampling.max_tokens == 0


async def test_a_prompt_that_fills_the_context_can_be_scored(gateway: MakeGateway) -> None:
    one = gateway(answers({0: ([], 0.0)}))
    response = await one.complete(prompt=[5] * one.model.max_model_len, echo=True, max_tokens=0)
    assert response.status_code == 200


async def test_a_prompt_of_one_token_has_no_logprob(gateway: MakeGateway, model: ServedModel) -> None:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        yield TokenDelta(request_id=request.request_id, index=0, finish=Finish(reason=FinishReason.LENGTH))

    body = {"prompt": [5], "echo": True, "logprobs": 1, "max_tokens": 0, "prompt_logprobs": 1}
    (choice,) = (await gateway(script).complete(**body)).json()["choices"]
    assert choice["prompt_logprobs"] == [None]
    assert choice["logprobs"]["token_logprobs"] == choice["logprobs"]["top_logprobs"] == [None]


async def test_the_larger_of_logprobs_and_prompt_logprobs_is_asked_for(gateway: MakeGateway) -> None:
    one = gateway(answers({0: ([8], -1.0)}))
    answer = (await one.complete(prompt=PROMPT, echo=True, logprobs=1, prompt_logprobs=2)).json()
    assert one.backend.requests[0].sampling.prompt_logprobs == 2
    (choice,) = answer["choices"]
    assert [len(row) for row in choice["prompt_logprobs"][1:]] == [2, 3]
    assert [len(row) for row in choice["logprobs"]["top_logprobs"][1:]] == [1, 2, 1]


# --- seeds -----------------------------------------------------------------------------------------------------------


async def test_a_server_seed_makes_a_run_repeatable(gateway: MakeGateway) -> None:
    runs = []
    for seed in (5, 5, 6):
        one = gateway(seed=seed)
        for prompt in (["hello"], ["world"], ["hello"]):
            await one.complete(prompt=prompt)
        await one.complete(prompt=["hello"], seed=3)
        runs.append([r.sampling.seed for r in one.backend.requests])
    assert runs[0] == runs[1]
    assert runs[0][-1] == 3
    assert len({*runs[0], *runs[2]}) == 7


@given(
    seed=st.integers(0, 2**63 - 1),
    prompts=st.lists(st.lists(st.integers(0, 2**31), min_size=1, max_size=4), max_size=20),
    order=st.randoms(use_true_random=False),
)
def test_seeds_do_not_depend_on_the_order_in_which_different_prompts_come(
    seed: int, prompts: list[list[int]], order: random.Random
) -> None:
    shuffled = order.sample(prompts, len(prompts))
    first, second = RepeatableSeeds(seed), RepeatableSeeds(seed)
    drawn = sorted((prompt, first.draw(prompt)) for prompt in prompts)
    assert drawn == sorted((prompt, second.draw(prompt)) for prompt in shuffled)
    assert len({value for _, value in drawn}) == len(prompts)


def test_only_so_many_prompts_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seeds, "NUM_REMEMBERED_PROMPTS", 2)
    one = RepeatableSeeds(1)
    first = one.draw([1])
    for other in ([2], [3], [4]):
        one.draw(other)
    assert len(one._draws) == 2
    assert one.draw([1]) == first


def test_without_a_server_seed_no_two_are_alike() -> None:
    drawn = {make_seeds(None).draw([1]) for _ in range(100)}
    assert len(drawn) == 100
    assert all(0 <= seed < 2**63 for seed in drawn)
