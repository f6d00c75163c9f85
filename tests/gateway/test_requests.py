"""What is refused, and how the refusal reads."""

from __future__ import annotations

import threading
import time
from typing import Any

import msgspec
import pytest
from pydantic import BaseModel, ValidationError
from scripted import MAX_MODEL_LEN, MakeGateway, fails, hangs

from core.errors import InvalidRequest, Overloaded, Unavailable
from gateway.protocol import ChatRequest, DetokenizeRequest, TokenizeRequest, parse

USER = [{"role": "user", "content": "hi"}]

BAD_CHATS: list[tuple[str, dict[str, Any]]] = [
    ("max_tokens", {"max_tokens": -5}),
    ("max_tokens", {"max_tokens": 0}),
    ("max_tokens", {"max_tokens": "12"}),
    ("max_tokens", {"max_tokens": True}),
    ("max_tokens", {"max_tokens": 3, "max_completion_tokens": 4}),
    ("min_tokens", {"min_tokens": 9, "max_tokens": 4}),
    ("messages", {"messages": []}),
    ("messages", {"messages": "hi"}),
    ("messages[0].role", {"messages": [{"role": "wizard", "content": "hi"}]}),
    ("messages[0].role", {"messages": [{"role": "tool", "content": "hi"}]}),
    ("messages[0].content", {"messages": [{"role": "user"}]}),
    ("messages[0].content", {"messages": [{"role": "user", "content": 3}]}),
    ("messages[1].content", {"messages": [*USER, {"role": "user", "content": [{"type": "image_url"}]}]}),
    ("messages[0].tool_calls", {"messages": [{"role": "assistant", "content": "x", "tool_calls": []}]}),
    ("temperature", {"temperature": -0.1}),
    ("temperature", {"temperature": "hot"}),
    ("top_p", {"top_p": 0}),
    ("top_p", {"top_p": 1.5}),
    ("top_k", {"top_k": -2}),
    ("min_p", {"min_p": 2}),
    ("presence_penalty", {"presence_penalty": 3}),
    ("frequency_penalty", {"frequency_penalty": -3}),
    ("repetition_penalty", {"repetition_penalty": 0}),
    ("repetition_penalty", {"repetition_penalty": 1e-300}),
    ("repetition_penalty", {"repetition_penalty": 101}),
    ("top_k", {"top_k": 2**31}),
    ("top_k", {"top_k": 2**64 - 1}),
    ("stop_token_ids", {"stop_token_ids": [1] * 1025}),
    ("logit_bias", {"logit_bias": {"1" * 5000: 1}}),
    ("n", {"n": 0}),
    ("n", {"n": 10_000}),
    ("seed", {"seed": 2**64}),
    ("seed", {"seed": 1.5}),
    ("stop", {"stop": ""}),
    ("stop", {"stop": ["a", ""]}),
    ("stop", {"stop": [3]}),
    ("stop", {"stop": ["x"] * 17}),
    ("stop", {"stop": "x" * 257}),
    ("stop_token_ids", {"stop_token_ids": [10**6]}),
    ("stop_token_ids", {"stop_token_ids": [-1]}),
    ("logit_bias", {"logit_bias": {"ten": 1}}),
    ("logit_bias", {"logit_bias": {"10": 101}}),
    ("logit_bias", {"logit_bias": {"99999": 1}}),
    ("logit_bias", {"logit_bias": [1]}),
    ("logprobs", {"logprobs": 2}),
    ("top_logprobs", {"top_logprobs": 2}),
    ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
    ("stream", {"stream": "yes"}),
    ("stream_options", {"stream_options": {"include_usage": True}}),
    ("stream_options.include", {"stream": True, "stream_options": {"include": True}}),
    ("tools", {"tools": [{"type": "function"}]}),
    ("tool_choice", {"tool_choice": "auto"}),
    ("audio", {"audio": {}}),
    ("best_of", {"best_of": 2, "stream": True}),
    ("best_of", {"best_of": 2, "n": 3}),
    ("best_of", {"best_of": 65}),
    ("best_of", {"best_of": 0}),
    ("prompt_logprobs", {"prompt_logprobs": 21}),
    ("prompt_logprobs", {"prompt_logprobs": -1}),
    ("prompt_logprobs", {"prompt_logprobs": 0, "stream": True}),
    ("max_tokens", {"max_tokens": 0}),
    ("suffix", {"suffix": "end"}),
    ("chat_template_kwargs.tokenize", {"chat_template_kwargs": {"tokenize": True}}),
    ("chat_template_kwargs.chat_template", {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}),
    ("temprature", {"temprature": 1}),
]


@pytest.mark.parametrize(("param", "body"), BAD_CHATS)
async def test_bad_chat_parameters_are_named(gateway: MakeGateway, param: str, body: dict[str, Any]) -> None:
    response = await gateway().chat(**body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert param.rpartition(".")[2].split("[")[0] in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": 7}),
        ("prompt", {"prompt": [[]]}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [True]}),
        ("prompt", {"prompt": [1, 10**9]}),
        ("prompt", {"prompt": [[1], [-1]]}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": 21}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 0, "logprobs": 1}),
        ("min_tokens", {"max_tokens": 0, "echo": True, "min_tokens": 1}),
        ("prompt", {"max_tokens": 0, "echo": True, "prompt": [1] * 257}),
        ("best_of", {"prompt": ["a"] * 40, "best_of": 2}),
        ("prompt", {"prompt": [1, 10**4000]}),
        ("prompt", {"prompt": [[1], [-(10**400)]]}),
        ("n", {"prompt": ["a"] * 40, "n": 2}),
    ],
)
async def test_bad_completion_parameters_are_named(gateway: MakeGateway, param: str, body: dict[str, Any]) -> None:
    response = await gateway().complete(**body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize(
    "body",
    [
        {"tools": None, "response_format": {"type": "text"}, "best_of": 1, "suffix": None, "audio": None},
        {"user": "me", "store": True, "metadata": {"a": "b"}, "temperature": None},
        {"messages": [{"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}, *USER]},
        {"messages": [{"role": "developer", "content": [{"type": "text", "text": "be brief"}]}, *USER]},
    ],
)
async def test_parameters_that_ask_for_nothing_are_accepted(gateway: MakeGateway, body: dict[str, Any]) -> None:
    assert (await gateway().chat(**body)).status_code == 200


async def test_an_unknown_parameter_gets_the_nearest_name(gateway: MakeGateway) -> None:
    response = await gateway().chat(temprature=1)
    assert "did you mean 'temperature'?" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "content", [b"{", b"", b"[]", b'"x"', b"\xff\xfe", b'{"messages": NaN}', b"[" * 10_000, b'{"a":"\\ud800"}']
)
async def test_bodies_that_are_no_json_object_are_refused(gateway: MakeGateway, content: bytes) -> None:
    response = await gateway().client.post("/v1/chat/completions", content=content)
    assert (response.status_code, response.json()["error"]["type"]) == (400, "invalid_request_error")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
async def test_numbers_that_are_not_finite_are_refused(gateway: MakeGateway, number: str) -> None:
    content = f'{{"messages": [{{"role": "user", "content": "hi"}}], "temperature": {number}}}'
    response = await gateway().client.post("/v1/chat/completions", content=content)
    assert response.status_code == 400


async def test_a_large_body_is_refused_before_it_is_read(gateway: MakeGateway) -> None:
    one = gateway()
    sent = 0

    async def body() -> Any:
        nonlocal sent
        for _ in range(1000):
            sent += 10_000
            yield b"x" * 10_000

    response = await one.client.post("/v1/completions", content=body())
    assert (response.status_code, response.json()["error"]["code"]) == (413, "payload_too_large")
    assert sent <= 4 * 2**20 + 20_000
    declared = await one.client.post("/v1/completions", content=b"x" * 10_000_000)
    assert (declared.status_code, declared.json()["error"]["param"]) == (413, "body")


async def test_an_unknown_model_is_not_found(gateway: MakeGateway) -> None:
    response = await gateway().chat(model="gpt-9")
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert "'tiny'" in error["message"]


async def test_a_prompt_over_the_context_is_refused_with_the_numbers(gateway: MakeGateway) -> None:
    one = gateway()
    response = await one.complete(prompt=[1] * 200, max_tokens=100)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "context_length_exceeded")
    assert all(number in error["message"] for number in (str(MAX_MODEL_LEN), "200", "100"))
    assert (await one.complete(prompt=[1] * MAX_MODEL_LEN)).status_code == 400
    assert (await one.complete(prompt=[1] * (MAX_MODEL_LEN - 1), max_tokens=1)).status_code == 200


INTEGERS = {
    "/v1/chat/completions": ("n", "max_tokens", "max_completion_tokens", "min_tokens", "top_k", "seed", "priority"),
    "/v1/completions": ("n", "max_tokens", "min_tokens", "top_k", "seed", "priority", "logprobs"),
}


@pytest.mark.parametrize("number", [2**63, 2**64 - 1, 10**4000, -(10**4000)])
async def test_integers_of_more_than_64_bits_are_refused_by_name(gateway: MakeGateway, number: int) -> None:
    one = gateway()
    needed: dict[str, Any] = {"/v1/chat/completions": {"messages": USER}, "/v1/completions": {"prompt": "a"}}
    cases = [(path, name, {**needed[path], name: number}) for path, names in INTEGERS.items() for name in names]
    cases += [(path, "stop_token_ids[1]", {**body, "stop_token_ids": [0, number]}) for path, body in needed.items()]
    cases += [(path, "logit_bias", {**body, "logit_bias": {str(number): 1}}) for path, body in needed.items()]
    cases += [
        ("/v1/chat/completions", "top_logprobs", {"messages": USER, "logprobs": True, "top_logprobs": number}),
        ("/v1/completions", "prompt", {"prompt": [number]}),
        ("/detokenize", "tokens[0]", {"tokens": [number]}),
    ]
    for path, param, body in cases:
        response = await one.post(path, **body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param)
        assert len(error["message"]) < 250
        assert "sys." not in error["message"]


async def test_integers_nobody_can_write_out_are_no_json(gateway: MakeGateway) -> None:
    response = await gateway().client.post("/v1/completions", content=b'{"prompt":"a","n":1' + b"0" * 5000 + b"}")
    assert response.status_code == 400
    assert "number out of range" in response.json()["error"]["message"]


async def test_stop_tokens_may_not_be_all_tokens_when_some_must_come(gateway: MakeGateway) -> None:
    one = gateway()
    every = list(range(one.model.vocab_size))
    some = [i for i in every if i not in one.model.eos_token_ids]
    for body in ({"stop_token_ids": every, "ignore_eos": True}, {"stop_token_ids": some}):
        response = await one.chat(**body, min_tokens=1)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "stop_token_ids")
        assert (await one.chat(**body)).status_code == 200
    assert (await one.chat(stop_token_ids=some, ignore_eos=True, min_tokens=1)).status_code == 200


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_a_limit_that_does_not_fit_beside_the_prompt_is_what_is_named(gateway: MakeGateway, name: str) -> None:
    one = gateway()
    error = (await one.chat(**{name: 100_000})).json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", name)
    room = int(error["message"].rpartition(f"lower {name} to ")[2])
    assert (await one.chat(**{name: room})).status_code == 200
    assert (await one.chat(**{name: room + 1})).status_code == 400
    full = await one.complete(prompt=[1] * MAX_MODEL_LEN, max_tokens=1)
    assert full.json()["error"]["param"] == "prompt"


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/tokenize"])
async def test_more_messages_than_tokens_are_refused_before_they_are_rendered(
    gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    one = gateway()
    monkeypatch.setattr(type(one.model), "render_chat", lambda *_, **__: pytest.fail("rendered"))
    response = await one.post(path, messages=USER * (MAX_MODEL_LEN + 1))
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")


@pytest.mark.parametrize("words", ["a" * 4_000_000, "how are you " * 300_000])
async def test_text_that_cannot_fit_is_refused_without_being_tokenized(
    gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch, words: str
) -> None:
    one = gateway()
    monkeypatch.setattr(type(one.model), "encode", lambda *_, **__: pytest.fail("tokenized"))
    for response, param in (
        (await one.complete(prompt=words), "prompt"),
        (await one.chat(messages=[{"role": "user", "content": words}]), "messages"),
    ):
        error = response.json()["error"]
        assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", param)


async def test_large_bodies_are_parsed_and_rendered_off_the_loop(
    gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, threads = gateway(), []

    def noted(work: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            threads.append(threading.current_thread())
            return work(*args, **kwargs)

        return wrapper

    monkeypatch.setattr("gateway.completions.parse", noted(parse))
    monkeypatch.setattr(type(one.model), "render_chat", noted(type(one.model).render_chat))
    await one.chat(messages=USER * 200, cache_salt="x", metadata={"k": "x" * 40_000})
    assert len(threads) == 2
    assert threading.current_thread() not in threads


async def test_output_takes_what_room_the_prompt_leaves_by_default(gateway: MakeGateway) -> None:
    one = gateway()
    await one.complete(prompt=[1] * (MAX_MODEL_LEN - 4))
    await one.complete(prompt=[1])
    await one.chat()
    few, default, chat = (r.sampling.max_tokens for r in one.backend.requests)
    assert (few, default) == (4, 16)
    assert chat == MAX_MODEL_LEN - len(one.backend.requests[2].prompt_token_ids)


@pytest.mark.parametrize("header", ["x-slo-ttft-ms", "x-slo-tpot-ms"])
@pytest.mark.parametrize("value", ["soon", "-1", "0", "nan", "inf"])
async def test_latency_targets_must_be_positive_numbers(gateway: MakeGateway, header: str, value: str) -> None:
    response = await gateway().post("/v1/completions", {header: value}, prompt="hi")
    assert (response.status_code, response.json()["error"]["param"]) == (400, header)


async def test_a_request_id_that_cannot_be_echoed_is_refused(gateway: MakeGateway) -> None:
    response = await gateway().post("/v1/completions", {"x-request-id": "x" * 200}, prompt="hi")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-request-id")


async def test_unknown_paths_and_methods_answer_in_the_error_shape(gateway: MakeGateway) -> None:
    client = gateway().client
    missing, wrong = await client.get("/v1/nothing"), await client.get("/v1/completions")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "not_found")
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (405, "method_not_allowed")
    assert wrong.headers["allow"] == "POST"


async def test_while_draining_new_requests_get_503(gateway: MakeGateway) -> None:
    one = gateway()
    one.app.state.admission.close()
    refused = await one.chat()
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert (await one.client.get("/health")).status_code == 503
    assert (await one.client.get("/-/healthz")).status_code == 200


async def test_the_backend_deadline_is_the_configured_timeout(gateway: MakeGateway) -> None:
    one = gateway(request_timeout_s=50)
    before = time.time()
    await one.complete()
    assert before + 50 <= one.backend.requests[0].deadline <= time.time() + 50


async def test_a_backend_that_never_ends_is_cut_off(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.completions.DEADLINE_MARGIN_S", 0.0)
    one = gateway(hangs(after=[]), request_timeout_s=0.05)
    response = await one.complete()
    assert (response.status_code, response.json()["error"]["code"]) == (504, "deadline_exceeded")


@pytest.mark.parametrize("error", [Overloaded("full", retry_after=3.2), Unavailable("no worker", retry_after=3.2)])
async def test_refusals_of_the_cluster_reach_the_client(gateway: MakeGateway, error: Overloaded | Unavailable) -> None:
    for stream in (False, True):
        response = await gateway(fails(error, after=[])).complete(stream=stream)
        assert (response.status_code, response.headers["retry-after"]) == (error.http_status, "4")
        assert response.json()["error"]["message"] == error.message


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatRequest, {"messages": [0] * 9}),
        (ChatRequest, {"messages": USER, "stop_token_ids": ["x"] * 9}),
        (ChatRequest, {"messages": USER, "guided_choice": [0] * 9}),
        (ChatRequest, {"messages": USER, "structured_outputs": {"choice": [0] * 9}}),
        (TokenizeRequest, {"messages": [0] * 9}),
        (DetokenizeRequest, {"tokens": ["x"] * 9}),
    ],
)
def test_a_list_is_refused_at_its_first_wrong_item(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """As many errors as a body has room for would take seconds to make, and one is told."""
    with pytest.raises(InvalidRequest) as refused:
        parse(kind, msgspec.json.encode(body))
    assert isinstance(refused.value.__cause__, ValidationError)
    assert refused.value.__cause__.error_count() == 1
