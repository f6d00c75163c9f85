"""The fields of a request that constrain the text of its output, and the grammar they ask for.

OpenAI's `response_format`, and vLLM's `structured_outputs` and the older `guided_*`. At most one of them may be given.
A schema is followed whether `strict` is set or not; a keyword that can't be followed is refused, never left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainValidator
from pydantic_core import PydanticCustomError

from core.errors import InvalidRequest
from core.types import Grammar, GrammarKind

ANY_OBJECT = '{"type": "object"}'


def _schema(value: object) -> str:
    """A JSON Schema, which clients send as an object or as the text of one."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False)
    raise PydanticCustomError("schema", "must be a JSON Schema: an object, or a string that holds one")


Schema = Annotated[str, PlainValidator(_schema)]
Text = Annotated[str, Field(min_length=1)]
Choices = Annotated[list[str], Field(min_length=1, fail_fast=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class JsonSchemaFormat(_Body):
    """`name` and `description` are for models that OpenAI shows them to; here the schema is followed, not shown."""

    schema_: Schema = Field(alias="schema")
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(_Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(_Body):
    json_: Schema | None = Field(None, alias="json")
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    json_object: bool | None = None


class StructuredFields(_Body):
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None


def wanted_grammar(body: StructuredFields, max_bytes: int) -> tuple[str, Grammar] | None:
    """The field that constrains the output and what it asks for. Raises InvalidRequest naming the field that is too
    many or too long; whether the grammar can be followed is not known yet."""
    asked = [*_response_format(body), *_structured_outputs(body), *_guided(body)]
    if len(asked) > 1:
        first, second = asked[0][0], asked[1][0]
        raise InvalidRequest(f"{second}: the output is constrained by {first} already; send one of them", param=second)
    for param, grammar in asked:
        if (size := len(grammar.text.encode())) > max_bytes:
            raise InvalidRequest(
                f"{param}: {size} bytes are more than the {max_bytes} that a grammar may have; shorten it", param=param
            )
    return asked[0] if asked else None


def _response_format(body: StructuredFields) -> Iterator[tuple[str, Grammar]]:
    wanted = body.response_format
    if wanted is None:
        return
    if (wanted.type == "json_schema") != (wanted.json_schema is not None):
        needs = "required with" if wanted.json_schema is None else "only allowed with"
        raise InvalidRequest(
            f"response_format.json_schema: {needs} type 'json_schema'", param="response_format.json_schema"
        )
    if wanted.json_schema is not None:
        yield "response_format.json_schema.schema", Grammar(GrammarKind.JSON_SCHEMA, wanted.json_schema.schema_)
    elif wanted.type == "json_object":
        yield "response_format", Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)


def _structured_outputs(body: StructuredFields) -> Iterator[tuple[str, Grammar]]:
    wanted = body.structured_outputs
    if wanted is None:
        return
    given = list(_given("structured_outputs.", wanted.json_, wanted.regex, wanted.choice, wanted.grammar))
    if wanted.json_object:
        given.append(("structured_outputs.json_object", Grammar(GrammarKind.JSON_SCHEMA, ANY_OBJECT)))
    if not given:
        raise InvalidRequest(
            "structured_outputs: give one of json, regex, choice, grammar and json_object", param="structured_outputs"
        )
    yield from given


def _guided(body: StructuredFields) -> Iterator[tuple[str, Grammar]]:
    return _given("guided_", body.guided_json, body.guided_regex, body.guided_choice, body.guided_grammar)


def _given(
    prefix: str, schema: str | None, regex: str | None, choices: list[str] | None, grammar: str | None
) -> Iterator[tuple[str, Grammar]]:
    if schema is not None:
        yield f"{prefix}json", Grammar(GrammarKind.JSON_SCHEMA, schema)
    if regex is not None:
        yield f"{prefix}regex", Grammar(GrammarKind.REGEX, regex)
    if choices is not None:
        yield f"{prefix}choice", Grammar(GrammarKind.EBNF, _alternatives(choices))
    if grammar is not None:
        yield f"{prefix}grammar", Grammar(GrammarKind.EBNF, grammar)


def _alternatives(choices: list[str]) -> str:
    """One terminal, for thousands of them to be no more than a lexer's work. Lark's strings are written as JSON's."""
    return "start: CHOICE\nCHOICE: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
