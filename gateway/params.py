"""From a client's request to core.types.Request: defaults of the model, and the checks that need the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec.structs import replace

from core.errors import ContextLengthExceeded, InvalidRequest
from core.types import Grammar, Request, SamplingParams, Slo, SpeculationWish
from gateway.config import GatewayConfig
from gateway.protocol import ChatMessage, ChatRequest, CompletionRequest, GenerationRequest
from gateway.seeds import SEED_RANGE, Seeds
from gateway.tokenizer import ServedModel

GREEDY_BELOW = 1e-5
"""A temperature below this is greedy: logits divided by it would overflow."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for max_tokens of text completions."""
_SEED_STRIDE = 0x9E3779B97F4A7C15


def check_limits(body: GenerationRequest, num_prompts: int, model: ServedModel, config: GatewayConfig) -> None:
    """What can be refused before tokenization. Raises InvalidRequest."""
    _check_choices(body, num_prompts, config)
    _refuse_if(len(body.stop) > config.max_stop_strings, "stop", f"at most {config.max_stop_strings} stop strings")
    too_long = any(len(s) > config.max_stop_chars for s in body.stop)
    _refuse_if(too_long, "stop", f"a stop string has at most {config.max_stop_chars} characters")
    _refuse_if(len(body.logit_bias) > config.max_logit_bias, "logit_bias", f"at most {config.max_logit_bias} tokens")
    _refuse_if(
        len(body.stop_token_ids) > config.max_stop_token_ids,
        "stop_token_ids",
        f"at most {config.max_stop_token_ids} token ids",
    )
    check_token_ids(body.logit_bias, "logit_bias", model)
    check_token_ids(body.stop_token_ids, "stop_token_ids", model)
    _refuse_if(
        body.stream_options is not None and not body.stream, "stream_options", "only allowed when stream is true"
    )
    _check_logprobs(body, config)
    if isinstance(body, CompletionRequest) and body.max_tokens == 0:
        no_use = not body.echo and body.prompt_logprobs is None
        _refuse_if(no_use, "max_tokens", "0 generates nothing, which is of use with echo or prompt_logprobs only")
    if isinstance(body, ChatRequest):
        check_messages(body.messages, model)
    if isinstance(body, ChatRequest) and body.max_tokens and body.max_completion_tokens:
        differ = body.max_tokens != body.max_completion_tokens
        _refuse_if(differ, "max_tokens", "differs from max_completion_tokens; send one of them")


def _check_choices(body: GenerationRequest, num_prompts: int, config: GatewayConfig) -> None:
    name = "n" if body.best_of is None else "best_of"
    too_many = num_prompts * body.num_candidates > config.max_choices
    _refuse_if(too_many, name, f"at most {config.max_choices} choices in one request")
    _refuse_if(body.num_candidates < body.n, "best_of", f"{body.best_of} is below n, which is {body.n}; raise it")
    hidden = body.stream and body.num_candidates > body.n
    _refuse_if(hidden, "best_of", "above n it can't be streamed: which are best is known at the end; leave out stream")


def _check_logprobs(body: GenerationRequest, config: GatewayConfig) -> None:
    name = "logprobs" if isinstance(body, CompletionRequest) else "top_logprobs"
    _refuse_if((body.alternatives or 0) > config.max_logprobs, name, f"at most {config.max_logprobs}")
    if isinstance(body, ChatRequest):
        _refuse_if(body.top_logprobs is not None and not body.logprobs, "top_logprobs", "needs logprobs true")
    _refuse_if((body.prompt_logprobs or 0) > config.max_logprobs, "prompt_logprobs", f"at most {config.max_logprobs}")
    streamed = body.stream and body.prompt_logprobs is not None
    _refuse_if(streamed, "prompt_logprobs", "not available in a stream; leave out stream")


def check_messages(messages: Sequence[ChatMessage], model: ServedModel) -> None:
    """Raises ContextLengthExceeded for more messages than tokens, before a template takes seconds to render them."""
    if len(messages) > model.max_model_len:
        raise ContextLengthExceeded(
            f"messages: {len(messages)} messages do not fit a context of {model.max_model_len} tokens; send fewer",
            param="messages",
        )


def check_token_ids(token_ids: Iterable[int], param: str, model: ServedModel) -> None:
    bad = next((i for i in token_ids if not 0 <= i < model.vocab_size), None)
    if bad is not None:
        raise InvalidRequest(
            f"{param}: token id {bad} is outside the vocabulary of {model.vocab_size} tokens", param=param
        )


def _refuse_if(wrong: bool, param: str, rule: str) -> None:
    if wrong:
        raise InvalidRequest(f"{param}: {rule}", param=param)


def max_tokens(body: GenerationRequest, num_prompt_tokens: int, model: ServedModel) -> int:
    """How many tokens may be generated. Raises InvalidRequest when prompt and output do not fit the context."""
    param = "messages" if isinstance(body, ChatRequest) else "prompt"
    room = model.max_model_len - num_prompt_tokens
    if num_prompt_tokens == 0:
        raise InvalidRequest(f"{param} has no tokens; send at least one", param=param)
    wanted = body.token_limit
    if room < (1 if wanted is None else wanted):
        limit = body.token_limit_param
        asked = f" and {limit} asks for {wanted}" if wanted else ", which leaves no room for output"
        advice = f"lower {limit} to {room}" if room > 0 else "shorten the prompt"
        raise ContextLengthExceeded(
            f"this model's context is {model.max_model_len} tokens, but the prompt has {num_prompt_tokens}{asked}; "
            f"{advice}",
            param=limit if room > 0 else param,
        )
    if wanted is not None:
        return wanted
    default = DEFAULT_COMPLETION_TOKENS if isinstance(body, CompletionRequest) else room
    return min(room, int(model.defaults.get("max_new_tokens", default)))


def sampling_params(body: GenerationRequest, limit: int, seed: int, model: ServedModel) -> SamplingParams:
    """`limit` is max_tokens."""
    if body.min_tokens > limit:
        raise InvalidRequest(f"min_tokens: {body.min_tokens} is above max_tokens {limit}", param="min_tokens")
    stop_token_ids = {*body.stop_token_ids, *(() if body.ignore_eos else model.eos_token_ids)}
    if body.min_tokens and len(stop_token_ids) >= model.vocab_size:
        raise InvalidRequest(
            "stop_token_ids: every token ends the output, so there are no min_tokens to draw; leave some out",
            param="stop_token_ids",
        )
    temperature = _choose(body.temperature, model.defaults, "temperature", 1.0)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=body.min_tokens,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_choose(body.top_p, model.defaults, "top_p", 1.0),
        top_k=max(0, int(_choose(body.top_k, model.defaults, "top_k", 0))),
        min_p=_choose(body.min_p, model.defaults, "min_p", 0.0),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=_choose(body.repetition_penalty, model.defaults, "repetition_penalty", 1.0),
        logit_bias=body.logit_bias,
        seed=seed % SEED_RANGE,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        logprobs=body.needed_alternatives,
        prompt_logprobs=body.prompt_alternatives,
    )


def _choose(given: float | None, defaults: Mapping[str, float], name: str, otherwise: float) -> float:
    return float(given if given is not None else defaults.get(name, otherwise))


def derived_seed(seed: int, choice: int) -> int:
    """The seed of the n-th choice: the request's own for the first, spread over the range for the others."""
    return (seed + choice * _SEED_STRIDE) % SEED_RANGE


def slo_from_headers(headers: Mapping[str, str]) -> Slo | None:
    """x-slo-ttft-ms and x-slo-tpot-ms, milliseconds."""
    ttft, tpot = (_milliseconds(headers, f"x-slo-{name}-ms") for name in ("ttft", "tpot"))
    return Slo(ttft_ms=ttft, tpot_ms=tpot) if ttft is not None or tpot is not None else None


def _milliseconds(headers: Mapping[str, str], name: str) -> float | None:
    if (text := headers.get(name)) is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InvalidRequest(f"header {name}: {text[:40]!r} is not a positive number of milliseconds", param=name)
    return value


def build_requests(
    body: GenerationRequest,
    prompts: list[list[int]],
    model: ServedModel,
    seeds: Seeds,
    *,
    grammar: Grammar | None = None,
    base_id: str,
    deadline: float,
    slo: Slo | None,
    speculation: SpeculationWish | None = None,
    remember: bool = True,
    trace: str = "",
) -> list[Request]:
    """One per candidate: prompts in order, the candidates of a prompt next to each other (OpenAI's index). `seeds` are
    for clients that gave none. What the prompt's logprobs are is the same for all candidates: where the answer is
    written as a whole, only the first has to report them."""
    requests: list[Request] = []
    for prompt in prompts:
        seed = seeds.draw(prompt) if body.seed is None else body.seed
        sampling = replace(sampling_params(body, max_tokens(body, len(prompt), model), seed, model), grammar=grammar)
        for choice in range(body.num_candidates):
            scored = sampling.prompt_logprobs if choice == 0 or body.stream else None
            requests.append(
                Request(
                    request_id=f"{base_id}-{len(requests)}",
                    prompt_token_ids=prompt,
                    sampling=replace(sampling, seed=derived_seed(sampling.seed, choice), prompt_logprobs=scored),
                    deadline=deadline,
                    slo=slo,
                    priority=body.priority,
                    cache_salt=body.cache_salt,
                    adapter=model.adapter_of(body.model),
                    speculation=speculation,
                    remember=remember,
                    trace=trace,
                )
            )
    return requests
