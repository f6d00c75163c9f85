"""From timelines to numbers, by the definitions and under the names of `vllm bench serve`."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.serving.load import Run
from bench.serving.timeline import Timeline

MS = 1e3


def summary(run: Run, goodput: dict[str, float]) -> dict[str, Any]:
    """Counts and rates. Latencies and tokens are those of completed requests only; a failed one counts as failed, and
    one cut short by an interruption as neither. `goodput` holds targets in milliseconds."""
    completed = [t for t in run.timelines if t.completed]
    failures = Counter(t.error for t in run.timelines if t.error is not None)
    tokens_in = sum(t.prompt_tokens or 0 for t in completed)
    tokens_out = sum(t.output_tokens for t in completed)
    good = sum(meets(t, goodput) for t in completed)
    ended = len(completed) + failures.total()
    per_second = 1 / run.duration if run.duration > 0 else 0.0
    return {
        "duration": run.duration,
        "completed": len(completed),
        "failed": failures.total(),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(completed) * per_second,
        "request_goodput": good * per_second if goodput else None,
        "output_throughput": tokens_out * per_second,
        "total_token_throughput": (tokens_in + tokens_out) * per_second,
        "max_output_tokens_per_s": peak_output_rate(completed),
        "max_concurrent_requests": peak_concurrency(completed),
        "slo_attainment": good / ended if goodput and ended else None,
        "total_cached_tokens": sum(t.cached_tokens for t in completed),
        "output_tokens_from": token_source(completed),
        "failures": dict(failures.most_common()),
        "interrupted": run.interrupted,
        "cut_short": sum(t.start > 0 and not t.finished and t.error is None for t in run.timelines),
        "client_cpu_utilization": run.cpu * per_second,
    }


def meets(timeline: Timeline, targets: dict[str, float]) -> bool:
    """Whether a completed request met every target (milliseconds). Without a second token TPOT is met."""
    values = {"ttft": timeline.ttft, "tpot": timeline.tpot or 0.0, "e2el": timeline.latency}
    return all(values[name] * MS <= target for name, target in targets.items())


def token_source(completed: Sequence[Timeline]) -> str | None:
    """Where output token counts come from: the server's `usage`, or `chunks` of the stream, counted one token each."""
    sources = {"chunks" if t.completion_tokens is None else "usage" for t in completed}
    return "+".join(sorted(sources)) or None


def samples(completed: Sequence[Timeline], metric: str) -> list[float]:
    """The values of one metric, in seconds: one a request, except ITL, one a gap."""
    if metric == "itl":
        return [gap for t in completed for gap in t.itl]
    if metric == "tpot":
        return [t.tpot for t in completed if t.tpot is not None]
    if metric == "e2el_including_client_queue":
        return [t.latency + t.client_queue_time for t in completed]
    return [getattr(t, "latency" if metric == "e2el" else metric) for t in completed]


def statistics(values: Sequence[float], metric: str, percentiles: Sequence[float]) -> dict[str, float | None]:
    """mean_, median_, std_ and pN_ of seconds, as `…_{metric}_ms`. None where there is nothing to measure: JSON has no
    NaN and 0 ms would be a lie. std is of the population; percentiles interpolate linearly."""
    keys = ["mean", "median", "std", *(f"p{p:g}" for p in percentiles)]
    names = [f"{key}_{metric}_ms" for key in keys]
    if not values:
        return dict.fromkeys(names)
    v = np.asarray(values) * MS
    numbers = [v.mean(), np.median(v), v.std(), *np.percentile(v, list(percentiles))]
    return {name: float(number) for name, number in zip(names, numbers, strict=True)}


def dispatch_lag(run: Run) -> dict[str, float | None]:
    """How late the generator itself was, in milliseconds."""
    lags = [t.dispatch_lag * MS for t in run.timelines]
    return {
        "median_dispatch_lag_ms": float(np.median(lags)) if lags else None,
        "max_dispatch_lag_ms": max(lags, default=None),
    }


def by_category(run: Run, categories: Sequence[str | None], percentiles: Sequence[float]) -> dict[str, dict[str, Any]]:
    """The same numbers for each category of the dataset; categories[i] is that of the request with index i."""
    result: dict[str, dict[str, Any]] = {}
    for name in sorted({c for c in categories if c is not None}):
        mine = [t for t in run.timelines if categories[t.index] == name]
        done = [t for t in mine if t.completed]
        result[name] = {
            "completed": len(done),
            "failed": sum(t.error is not None for t in mine),
            "total_output_tokens": sum(t.output_tokens for t in done),
        }
        for metric in ("ttft", "tpot", "e2el"):
            result[name] |= statistics(samples(done, metric), metric, percentiles)
    return result


def peak_output_rate(completed: Sequence[Timeline]) -> float:
    """Most output tokens in one of the seconds since the first start. A request's tokens are spread evenly over its
    chunks, since a stream does not say how many each one carries."""
    if not any(t.chunks for t in completed):
        return 0.0
    first = min(t.start for t in completed)
    seconds: defaultdict[int, float] = defaultdict(float)
    for t in completed:
        for at in t.chunks:
            seconds[math.floor(at - first)] += t.output_tokens / len(t.chunks)
    return max(seconds.values())


def peak_concurrency(completed: Sequence[Timeline]) -> int:
    """Most requests under way at one moment; one that ends as another starts does not overlap it."""
    edges = sorted([(t.start, 1) for t in completed] + [(t.end, -1) for t in completed])
    return max(np.cumsum([step for _, step in edges]).tolist(), default=0)
