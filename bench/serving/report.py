"""The result of a run: JSON with the keys of `vllm bench serve` and the table its users know."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.serving import metrics
from bench.serving.load import Run
from bench.serving.options import ServeOptions
from core.errors import ConfigError

WIDTH = 58
SHOWN_FAILURES = 5
LAG_MEDIAN_WARN_MS = 5.0
LAG_MAX_WARN_MS = 100.0

_TITLES = {
    "ttft": ("TTFT", "Time to First Token"),
    "tpot": ("TPOT", "Time per Output Token (excl. 1st token)"),
    "itl": ("ITL", "Inter-token Latency"),
    "e2el": ("E2EL", "End-to-end Latency"),
    "client_queue_time": ("Client Queue Time", "Waiting for a Slot under --max-concurrency"),
    "e2el_including_client_queue": ("E2EL incl. Client Queue", "End-to-end Latency from Arrival"),
}


def reported_metrics(options: ServeOptions) -> tuple[str, ...]:
    """Those asked for; where arrivals at a rate have to wait for a slot, also what that wait adds."""
    waits = options.max_concurrency is not None and math.isfinite(options.request_rate)
    return options.percentile_metrics + ("client_queue_time", "e2el_including_client_queue") * waits


def build_result(
    options: ServeOptions, model: str, run: Run, categories: Sequence[str | None], date: datetime
) -> dict[str, Any]:
    """Everything that is saved. Raises ConfigError for metadata that would be overwritten."""
    completed = [t for t in run.timelines if t.completed]
    result: dict[str, Any] = {
        "date": date.strftime("%Y%m%d-%H%M%S"),
        "endpoint_type": options.backend,
        "backend": options.backend,
        "label": options.label,
        "model_id": model,
        "tokenizer_id": options.tokenizer,
        "dataset_name": options.dataset_name,
        "seed": options.seed,
        "num_prompts": len(categories),
        "request_rate": options.request_rate if math.isfinite(options.request_rate) else "inf",
        "burstiness": options.burstiness if math.isfinite(options.burstiness) else "inf",
        "max_concurrency": options.max_concurrency,
        "goodput_config": options.goodput or None,
    }
    result |= metrics.summary(run, options.goodput)
    if math.isfinite(options.request_rate):
        result |= metrics.dispatch_lag(run)
    for metric in reported_metrics(options):
        result |= metrics.statistics(metrics.samples(completed, metric), metric, options.metric_percentiles)
    if options.save_detailed:
        result |= _detailed(run)
        result["categories"] = metrics.by_category(run, categories, options.metric_percentiles)
    if taken := sorted(options.metadata.keys() & result.keys()):
        raise ConfigError(f"--metadata: {taken[0]!r} is a key of the result; use another name", param="--metadata")
    return result | options.metadata


def _detailed(run: Run) -> dict[str, list[Any]]:
    """Per request, in dispatch order, in seconds; start times count from the start of the run."""
    sent = [t for t in run.timelines if t.start > 0]
    return {
        "input_lens": [t.prompt_tokens for t in sent],
        "output_lens": [t.output_tokens if t.completed else 0 for t in sent],
        "ttfts": [t.ttft if t.completed else None for t in sent],
        "itls": [t.itl for t in sent],
        "latencies": [t.latency if t.completed else None for t in sent],
        "start_times": [t.start - run.began for t in sent],
        "queue_times": [t.client_queue_time for t in sent],
        "generated_texts": [t.text for t in sent],
        "errors": [t.error or ("" if t.completed else "cut short") for t in sent],
    }


# --- the table -----------------------------------------------------------------------------------------------------


def table(result: dict[str, Any], options: ServeOptions) -> str:
    lines = [f"{' Serving Benchmark Result ':=^{WIDTH}}", *_counts(result, options)]
    for metric in reported_metrics(options):
        short, title = _TITLES[metric]
        lines.append(f"{title:-^{WIDTH}}")
        keys = ("mean", "median", *(f"p{p:g}" for p in options.metric_percentiles))
        lines += [_row(f"{key.capitalize()} {short} (ms):", result[f"{key}_{metric}_ms"]) for key in keys]
    lines += _categories(result.get("categories", {}))
    return "\n".join([*lines, "=" * WIDTH])


def _counts(result: dict[str, Any], options: ServeOptions) -> Iterator[str]:
    yield _row("Successful requests:", result["completed"])
    yield _row("Failed requests:", result["failed"])
    if result["interrupted"]:
        yield _row("Cut short by the interruption:", result["cut_short"])
        yield _row("Not sent:", result["num_prompts"] - sum(result[k] for k in ("completed", "failed", "cut_short")))
    if options.max_concurrency is not None:
        yield _row("Maximum request concurrency:", options.max_concurrency)
    if math.isfinite(options.request_rate):
        yield _row("Request rate configured (RPS):", options.request_rate)
    yield _row("Benchmark duration (s):", result["duration"])
    yield _row("Total input tokens:", result["total_input_tokens"])
    if result["total_cached_tokens"]:
        yield _row("  of these from the prefix cache:", result["total_cached_tokens"])
    yield _row(f"Total generated tokens (by {result['output_tokens_from'] or '-'}):", result["total_output_tokens"])
    yield _row("Request throughput (req/s):", result["request_throughput"])
    if options.goodput:
        yield _row("Request goodput (req/s):", result["request_goodput"])
        yield _row("SLO attainment (%):", None if result["slo_attainment"] is None else result["slo_attainment"] * 100)
    yield _row("Output token throughput (tok/s):", result["output_throughput"])
    yield _row("Peak output token throughput (tok/s):", result["max_output_tokens_per_s"])
    yield _row("Peak concurrent requests:", result["max_concurrent_requests"])
    yield _row("Total token throughput (tok/s):", result["total_token_throughput"])
    yield _row("Generator CPU (% of one core):", result["client_cpu_utilization"] * 100)
    if "max_dispatch_lag_ms" in result:
        yield _row("Median dispatch lag (ms):", result["median_dispatch_lag_ms"])
        yield _row("Max dispatch lag (ms):", result["max_dispatch_lag_ms"])


def _categories(categories: dict[str, dict[str, Any]]) -> Iterator[str]:
    if not categories:
        return
    yield f"{'By category: mean':-^{WIDTH}}"
    yield f"{'':<22}{'requests':>9}{'TTFT ms':>9}{'TPOT ms':>9}{'E2EL ms':>9}"
    for name, of in categories.items():
        means = "".join(f"{_number(of[f'mean_{metric}_ms']):>9}" for metric in ("ttft", "tpot", "e2el"))
        yield f"{name:<22}{of['completed']:>9}{means}"


def _row(label: str, value: float | None) -> str:
    return f"{label:<46}{_number(value)}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


# --- what else the user should know --------------------------------------------------------------------------------


def warnings(result: dict[str, Any]) -> Iterator[str]:
    """Reasons for failures, and anything that makes the numbers mean less than they seem to."""
    failures = list(result["failures"].items())
    for reason, count in failures[:SHOWN_FAILURES]:
        yield f"{count} failed: {reason}"
    if (hidden := len(failures) - SHOWN_FAILURES) > 0:
        yield f"{hidden} more reasons for failures are in the saved result (--save-result)"
    if "chunks" in (result["output_tokens_from"] or ""):
        yield "some answers came without usage: their input isn't counted, their output is one token per chunk"
    median, most = result.get("median_dispatch_lag_ms") or 0.0, result.get("max_dispatch_lag_ms") or 0.0
    if median > LAG_MEDIAN_WARN_MS or most > LAG_MAX_WARN_MS:
        yield (
            f"the generator fell behind its schedule (median {median:.1f} ms, max {most:.1f} ms): it lacks CPU; "
            "lower --request-rate or run it on another machine"
        )


# --- the file ------------------------------------------------------------------------------------------------------


def result_path(options: ServeOptions, model: str, date: datetime) -> Path | None:
    """Where the result goes, its folder made and writable; None when it isn't saved. Raises ConfigError."""
    if not (options.save_result or options.append_result):
        return None
    limit = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    name = (
        f"{options.label or options.backend}-{options.request_rate}qps{limit}-{model.rstrip('/').split('/')[-1]}"
        f"-{date:%Y%m%d-%H%M%S}.json"
    )
    path = Path(options.result_dir or ".") / (options.result_filename or name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"--result-dir: {path.parent} can't be made: {error.strerror}", param="--result-dir"
        ) from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ConfigError(f"--result-dir: {path} can't be written", param="--result-dir")
    return path


def save(result: dict[str, Any], path: Path, *, append: bool) -> None:
    """One JSON object; with `append`, on a line of its own after those already there."""
    text = json.dumps(result, allow_nan=False)
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.write(("\n" if append and file.tell() else "") + text)
