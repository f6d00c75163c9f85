"""Fields that constrain the text of an output: what they ask for, and what is refused before a worker sees it."""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import subprocess
import sys
import time
from typing import Any

import msgspec
import pytest
from scripted import Gateway, MakeGateway, says

from core.types import Grammar, GrammarKind
from gateway.tokenizer import ServedModel
from gateway.vetting import Vetting, _VettingProcess
from gateway.vetting_process import Start

SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}
CITIES = [f"city {i}" for i in range(3000)]
ANY_OBJECT = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "object"}')
FOLLOWED = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA))


def choice(alternatives: str) -> Grammar:
    return Grammar(GrammarKind.EBNF, f"start: CHOICE\nCHOICE: {alternatives}")


@pytest.fixture(scope="module")
def checking(model: ServedModel) -> Gateway:
    """Its process that checks grammars has been started once for all."""
    return Gateway(model, says(model.encode("hello")))


@pytest.fixture
def shared(checking: Gateway) -> Gateway:
    checking.backend.requests.clear()
    return checking


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "person", **fields}}}


@pytest.mark.parametrize(
    ("body", "grammar"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, ANY_OBJECT),
        (json_schema(schema=SCHEMA, strict=True, description="who"), FOLLOWED),
        ({"guided_json": SCHEMA}, FOLLOWED),
        ({"guided_json": json.dumps(SCHEMA)}, FOLLOWED),
        ({"guided_regex": r"\d{3}"}, Grammar(GrammarKind.REGEX, r"\d{3}")),
        ({"guided_choice": ["yes", 'é "no"\n']}, choice('"yes" | "é \\"no\\"\\n"')),
        ({"guided_grammar": 'root ::= "a"'}, Grammar(GrammarKind.EBNF, 'root ::= "a"')),
        ({"structured_outputs": {"json": SCHEMA}}, FOLLOWED),
        ({"structured_outputs": {"regex": "a+", "json_object": False}}, Grammar(GrammarKind.REGEX, "a+")),
        ({"structured_outputs": {"choice": ["a"]}}, choice('"a"')),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar(GrammarKind.EBNF, 'start: "a"')),
        ({"structured_outputs": {"json_object": True}}, ANY_OBJECT),
        ({"guided_choice": CITIES}, choice(" | ".join(f'"{city}"' for city in CITIES))),
        ({"guided_json": None, "response_format": None}, None),
    ],
)
async def test_each_field_asks_for_its_grammar(shared: Gateway, body: dict[str, Any], grammar: Grammar) -> None:
    for response in (await shared.chat(**body, n=2), await shared.complete(**body)):
        assert response.status_code == 200, response.text
    assert [request.sampling.grammar for request in shared.backend.requests] == [grammar] * 3


def chain(rules: int) -> str:
    return "start: r0\n" + "\n".join(f"r{i}: r{i + 1}" for i in range(rules)) + f'\nr{rules}: "a"'


def nested(depth: int) -> str:
    return '{"items": ' * depth + "{}" + "}" * depth


BAD = [
    ("response_format", {"response_format": "json"}, "response_format"),
    ("response_format.type", {"response_format": {"type": "xml"}}, "json_schema"),
    ("response_format.json_schema", {"response_format": {"type": "json_schema"}}, "required"),
    ("response_format.json_schema", {"response_format": {"type": "text", "json_schema": {"schema": {}}}}, "allowed"),
    ("response_format.json_schema.schema", json_schema(), "required"),
    ("response_format.json_schema.schema", json_schema(schema=[1]), "JSON Schema"),
    ("response_format.json_schema.schema", json_schema(schema={"type": "strin"}), "strin"),
    ("response_format.json_schema.schema", json_schema(schema={"not": {"type": "object"}}), "not"),
    ("response_format.json_schema.schema", json_schema(schema={"$ref": "http://127.0.0.1/x.json"}), "127.0.0.1"),
    ("response_format.json_schema.schemas", json_schema(schema={}, schemas={}), "unknown parameter"),
    ("guided_json", {"guided_json": 7}, "JSON Schema"),
    ("guided_json", {"guided_json": "{"}, "EOF"),
    ("guided_json", {"guided_json": "[1]"}, "object"),
    ("guided_json", {"guided_json": nested(500)}, "recursion limit"),
    ("guided_json", {"guided_json": {"$ref": "#"}}, "no text satisfies it"),
    ("guided_json", {"guided_json": {**SCHEMA, "properties": {"age": False}}}, "unsatisfiable"),
    ("guided_regex", {"guided_regex": "["}, "unclosed character class"),
    ("guided_regex", {"guided_regex": ""}, "at least 1"),
    ("guided_regex", {"guided_regex": "()"}, "only the empty text"),
    ("guided_regex", {"guided_regex": "(a?){5000}a{5000}"}, "too costly"),
    ("guided_regex", {"guided_regex": "a" * 70000}, "65536"),
    ("guided_choice", {"guided_choice": []}, "at least 1"),
    ("guided_choice", {"guided_choice": "yes"}, "list"),
    ("guided_choice[1]", {"guided_choice": ["yes", 1]}, "string"),
    ("guided_choice", {"guided_choice": [""]}, "only the empty text"),
    ("guided_grammar", {"guided_grammar": "root := a"}, "::="),
    ("guided_grammar", {"guided_grammar": 'start: "a" other'}, "other"),
    ("guided_grammar", {"guided_grammar": 'start: start "a"'}, "no text satisfies it"),
    ("guided_grammar", {"guided_grammar": chain(3000)}, "nested too deeply"),
    ("structured_outputs", {"structured_outputs": {}}, "give one of"),
    ("structured_outputs", {"structured_outputs": {"json_object": False}}, "give one of"),
    ("structured_outputs.regex", {"structured_outputs": {"regex": "("}}, "unclosed group"),
    ("structured_outputs.structural_tag", {"structured_outputs": {"structural_tag": "x"}}, "unknown parameter"),
    ("structured_outputs.regex", {"structured_outputs": {"json": SCHEMA, "regex": "a"}}, "structured_outputs.json"),
    ("guided_regex", {"guided_regex": "a", "response_format": {"type": "json_object"}}, "response_format"),
    ("guided_choice", {"guided_choice": ["a"], "guided_json": SCHEMA}, "guided_json"),
]


@pytest.mark.parametrize(("param", "body", "reason"), BAD)
async def test_what_can_not_be_followed_is_refused_by_name(
    shared: Gateway, param: str, body: dict[str, Any], reason: str
) -> None:
    response = await shared.chat(**body)
    error = response.json()["error"]
    assert (response.status_code, error["type"], error["param"]) == (400, "invalid_request_error", param)
    assert reason in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert shared.backend.requests == []


async def test_a_grammar_that_kills_the_compiler_harms_nobody_else(gateway: MakeGateway) -> None:
    one = gateway()
    responses = await asyncio.gather(
        *(one.chat(guided_grammar=text) for text in (chain(2999), 'start: "a"', chain(2998), 'start: "b"'))
    )
    assert [response.status_code for response in responses] == [400, 200, 400, 200]


async def test_other_requests_are_served_while_a_grammar_takes_its_time(gateway: MakeGateway) -> None:
    """Terminals that double at each of sixty steps: the compiler works until it gives up or is ended."""
    one = gateway()
    text = "start: R0\n" + "\n".join(f"R{i}: R{i + 1} R{i + 1}" for i in range(60)) + '\nR60: "a"'
    slow = asyncio.ensure_future(one.chat(guided_grammar=text))
    longest, turns = 0.0, 0
    while not slow.done():
        started = time.process_time()  # the compiler's is another process
        assert (await one.chat()).status_code == 200
        await asyncio.sleep(0)  # nothing in this chat has to wait for anything
        longest, turns = max(longest, time.process_time() - started), turns + 1
    assert slow.result().status_code == 400
    assert turns > 3
    assert longest < 1.0


async def test_a_verdict_is_remembered(gateway: MakeGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    one, vetted = gateway(), list[str]()
    vet = _VettingProcess.vet
    monkeypatch.setattr(_VettingProcess, "vet", lambda self, grammar: vetted.append(grammar.text) or vet(self, grammar))
    for _ in range(20):
        assert (await one.chat(guided_regex="[ab]+")).status_code == 200
        assert (await one.chat(guided_regex="[")).status_code == 400
    assert vetted == ["[ab]+", "["]


async def test_the_bound_on_bytes_counts_bytes(gateway: MakeGateway) -> None:
    one = gateway(max_grammar_bytes=10)
    assert (await one.chat(guided_regex="é" * 5)).status_code == 200
    assert (await one.chat(guided_regex="é" * 6)).status_code == 400


async def test_the_checking_process_is_replaced_when_lost_and_ends_with_its_owner(model: ServedModel) -> None:
    vetting = Vetting(model.tokenizer_json, model.vocab_size)
    await vetting.check("guided_regex", Grammar(GrammarKind.REGEX, "a"))
    first = vetting._process._child
    assert first is not None
    first.kill()
    await asyncio.to_thread(first.wait, 60)
    await vetting.check("guided_regex", Grammar(GrammarKind.REGEX, "b"))
    second = vetting._process._child
    assert second is not None
    assert second is not first
    del vetting
    gc.collect()
    assert await asyncio.to_thread(second.wait, 60) == -signal.SIGKILL


def test_the_checking_process_ends_with_its_input(model: ServedModel) -> None:
    """As when its gateway is killed."""
    start = msgspec.json.encode(Start(model.tokenizer_json(), model.vocab_size)) + b"\n"
    ended = subprocess.run(
        [sys.executable, "-m", "gateway.vetting_process"], input=start, capture_output=True, timeout=60
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"", b"")
