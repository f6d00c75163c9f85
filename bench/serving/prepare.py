"""Everything before the clock starts: reach the server, learn its model, make the prompts, encode the requests."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import httpx
import numpy as np

from bench.serving.arrivals import arrival_offsets
from bench.serving.client import encode_requests
from bench.serving.datasets import Prompt, file_prompts
from bench.serving.http import HttpClient
from bench.serving.options import ServeOptions
from bench.serving.random_prompts import random_prompts
from bench.serving.text import FolderTokenizer, ServerTokenizer, Tokenizer
from core.errors import ConfigError, Unavailable

RETRY_S = 1.0
CONTROL_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Prepared:
    http: HttpClient
    model: str
    prompts: list[Prompt]
    requests: list[bytes]
    """One for each prompt, ready to be written to a socket."""
    offsets: list[float]
    """Seconds after the start at which each is due."""


def prepare(options: ServeOptions) -> Prepared:
    """Raises ConfigError naming the flag at fault, or Unavailable when the server can't be reached in time."""
    headers = request_headers(options)
    http = HttpClient(options.api_url, headers, insecure=options.insecure)
    prompts_rng, arrivals_rng = np.random.default_rng(options.seed).spawn(2)
    with httpx.Client(
        base_url=options.base_url,
        headers=headers,
        timeout=CONTROL_TIMEOUT_S,
        verify=not options.insecure,
        trust_env=False,  # as the load itself: no proxies
    ) as control:
        model = discover(control, options)
        tokenizer = FolderTokenizer(options.tokenizer) if options.tokenizer else ServerTokenizer(control, model)
        prompts = _prompts(options, tokenizer, prompts_rng)
    offsets = arrival_offsets(len(prompts), options.request_rate, options.burstiness, arrivals_rng)
    return Prepared(http, model, prompts, encode_requests(http, options, model, prompts), offsets.tolist())


def _prompts(options: ServeOptions, tokenizer: Tokenizer, rng: np.random.Generator) -> list[Prompt]:
    make = random_prompts if options.dataset_name == "random" else file_prompts
    return make(options, tokenizer, rng)


def request_headers(options: ServeOptions) -> dict[str, str]:
    """--header, and the key of OPENAI_API_KEY unless an authorization is given."""
    headers = dict(options.header)
    key = os.environ.get("OPENAI_API_KEY")
    if key and not any(name.lower() == "authorization" for name in headers):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def discover(control: httpx.Client, options: ServeOptions) -> str:
    """--model, or the first of /v1/models, once the server answers; one that is down or answers 5xx is asked again
    until --ready-check-timeout-sec has passed."""
    deadline = time.monotonic() + options.ready_check_timeout_sec
    while True:
        try:
            response = control.get("/v1/models")
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
        else:
            if options.model is not None:
                return options.model
            if not response.is_server_error:
                return _first_model(response)
            reason = f"/v1/models answers {response.status_code}"
        if time.monotonic() >= deadline:
            raise Unavailable(f"--base-url: can't reach a server at {options.base_url}: {reason}", param="--base-url")
        time.sleep(min(RETRY_S, max(deadline - time.monotonic(), 0)))


def _first_model(response: httpx.Response) -> str:
    try:
        return str(response.raise_for_status().json()["data"][0]["id"])
    except (httpx.HTTPStatusError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(
            f"--model: /v1/models (status {response.status_code}) names no model; give --model", param="--model"
        ) from error
