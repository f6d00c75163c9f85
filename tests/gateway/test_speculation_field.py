"""What a request may say about drafts, what it is told of them, and what is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from scripted import Gateway, MakeGateway, Script, events

from core.types import Finish, FinishReason, Request, SpeculationWish, TokenDelta
from gateway.tokenizer import ServedModel

OFFER = {
    "drafters": {"lookup": ("sampled", "tree"), "small": ("sampled", "tree", "k_seq")},
    "budget": 8,
    "rule_with_logprobs": "sampled",
}


async def heard(one: Gateway, headers: dict[str, str] | None = None, **body: Any) -> Request:
    """The request that workers get."""
    response = await one.post("/v1/completions", headers, prompt="hello world", **body)
    assert response.status_code == 200, response.text
    return one.backend.requests[-1]


@pytest.mark.parametrize(
    ("said", "wish"),
    [
        (None, None),
        (False, SpeculationWish(budget=0)),
        ({"budget": 0}, SpeculationWish(budget=0)),
        (True, SpeculationWish()),
        ({}, SpeculationWish()),
        ({"drafter": "small", "rule": "k_seq", "budget": 8}, SpeculationWish(drafter="small", rule="k_seq", budget=8)),
        ({"rule": "tree", "budget": None}, SpeculationWish(rule="tree")),
    ],
)
async def test_what_a_request_asks_for_reaches_the_workers(
    gateway: MakeGateway, said: object, wish: SpeculationWish | None
) -> None:
    one = gateway(speculation=OFFER)
    assert (await heard(one, speculation=said)).speculation == wish
    assert (await one.chat(speculation=said)).status_code == 200
    assert one.backend.requests[-1].speculation == wish


@pytest.mark.parametrize(
    ("param", "said", "names"),
    [
        ("speculation", "off", "true, false or an object"),
        ("speculation", 3, "true, false or an object"),
        ("speculation.draftr", {"draftr": "small"}, "unknown parameter"),
        ("speculation.drafter", {"drafter": "medusa"}, "lookup, small"),
        ("speculation.drafter", {"drafter": 1}, "string"),
        ("speculation.drafter", {"drafter": "medusa", "budget": 0}, "lookup, small"),
        ("speculation.rule", {"rule": "typical"}, "sampled, tree"),
        ("speculation.rule", {"rule": "k_seq"}, "sampled, tree"),
        ("speculation.rule", {"drafter": "lookup", "rule": "k_seq"}, "sampled, tree"),
        ("speculation.budget", {"budget": 9}, "8"),
        ("speculation.budget", {"budget": 10**30}, "8"),
        ("speculation.budget", {"budget": -1}, "0"),
        ("speculation.budget", {"budget": 1.5}, "integer"),
        ("speculation.budget", {"budget": True}, "integer"),
    ],
)
async def test_what_the_server_has_not_is_refused_by_field_with_what_it_has(
    gateway: MakeGateway, param: str, said: object, names: str
) -> None:
    response = await gateway(speculation=OFFER).complete(speculation=said)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert names in error["message"]


@pytest.mark.parametrize("said", [True, {}, {"drafter": "lookup"}, {"budget": 3}])
async def test_a_server_without_drafters_says_so_to_who_asks_for_some(gateway: MakeGateway, said: object) -> None:
    response = await gateway().complete(speculation=said)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "speculation")
    assert (await gateway().complete(speculation=False)).status_code == 200


async def test_logprobs_are_those_of_one_rule(gateway: MakeGateway) -> None:
    one = gateway(speculation=OFFER)
    for logprobs in ({"logprobs": 1}, {"best_of": 2}):
        response = await one.complete(speculation={"rule": "tree"}, **logprobs)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "speculation.rule")
    assert (await heard(one, speculation={"rule": "sampled"}, best_of=2)).speculation == SpeculationWish(rule="sampled")


@pytest.mark.parametrize(
    ("header", "store", "remember"),
    [
        (None, None, True),
        (None, True, True),
        (None, False, False),
        ("0", None, True),
        ("1", None, False),
        ("1", True, False),
    ],
)
async def test_a_client_can_have_its_text_forgotten(
    gateway: MakeGateway, header: str | None, store: bool | None, remember: bool
) -> None:
    headers = {"X-Slipstream-No-Train": header} if header is not None else None
    assert (await heard(gateway(), headers, store=store)).remember is remember


async def test_a_header_that_says_neither_is_refused(gateway: MakeGateway) -> None:
    response = await gateway().post("/v1/completions", {"x-slipstream-no-train": "yes"}, prompt="hello")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "x-slipstream-no-train")


def drafted(token_ids: list[int], steps: list[tuple[int, int]]) -> Script:
    """Each step accepts so many of so many draft tokens, and adds one."""

    async def script(request: Request) -> AsyncIterator[TokenDelta]:
        index = 0
        for accepted, proposed in steps:
            stop = index + accepted + 1
            yield TokenDelta(
                request_id=request.request_id,
                index=index,
                token_ids=token_ids[index:stop],
                num_drafted_tokens=proposed,
                num_accepted_tokens=accepted,
                finish=Finish(reason=FinishReason.LENGTH) if stop == len(token_ids) else None,
            )
            index = stop

    return script


@pytest.mark.parametrize("stream", [False, True])
async def test_usage_tells_drafted_accepted_and_rejected_tokens_of_all_choices(
    gateway: MakeGateway, model: ServedModel, stream: bool
) -> None:
    tokens = model.encode("hello world, how are you today?")[:6]
    one = gateway(drafted(tokens, [(0, 0), (2, 4), (0, 3), (0, 0)]), speculation=OFFER)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}} if stream else {}
    response = await one.complete(n=2, **options)
    usage = events(response)[-1]["usage"] if stream else response.json()["usage"]
    assert usage["completion_tokens"] == 12
    assert usage["completion_tokens_details"] == {
        "accepted_prediction_tokens": 4,
        "rejected_prediction_tokens": 10,
        "drafted_tokens": 14,
    }


async def test_accepted_tokens_behind_a_stop_string_are_not_of_the_completion(
    gateway: MakeGateway, model: ServedModel
) -> None:
    tokens = model.encode("hello world, how are you today?")
    one = gateway(drafted(tokens, [(len(tokens) - 1, 20)]), speculation=OFFER)
    usage = (await one.complete(stop=" world")).json()["usage"]
    details = usage["completion_tokens_details"]
    assert details["accepted_prediction_tokens"] == usage["completion_tokens"] < len(tokens)
    assert details["drafted_tokens"] == 20
