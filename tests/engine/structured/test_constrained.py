"""Outputs under a grammar, by sampling and by engines that cut, mix, preempt and hand over."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from world import WAIT_S, Output, Running, World

from core import grammar as core_grammar
from core.types import FinishReason, Grammar, GrammarKind, Request
from engine.sequence import Sequence, Status
from engine.structured.constraint import Constraint
from engine.structured.grammars import Grammars

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
REGEX = r"(\d{4}-\d{2}-\d{2}|[a-c]{3,9})( ok)?"
GBNF = 'root ::= item ("," item)*\nitem ::= [0-9] [0-9]? [0-9]?'
LARK = 'start: "(" inner ")"\ninner: ("a" | start) "."'


def person(text: str) -> bool:
    value = json.loads(text)
    fits = len(value["name"]) <= 6 and 0 <= value["age"] <= 130 and set(value["tags"]) <= {"a", "b"}
    return (
        fits and type(value["age"]) is int and len(value["tags"]) <= 3 and value.keys() == SCHEMA["properties"].keys()
    )


def matches(pattern: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(pattern, text) is not None


LAWS: dict[str, tuple[Grammar, Callable[[str], bool]]] = {
    "schema": (Grammar(GrammarKind.JSON_SCHEMA, json.dumps(SCHEMA)), person),
    "regex": (Grammar(GrammarKind.REGEX, REGEX), matches(REGEX)),
    "choice": (
        Grammar(GrammarKind.EBNF, 'start: "yes" | "yes, very" | "é😀"'),
        {"yes", "yes, very", "é😀"}.__contains__,
    ),
    "gbnf": (Grammar(GrammarKind.EBNF, GBNF), matches(r"[0-9]{1,3}(,[0-9]{1,3})*")),
    "lark": (Grammar(GrammarKind.EBNF, LARK), lambda text: re.fullmatch(r"\(+a\.(\)\.)*\)", text) is not None),
}
FOREVER = Grammar(GrammarKind.REGEX, "[a-z ]*")
DATE = Grammar(GrammarKind.REGEX, r"[0-9]{4}-[0-9]{2}-[0-9]{2}")


def many(world: World, count: int = 12, **sampling: Any) -> list[Request]:
    """Requests under each grammar, with every third one free."""
    laws = list(LAWS)
    kinds = [None if i % 3 == 2 else laws[i % len(laws)] for i in range(count)]
    return [
        world.request(f"{kind}-{i}", LAWS[kind][0] if kind else None, prompt=3 + 5 * i, seed=i, **sampling)
        for i, kind in enumerate(kinds)
    ]


def kept(world: World, request: Request, output: Output) -> bool:
    """Whether an output obeys its grammar: all of it if it has ended by itself."""
    kind = request.request_id.split("-")[0]
    if kind == "None" or output.finish.reason is FinishReason.LENGTH:
        return True
    return output.finish.reason is FinishReason.STOP and LAWS[kind][1](world.text(output))


@pytest.fixture(scope="module")
def usual(world: World) -> list[Output]:
    """What `many` comes to where nothing is scarce."""
    with world.engine(tokens=512) as running:
        return running.run(*many(world))


@pytest.mark.parametrize("kind", LAWS)
@pytest.mark.parametrize("temperature", [0.0, 0.7, 2.0])
def test_every_text_that_ends_is_one_of_the_grammar(world: World, kind: str, temperature: float) -> None:
    grammar, obeys = LAWS[kind]
    with world.engine() as running:
        requests = [world.request(f"{kind}-{i}", grammar, temperature=temperature, seed=i) for i in range(16)]
        outputs = running.run(*requests)
    ended = [output for output in outputs if output.finish.reason is FinishReason.STOP]
    assert all(obeys(world.text(output)) for output in ended), [world.text(output) for output in ended]
    assert len(ended) == 16 or kind in {"gbnf", "lark"}
    assert len(ended) > 1 or temperature == 0.0
    assert temperature < 2.0 or len({tuple(output.token_ids) for output in outputs}) > 1


def test_a_batch_of_all_kinds_obeys_each_and_leaves_the_free_ones_alone(world: World, usual: list[Output]) -> None:
    requests = many(world)
    assert all(kept(world, request, output) for request, output in zip(requests, usual, strict=True))
    assert sum(output.finish.reason is FinishReason.STOP for output in usual) > 6
    with world.engine() as running:
        assert [running.run(request)[0] for request in requests] == usual


@pytest.mark.parametrize("tokens", [12, 33])
def test_prompts_in_chunks_come_to_the_same(world: World, usual: list[Output], tokens: int) -> None:
    with world.engine(tokens=tokens, seqs=12) as running:
        assert running.run(*many(world)) == usual


def test_preempted_sequences_go_on_where_they_were(world: World, usual: list[Output]) -> None:
    with world.engine(blocks=70) as running:
        assert running.run(*many(world)) == usual
        assert running.engine.stats.num_preemptions > 0


def test_a_hand_off_after_the_first_token_comes_to_the_same(world: World, usual: list[Output]) -> None:
    with world.engine() as giving, world.engine() as taking:
        for request, expected in zip(many(world), usual, strict=True):
            assert handed_over(giving, taking, request) == expected


def handed_over(giving: Running, taking: Running, request: Request) -> Output:
    taking.engine.reserve(Sequence(request))
    assert taking.reports.get(timeout=WAIT_S).granted
    held = Sequence(request, hold_after_prefill=True)
    giving.engine.add(held)
    assert giving.reports.get(timeout=WAIT_S).opened
    (update,) = giving.reports.get(timeout=WAIT_S).updates
    giving.engine.release(request.request_id)
    if update.finish is not None:
        taking.engine.abort(request.request_id)
        return Output(update.token_ids, update.finish)
    taking.engine.join(request.request_id, update.token_ids)
    rest = taking.outputs(request.request_id)[request.request_id]
    return Output(update.token_ids + rest.token_ids, rest.finish)


def test_a_retry_goes_on_after_the_tokens_that_were_emitted(world: World, usual: list[Output]) -> None:
    with world.engine() as running:
        for request, expected in zip(many(world), usual, strict=True):
            for cut in {1, len(expected.token_ids) // 2, len(expected.token_ids) - 1} - {0, len(expected.token_ids)}:
                fields = {name: getattr(request, name) for name in request.__struct_fields__}
                again = Request(**fields | {"emitted_token_ids": expected.token_ids[:cut]})
                (rest,) = running.run(again)
                assert rest == Output(expected.token_ids[cut:], expected.finish)


# --- ends ----------------------------------------------------------------------------------------------------------


def test_a_finished_grammar_ends_the_text_without_a_stop_token(world: World) -> None:
    with world.engine() as running:
        plain, unstoppable, longer = running.run(
            world.request("a", DATE),
            world.request("b", DATE, stop_token_ids=()),
            world.request("c", DATE, min_tokens=150),
        )
    for output in (plain, unstoppable, longer):
        assert re.fullmatch(DATE.text, world.text(output))
        assert (output.finish.reason, output.finish.stop_token_id) == (FinishReason.STOP, None)


def test_min_tokens_makes_a_text_longer_where_its_grammar_can(world: World) -> None:
    with world.engine() as running:
        outputs = running.run(*(world.request(f"m{i}", FOREVER, min_tokens=30, seed=i) for i in range(8)))
    assert all(len(output.token_ids) > 30 for output in outputs)
    assert all(re.fullmatch(FOREVER.text, world.text(output)) for output in outputs)
    assert any(output.finish.reason is FinishReason.STOP for output in outputs)


def test_without_stop_tokens_only_max_tokens_ends_a_text_that_can_go_on(world: World) -> None:
    with world.engine() as running:
        outputs = running.run(*(world.request(f"i{i}", FOREVER, stop_token_ids=(), seed=i) for i in range(4)))
    assert {output.finish.reason for output in outputs} == {FinishReason.LENGTH}
    assert all(world.end not in output.token_ids for output in outputs)


def test_a_stop_token_is_drawn_where_the_text_may_end(world: World) -> None:
    """Even one that could be part of the text elsewhere, and even one that the client would like most."""
    letter = world.tokenizer.token_to_id("x")
    stops, bias = (world.end, letter), {letter: 100.0, world.end: 100.0}
    with world.engine() as running:
        names = [
            world.request(f"n{i}", LAWS["schema"][0], seed=i, stop_token_ids=stops, logit_bias=bias) for i in range(6)
        ]
        dates = [world.request(f"d{i}", DATE, seed=i, stop_token_ids=stops, logit_bias=bias) for i in range(6)]
        letters = [world.request(f"l{i}", FOREVER, seed=i, stop_token_ids=stops, logit_bias=bias) for i in range(6)]
        outputs = running.run(*names, *dates, *letters)
    assert all(person(world.text(output)) for output in outputs[:6] if output.finish.reason is FinishReason.STOP)
    assert all(re.fullmatch(DATE.text, world.text(output)) for output in outputs[6:12])
    assert {tuple(output.token_ids) for output in outputs[12:]} <= {(letter,), (world.end,)}


def test_a_stop_token_cuts_a_text_off_that_can_only_go_on_with_it(world: World) -> None:
    hyphen = world.tokenizer.token_to_id("-")
    with world.engine() as running:
        (output,) = running.run(world.request("c", DATE, stop_token_ids=(hyphen,)))
    assert output.finish.stop_token_id == hyphen
    assert re.fullmatch("[0-9]{4}", world.text(output))


def test_a_bias_chooses_among_what_is_allowed_and_nothing_else(world: World) -> None:
    digit = world.tokenizer.token_to_id("7")
    bias = {digit: 100.0, world.tokenizer.token_to_id("x"): 100.0}
    with world.engine() as running:
        (output,) = running.run(world.request("b", DATE, logit_bias=bias, temperature=1.0))
    assert world.text(output) == "7777-77-77"


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_grammar_that_can_not_be_compiled_ends_its_own_request(world: World) -> None:
    with world.engine() as running:
        bad, good = running.run(
            world.request("bad", Grammar(GrammarKind.REGEX, "[")), world.request("good", DATE, prompt=9)
        )
    assert (bad.token_ids, bad.finish.error) == ([], "InvalidRequest")
    assert "unclosed character class" in bad.finish.message
    assert good.finish.reason is FinishReason.STOP


@pytest.mark.parametrize(
    "content", [None, "{}", '{"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}']
)
def test_a_model_without_a_usable_tokenizer_refuses_grammars_by_name(
    world: World, tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with world.engine(folder=tmp_path) as running:
        (output,) = running.run(world.request("a", DATE))
        (free,) = running.run(world.request("b", max_tokens=3))
    assert output.finish.error == "InvalidRequest"
    assert "tokenizer" in output.finish.message
    assert len(free.token_ids) == 3


def test_emitted_tokens_that_no_text_begins_with_end_the_request(world: World) -> None:
    with world.engine() as running:
        (output,) = running.run(world.request("a", DATE, emitted=world.tokenizer.encode("no").ids))
    assert output.finish.error == "InvalidRequest"


def test_a_sequence_aborted_while_its_grammar_is_compiled_is_never_admitted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    future: Future[Constraint] = Future()
    with world.engine() as running:
        real = running.engine._grammars
        assert real is not None
        constraint = real.constrain(Sequence(world.request("x", DATE))).result()
        monkeypatch.setattr(real, "constrain", lambda sequence: future)
        running.engine.add(Sequence(world.request("gone", DATE)))
        running.engine.abort("gone")
        (free,) = running.run(world.request("free", max_tokens=1))  # commands are carried out in order
        future.set_result(constraint)
        (after,) = running.run(world.request("after", max_tokens=1))
        assert running.engine.stats.num_free_blocks == 512
    assert len(free.token_ids) == len(after.token_ids) == 1


@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_deferred_reservation_gets_its_blocks_when_it_may_have_them_and_its_grammar_is_compiled(
    world: World, monkeypatch: pytest.MonkeyPatch, compiled_first: bool
) -> None:
    future: Future[Constraint] = Future()
    with world.engine() as running:
        real = running.engine._grammars
        assert real is not None
        constraint = real.constrain(Sequence(world.request("x", DATE))).result()
        monkeypatch.setattr(real, "constrain", lambda sequence: future)
        sequence = Sequence(world.request("kv", DATE), deferred=True)
        running.engine.reserve(sequence)
        compiled, let_in = partial(future.set_result, constraint), partial(running.engine.undefer, "kv")
        first, second = (compiled, let_in) if compiled_first else (let_in, compiled)
        first()
        running.run(world.request("free", max_tokens=1))
        assert sequence.status is Status.WAITING
        second()
        assert running.reports.get(timeout=WAIT_S).granted == [sequence]
        running.engine.abort("kv")
        running.run(world.request("after", max_tokens=1))


# --- compiled grammars -----------------------------------------------------------------------------------------------


def test_a_lexer_that_others_have_filled_is_replaced(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies of a matcher share a lexer with a bounded number of states; this regex needs another one for each text."""
    limits = core_grammar.LLParserLimits(max_lexer_states=600, verbose_errors=False)
    monkeypatch.setattr(core_grammar, "_LIMITS", limits)
    grammar = Grammar(GrammarKind.REGEX, "[ab]*a[ab]{12}c")
    with world.engine() as running:
        outputs = running.run(*(world.request(f"r{i}", grammar, seed=i, max_tokens=40) for i in range(60)))
    ended = [output for output in outputs if output.finish.reason is FinishReason.STOP]
    assert all(re.fullmatch(grammar.text, world.text(output)) for output in ended)
    assert {output.finish.reason for output in outputs} <= {FinishReason.STOP, FinishReason.LENGTH}


def test_the_least_recently_used_grammar_is_forgotten(world: World) -> None:
    grammars = Grammars(world.folder, world.vocab_size, max_compiled=2)
    for pattern in ("a", "b", "a", "c"):
        grammars.constrain(Sequence(world.request("r", Grammar(GrammarKind.REGEX, pattern)))).result()
    assert [grammar.text for grammar in grammars._compiled] == ["a", "c"]
    grammars.close()


def test_padding_and_special_tokens_are_never_allowed(world: World) -> None:
    grammars = Grammars(world.folder, world.vocab_size)
    anything = Grammar(GrammarKind.REGEX, r"(.|\n)*")
    constraint = grammars.constrain(Sequence(world.request("r", anything))).result()
    bits = np.unpackbits(constraint.allowed.view(np.uint8), bitorder="little")
    start = world.tokenizer.token_to_id("<|start|>")
    assert len(constraint.allowed) == -(-world.vocab_size // 32)
    assert not bits[world.tokenizer.get_vocab_size() :].any()
    assert (bits[start], bits[world.end]) == (0, 1)
    assert bits.sum() > 200
    grammars.close()
