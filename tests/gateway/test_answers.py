"""What comes back: OpenAI's shapes, whole and streamed."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
from scripted import MakeGateway, chat_text, events, fails, hangs, says

from core.errors import Cancelled, InternalError, WorkerLost
from core.types import Finish, FinishReason, Request, TokenDelta, TokenLogprobs
from gateway.generation import Piece
from gateway.params import derived_seed
from gateway.render import Renderer
from gateway.tokenizer import ServedModel

EMOJI = "hello 😀 world"


def ends_with_eos(model: ServedModel) -> Finish:
    return Finish(reason=FinishReason.STOP, stop_token_id=model.eos_token_ids[0])


async def test_a_chat_answer_has_the_text_the_reason_and_the_usage(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = [*model.encode(EMOJI), *model.eos_token_ids]
    one = gateway(says(tokens, ends_with_eos(model), cached=3))
    answer = (await one.chat(model="alias")).json()
    choice = answer["choices"][0]
    assert (answer["object"], answer["model"], choice["index"]) == ("chat.completion", "alias", 0)
    assert choice["message"] == {"role": "assistant", "content": EMOJI, "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    num_prompt = len(one.backend.requests[0].prompt_token_ids)
    assert answer["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": len(tokens),
        "total_tokens": num_prompt + len(tokens),
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "drafted_tokens": 0,
        },
    }
    assert one.ends() == {"stop": 1}


async def test_the_chat_template_makes_the_prompt(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway()
    await one.chat(messages=[{"role": "developer", "content": "a"}, {"role": "user", "content": "b"}])
    await one.chat(add_generation_prompt=False)
    prompts = [model.decode(r.prompt_token_ids, skip_special_tokens=False) for r in one.backend.requests]
    assert prompts[0] == "<|im_start|>system\na<|im_end|>\n<|im_start|>user\nb<|im_end|>\n<|im_start|>assistant\n"
    assert prompts[1] == "<|im_start|>user\nhi<|im_end|>\n"


@pytest.mark.parametrize("per_delta", [1, 3])
async def test_a_chat_stream_says_what_the_answer_says(
    gateway: MakeGateway, model: ServedModel, per_delta: int
) -> None:
    one = gateway(says(model.encode(EMOJI), per_delta=per_delta))
    response = await one.chat(stream=True)
    chunks = events(response)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat_text(chunks) == EMOJI
    assert [c["choices"][0]["finish_reason"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert len({c["id"] for c in chunks}) == 1
    assert all("usage" not in c for c in chunks)


async def test_usage_comes_last_in_a_stream_that_asks_for_it(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = model.encode(EMOJI)
    one = gateway(says(tokens, cached=2))
    chunks = events(await one.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(tokens)
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert all(c["usage"] is None for c in chunks[:-1])


async def test_continuous_usage_counts_up(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = model.encode("hello world")
    one = gateway(says(tokens))
    chunks = events(await one.complete(stream=True, stream_options={"continuous_usage_stats": True}))
    assert [c["usage"]["completion_tokens"] for c in chunks] == list(range(1, len(tokens) + 1))


async def test_a_completion_stream_and_answer(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(says(model.encode(EMOJI)))
    answer = (await one.complete()).json()
    chunks = events(await one.complete(stream=True))
    assert (answer["object"], answer["choices"][0]["text"]) == ("text_completion", EMOJI)
    assert "".join(c["choices"][0]["text"] for c in chunks) == EMOJI
    assert answer["id"].startswith("cmpl-")


async def test_every_prompt_gets_n_choices_with_seeds_of_their_own(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway()
    answer = (await one.complete(prompt=["hello", "world wide"], n=3, seed=7)).json()
    assert [c["index"] for c in answer["choices"]] == list(range(6))
    requests = {int(r.request_id.rpartition("-")[2]): r for r in one.backend.requests}
    prompts = [model.encode("hello"), model.encode("world wide")]
    assert [requests[i].prompt_token_ids for i in range(6)] == [prompts[i // 3] for i in range(6)]
    assert [requests[i].sampling.seed for i in range(6)] == [derived_seed(7, i % 3) for i in range(6)]
    assert len({derived_seed(7, i) for i in range(64)}) == 64
    assert answer["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert answer["usage"]["completion_tokens"] == 6 * len(model.encode("hello world"))
    assert one.ends() == {"length": 6}


async def test_n_choices_stream_side_by_side(gateway: MakeGateway) -> None:
    chunks = events(await gateway().chat(n=3, stream=True))
    assert [chat_text(chunks, choice) for choice in range(3)] == ["hello world"] * 3


@pytest.mark.parametrize("prompt", [[5, 6, 7], [[5, 6, 7]]])
async def test_prompts_of_token_ids_go_in_as_they_are(gateway: MakeGateway, prompt: list[Any]) -> None:
    one = gateway()
    await one.complete(prompt=prompt)
    assert one.backend.requests[0].prompt_token_ids == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_cuts_and_cancels(gateway: MakeGateway, model: ServedModel, stream: bool) -> None:
    before, stop, after = model.encode("hello wor"), model.encode("ld EN"), model.encode("D of it and more and more")
    one = gateway(says(before + stop + after))
    response = await one.complete(stop=["ld END", "nothing"], stream=stream, stream_options=None)
    chunks = events(response) if stream else [response.json()]
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello wor"
    last = chunks[-1]["choices"][0]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "ld END")
    assert one.ends() == {"stop": 1}
    assert one.backend.open == 0


async def test_usage_counts_up_to_the_token_that_completed_the_stop(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = model.encode("hello world, how are you")
    cut = next(i for i in range(len(tokens)) if "how" in model.decode(tokens[: i + 1]))
    for per_delta in (1, 2, len(tokens)):
        one = gateway(says(tokens, per_delta=per_delta))
        answer = (await one.complete(stop="how", return_token_ids=True)).json()
        assert answer["usage"]["completion_tokens"] == cut + 1
        assert answer["choices"][0]["token_ids"] == tokens[: cut + 1]


async def test_the_stop_can_be_shown(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(says(model.encode("hello world, how are you")))
    answer = (await one.complete(stop="how", include_stop_str_in_output=True)).json()
    assert answer["choices"][0]["text"] == "hello world, how"


async def test_stop_strings_count_after_min_tokens(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = model.encode("hello hello hello")
    first = len(model.encode("hello"))
    one = gateway(says(tokens))
    answer = (await one.complete(stop="hello", min_tokens=first)).json()
    assert answer["choices"][0]["text"] == "hello "


async def test_text_held_for_a_stop_comes_at_the_end(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(says(model.encode("the EN")))
    assert (await one.complete(stop="END")).json()["choices"][0]["text"] == "the EN"


async def test_a_stop_token_is_counted_and_not_shown(gateway: MakeGateway, model: ServedModel) -> None:
    tokens = model.encode("hello world")
    finish = Finish(reason=FinishReason.STOP, stop_token_id=tokens[-1])
    one = gateway(says(tokens, finish))
    hidden = (await one.complete(stop_token_ids=[tokens[-1]])).json()
    shown = (await one.complete(stop_token_ids=[tokens[-1]], include_stop_str_in_output=True)).json()
    assert hidden["choices"][0]["text"] == model.decode(tokens[:-1])
    assert hidden["choices"][0]["stop_reason"] == tokens[-1]
    assert hidden["usage"]["completion_tokens"] == len(tokens)
    assert shown["choices"][0]["text"] == "hello world"


async def test_special_tokens_are_shown_on_demand(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(says([*model.encode("hi"), *model.eos_token_ids, *model.encode(" you")]))
    assert (await one.complete()).json()["choices"][0]["text"] == "hi you"
    shown = (await one.complete(skip_special_tokens=False)).json()
    assert shown["choices"][0]["text"] == "hi<|im_end|> you"


async def test_echo_puts_the_prompt_first(gateway: MakeGateway) -> None:
    one = gateway()
    answer = (await one.complete(prompt=["a b", "c"], n=2, echo=True)).json()
    assert [c["text"] for c in answer["choices"]] == [p + "hello world" for p in ("a b", "a b", "c", "c")]
    chunks = events(await one.complete(prompt=one.model.encode("x y"), echo=True, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == "x yhello world"


# --- logprobs --------------------------------------------------------------------------------------------------------


def with_logprobs(tokens: list[int]) -> Any:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        for index, token_id in enumerate(tokens):
            finish = Finish(reason=FinishReason.LENGTH) if index + 1 == len(tokens) else None
            logprobs = [TokenLogprobs(-0.5, [(token_id, -0.5), (1, float("-inf"))])]
            yield TokenDelta(
                request_id=request.request_id, index=index, token_ids=[token_id], logprobs=logprobs, finish=finish
            )

    return script


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(gateway: MakeGateway, model: ServedModel, stream: bool) -> None:
    tokens = model.encode("hi 😀")
    one = gateway(with_logprobs(tokens))
    response = await one.chat(logprobs=True, top_logprobs=2, stream=stream)
    choices = [c["choices"][0] for c in (events(response) if stream else [response.json()])]
    content = [entry for c in choices if c["logprobs"] for entry in c["logprobs"]["content"]]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hi 😀".encode()
    assert all(entry["logprob"] == -0.5 for entry in content)
    assert [t["logprob"] for t in content[0]["top_logprobs"]] == [-0.5, -9999.0]
    assert one.backend.requests[0].sampling.logprobs == 2


async def test_chat_logprobs_without_alternatives(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(with_logprobs(model.encode("hello")))
    content = (await one.chat(logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert content[0]["top_logprobs"] == []
    assert one.backend.requests[0].sampling.logprobs == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(gateway: MakeGateway, model: ServedModel, stream: bool) -> None:
    tokens = model.encode("hello world")
    response = await gateway(with_logprobs(tokens)).complete(logprobs=1, stream=stream)
    parts = [c["choices"][0]["logprobs"] for c in (events(response) if stream else [response.json()])]
    texts = [t for part in parts for t in part["tokens"]]
    assert "".join(texts) == "hello world"
    assert [x for part in parts for x in part["token_logprobs"]] == [-0.5] * len(tokens)
    assert [o for part in parts for o in part["text_offset"]] == [len("".join(texts[:i])) for i in range(len(tokens))]
    assert [t for part in parts for t in part["top_logprobs"]] == [{text: -0.5} for text in texts]


@pytest.mark.parametrize(("most_inline", "inline"), [(6, True), (5, False)])
async def test_many_logprobs_are_written_off_the_event_loop(
    gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, most_inline: int, inline: bool
) -> None:
    threads, encoded = [], Renderer.encoded

    def watched(renderer: Renderer, pieces: list[Piece]) -> msgspec.Raw:
        threads.append(threading.current_thread())
        return encoded(renderer, pieces)

    monkeypatch.setattr(Renderer, "encoded", watched)
    monkeypatch.setattr("gateway.tokenizer.INLINE_CHARS", most_inline)
    await gateway(with_logprobs([5, 6])).complete(prompt=[5], logprobs=1)
    assert [thread is threading.current_thread() for thread in threads] == [inline]


# --- sampling --------------------------------------------------------------------------------------------------------


async def test_sampling_defaults_come_from_the_model_and_the_client_wins(gateway: MakeGateway) -> None:
    one = gateway()
    await one.chat()
    await one.chat(top_p=0.5, top_k=-1, temperature=1e-9, seed=-1, logit_bias={"5": 2}, stop_token_ids=[9])
    default, given = (r.sampling for r in one.backend.requests)
    assert (default.top_p, default.top_k, default.temperature) == (0.9, 7, 1.0)
    assert (given.top_p, given.top_k, given.temperature) == (0.5, 0, 0.0)
    assert (given.seed, given.logit_bias) == (2**63 - 1, {5: 2.0})
    assert set(given.stop_token_ids) == {9, *one.model.eos_token_ids}


async def test_a_seed_is_drawn_when_none_is_given(gateway: MakeGateway) -> None:
    one = gateway()
    for _ in range(2):
        await one.complete()
    first, second = (r.sampling.seed for r in one.backend.requests)
    assert first != second


async def test_ignore_eos_leaves_the_clients_own_stop_tokens(gateway: MakeGateway) -> None:
    one = gateway()
    await one.complete(ignore_eos=True, stop_token_ids=[4])
    assert one.backend.requests[0].sampling.stop_token_ids == (4,)


async def test_headers_carry_latency_targets_and_the_request_id(gateway: MakeGateway) -> None:
    one = gateway()
    headers = {"x-request-id": "mine-1", "x-slo-ttft-ms": "60000", "x-slo-tpot-ms": "60000"}
    response = await one.post("/v1/completions", headers, prompt="hi")
    assert response.headers["x-request-id"] == "mine-1"
    slo = one.backend.requests[0].slo
    assert slo is not None
    assert (slo.ttft_ms, slo.tpot_ms) == (60000, 60000)
    assert one.sample("slipstream:slo_requests_total", outcome="met") == 1
    assert len((await one.complete()).headers["x-request-id"]) == 32


async def test_two_requests_with_one_client_id_stay_apart(gateway: MakeGateway) -> None:
    one = gateway()
    for _ in range(2):
        await one.post("/v1/completions", {"x-request-id": "same"}, prompt="hi")
    first, second = (r.request_id for r in one.backend.requests)
    assert first != second


@pytest.mark.parametrize("path", ["chat/completions", "completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_token_ids_are_returned_on_demand(gateway: MakeGateway, path: str, stream: bool) -> None:
    one = gateway()
    body = {"messages": [{"role": "user", "content": "hi"}]} if "chat" in path else {"prompt": "hi"}
    response = await one.post("/v1/" + path, return_token_ids=True, stream=stream, **body)
    chunks = events(response) if stream else [response.json()]
    token_ids = [i for c in chunks for i in c["choices"][0].get("token_ids", [])]
    assert token_ids == one.model.encode("hello world")
    holder = chunks[0] if "chat" in path else chunks[0]["choices"][0]
    assert holder["prompt_token_ids"] == one.backend.requests[0].prompt_token_ids


# --- errors after the beginning --------------------------------------------------------------------------------------


async def test_an_error_in_a_stream_is_an_event_before_done(gateway: MakeGateway, model: ServedModel) -> None:
    one = gateway(fails(WorkerLost("worker w1 died"), after=model.encode("hello")))
    chunks = events(await one.chat(stream=True))
    error = chunks[-1]["error"]
    assert (error["message"], error["code"]) == ("worker w1 died", "worker_lost")
    assert chat_text(chunks[:-1]) == "hello"
    assert one.ends() == {"error": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_finish_that_says_error_becomes_that_error(gateway: MakeGateway, stream: bool) -> None:
    one = gateway(says([], Finish.from_error(InternalError("boom"))))
    one.backend.script = _only(Finish.from_error(InternalError("boom")))
    response = await one.chat(stream=stream)
    assert (response.status_code, response.json()["error"]["message"]) == (500, "boom")


def _only(finish: Finish) -> Any:
    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        yield TokenDelta(request_id=request.request_id, index=0, finish=finish)

    return script


@pytest.mark.parametrize("finish", [Finish(reason=FinishReason.ABORT), Finish.from_error(Cancelled("gone"))])
async def test_an_abort_the_client_did_not_ask_for_is_503(gateway: MakeGateway, finish: Finish) -> None:
    assert (await gateway(_only(finish)).chat()).status_code == 503


async def test_a_backend_that_stops_without_a_finish_is_our_error(gateway: MakeGateway) -> None:
    one = gateway(says([]))
    assert (await one.chat()).status_code == 500
    assert one.ends() == {"error": 1}


@pytest.mark.parametrize("stream", [False, True])
async def test_a_defect_is_answered_without_its_details(
    gateway: MakeGateway, model: ServedModel, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one = gateway(fails(ZeroDivisionError("secret"), after=model.encode("hi")))
    response = await one.chat(stream=stream)
    assert "secret" not in response.text
    assert "internal_error" in response.text
    assert "secret" in caplog.text


async def test_one_failing_choice_ends_the_others(gateway: MakeGateway, model: ServedModel) -> None:
    lost = fails(WorkerLost("gone"), after=[])

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        second = request.request_id.endswith("-1")
        async for delta in (lost if second else hangs(after=model.encode("hello")))(request):
            yield delta

    one = gateway(script)
    chunks = events(await one.chat(n=3, stream=True))
    assert chunks[-1]["error"]["code"] == "worker_lost"
    assert one.ends() == {"error": 1, "abort": 2}
