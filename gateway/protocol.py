"""What clients may send: OpenAI's request bodies with vLLM's sampling extras.

A parameter we do not support is refused by name (unless it says "off"), an unknown one with the nearest name we know.
null means: not given.

Three fields of OpenAI's are accepted so that its clients work, and change nothing: `user`, `safety_identifier` and
`metadata` label a request for OpenAI's own records, which this server does not keep. Requests and answers are neither
stored nor logged, so `store: true` keeps nothing; with `store: false` drafters too forget the text when it has ended,
from which they may else draft for others with the same cache_salt. `name` and `reasoning_content` of a message go to
the chat template, which may use them.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError, from_json

from core.errors import InvalidRequest
from gateway.speculation import SpeculationFields
from gateway.structured import StructuredFields

INT64 = 2**63 - 1
"""No integer is above it: they travel as MessagePack."""
MAX_ID_DIGITS = 19
"""A token id that is a string is shorter."""

TokenId = Annotated[int, Field(ge=-INT64, le=INT64)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""One error is told, so no list is looked at beyond it: a body has room for millions."""

UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none",),
    "functions": ([],),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_embeds": (),
    "reasoning_effort": (),
    "service_tier": ("auto", "default"),
    "suffix": ("",),
    "tool_choice": ("none",),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
"""Parameters of OpenAI and vLLM that we do not have, and the values that switch them off."""


def _text(value: object) -> object:
    """A message's content: a string, or parts of type text, which are joined by newlines."""
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise PydanticCustomError("content", f"content parts must be of type 'text', not {kind!r}")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
            raise PydanticCustomError("content", "a content part must be {'type': 'text', 'text': string}")
        texts.append(part["text"])
    return "\n".join(texts)


def _prompts(value: object) -> list[str] | list[list[int]]:
    """The four shapes of a prompt as one: a list of strings or a list of token lists."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _is_token_list(value):
            return [value]
        if all(isinstance(item, list) and item and _is_token_list(item) for item in value):
            return value
    raise PydanticCustomError("prompt", "must be a string, a list of strings, a list of token ids or a list of those")


def _is_token_list(value: list[object]) -> bool:
    return all(type(item) is int and -INT64 <= item <= INT64 for item in value)


def _strings(value: object) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list) or not all(isinstance(item, str) and item for item in items):
        raise PydanticCustomError("stop", "must be a non-empty string or a list of non-empty strings")
    return tuple(items)


def _biases(value: object) -> dict[int, float]:
    """JSON has string keys; they are token ids."""
    if not isinstance(value, dict):
        raise PydanticCustomError("bias", "must be an object of token ids to numbers")
    biases = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < MAX_ID_DIGITS):
            raise PydanticCustomError("bias", f"has the key {key[:20]!r}, which is not a token id")
        if type(bias) not in (int, float) or not -100 <= bias <= 100:
            raise PydanticCustomError("bias", f"of token {key[:20]} must be a number from -100 to 100")
        biases[int(key)] = float(bias)
    return biases


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class StreamOptions(_Body):
    include_usage: bool = False
    continuous_usage_stats: bool = False


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text)]
    name: str | None = None
    reasoning_content: str | None = None


Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


class GenerationRequest(StructuredFields, SpeculationFields, _Body):
    """What chat and text completions have in common. Ranges that depend on the model are checked in params.py."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=INT64)
    best_of: int | None = Field(None, ge=1, le=INT64)
    max_tokens: int | None = Field(None, ge=1, le=INT64)
    min_tokens: int = Field(0, ge=0, le=INT64)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    logit_bias: Annotated[dict[int, float], PlainValidator(_biases)] = {}
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    prompt_logprobs: int | None = Field(None, ge=0, le=INT64)
    stop: Annotated[tuple[str, ...], PlainValidator(_strings)] = ()
    stop_token_ids: TokenIds = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    priority: int = Field(0, ge=-(2**31), lt=2**31)
    cache_salt: str = Field("", max_length=256)
    user: str | None = None
    metadata: dict[str, Any] | None = None
    safety_identifier: str | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def token_limit_param(self) -> str:
        """The name under which token_limit was given."""
        return "max_tokens"

    @property
    def num_candidates(self) -> int:
        """Sequences to generate for each prompt; the best n of them are returned."""
        return self.best_of or self.n

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to report per token; None reports no logprobs."""
        raise NotImplementedError

    @property
    def needed_alternatives(self) -> int | None:
        """As `alternatives`, of what workers report: which candidates are best is told by the logprobs of their
        tokens."""
        return 0 if self.alternatives is None and self.num_candidates > self.n else self.alternatives

    @property
    def prompt_alternatives(self) -> int | None:
        """How many alternatives are needed per token of the prompt; None needs no logprobs of it."""
        return self.prompt_logprobs


class ChatRequest(GenerationRequest):
    messages: Messages
    max_completion_tokens: int | None = Field(None, ge=1, le=INT64)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=INT64)
    add_generation_prompt: bool = True
    add_special_tokens: bool = False
    """Templates write their own."""
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def token_limit_param(self) -> str:
        return "max_completion_tokens" if self.max_completion_tokens else "max_tokens"

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(GenerationRequest):
    prompt: Annotated[list[str] | list[list[int]], PlainValidator(_prompts)]
    max_tokens: int | None = Field(None, ge=0, le=INT64)
    """0 is for who wants the prompt's logprobs only."""
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=INT64)
    add_special_tokens: bool = True

    @property
    def alternatives(self) -> int | None:
        return self.logprobs

    @property
    def prompt_alternatives(self) -> int | None:
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(asked, default=None)


class TokenizeRequest(_Body):
    """Either `prompt` or `messages`."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    """By default true for a prompt and false for messages."""
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    return_token_strs: bool = False


class DetokenizeRequest(_Body):
    model: str | None = None
    tokens: TokenIds


B = TypeVar("B", bound=_Body)


def parse(kind: type[B], body: bytes) -> B:
    """Raises InvalidRequest naming the first parameter at fault."""
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise InvalidRequest(f"the body is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("the body must be a JSON object")
    value = _without_nulls(value)
    _refuse_unknown(kind, value)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _explain(error.errors(include_url=False)[0]) from error


def _without_nulls(value: dict[str, Any]) -> dict[str, Any]:
    """Drop nulls of the body and of its messages: clients send back what they got, unset fields included."""
    given = {key: item for key, item in value.items() if item is not None}
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [
            {k: v for k, v in m.items() if v is not None} if isinstance(m, dict) else m for m in messages
        ]
    return given


def _refuse_unknown(kind: type[_Body], value: dict[str, Any]) -> None:
    for name in [name for name in value if name not in kind.model_fields]:
        if name not in UNSUPPORTED or not issubclass(kind, GenerationRequest):
            near = get_close_matches(name, kind.model_fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InvalidRequest(f"unknown parameter {name[:64]!r}{hint}", param=name[:64])
        if value.pop(name) not in UNSUPPORTED[name]:
            raise InvalidRequest(f"parameter {name!r} is not supported by this server", param=name)


def _explain(error: ErrorDetails) -> InvalidRequest:
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    message = error["msg"][0].lower() + error["msg"][1:]
    if error["type"] == "missing":
        return InvalidRequest(f"{param} is required", param=param)
    if error["type"] == "extra_forbidden":
        return InvalidRequest(f"unknown parameter {param!r}", param=param)
    return InvalidRequest(f"{param}: {message}; got {_shorten(error['input'])}", param=param)


def _shorten(value: object) -> str:
    text = repr(value) if not isinstance(value, (list, dict)) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= 80 else text[:77] + "..."
