"""What a hand-off costs a request, seen by its client: time to first token, and the gap between first and second."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import httpx

from bench.cost import running

NUM_TOKENS = 8
"""Of an answer. The gaps after the second token are ordinary ones."""
WARM_UP = 3
CORES = ["--cpus-per-worker", "1"]
HANDED_OVER = ["--handoff-min-tokens", "0", *CORES]
COLOCATED = ["--colocated", *CORES]


class Seen(NamedTuple):
    """Milliseconds of one request."""

    ttft: float
    first_gap_extra: float
    """First gap less the median of the others."""


def measure_gap(model: str, num_prompt_tokens: int, num_requests: int, starts: int) -> dict[str, Any]:
    """Two servers with one core per worker, one that hands over and one that does not, side by side and asked by turns,
    one request at a time. Both are started so often, as servers of one kind differ more than their requests do."""
    pairs: list[tuple[Seen, Seen]] = []
    added: dict[str, list[float]] = {key: [] for key in Seen._fields}
    for start in range(starts):
        with running(model, HANDED_OVER) as (first, _, _), running(model, COLOCATED) as (second, _, _):
            found = asyncio.run(_ask_by_turns((first, second), model, num_prompt_tokens, num_requests, start))
        pairs += found
        for place, key in enumerate(Seen._fields):
            added[key].append(statistics.median(one[place] - other[place] for one, other in found))
    result: dict[str, Any] = {"prompt_tokens": num_prompt_tokens}
    for name, seen in zip(("handed_over", "colocated"), zip(*pairs, strict=True), strict=True):
        result[name] = {f"{key}_ms": statistics.median(getattr(one, key) for one in seen) for key in Seen._fields}
    for key, of_starts in added.items():
        result[f"{key}_added_ms"] = statistics.median(of_starts)
        result[f"{key}_added_by_start_ms"] = of_starts
    return result


async def _ask_by_turns(
    urls: tuple[str, str], model: str, num_prompt_tokens: int, num_requests: int, seed: int
) -> list[tuple[Seen, Seen]]:
    """The first ones warm up. Neither server always comes first: what the machine does from time to time hits both."""
    rng = random.Random(seed)
    pairs = []
    async with (
        httpx.AsyncClient(base_url=urls[0], timeout=60) as handed_over,
        httpx.AsyncClient(base_url=urls[1], timeout=60) as colocated,
    ):
        for index in range(WARM_UP + num_requests):
            seen = {}
            for client in (handed_over, colocated)[:: 1 if index % 2 else -1]:
                prompt = [rng.randrange(100, 40_000) for _ in range(num_prompt_tokens)]
                seen[client] = _seen(await _token_times(client, model, prompt))
            if index >= WARM_UP:
                pairs.append((seen[handed_over], seen[colocated]))
    return pairs


def _seen(times: Sequence[float]) -> Seen:
    gaps = [after - before for before, after in pairwise(times[1:])]
    return Seen(1e3 * (times[1] - times[0]), 1e3 * (gaps[0] - statistics.median(gaps[1:])))


async def _token_times(client: httpx.AsyncClient, model: str, prompt: list[int]) -> list[float]:
    """When the request was sent, and when each token came."""
    body = {"model": model, "prompt": prompt, "max_tokens": NUM_TOKENS, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, "logprobs": 0}  # so that a token without text of its own is sent too
    times = [time.perf_counter()]
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        times += [time.perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]
    return times
