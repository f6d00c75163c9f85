"""What the flags of `slipstream bench serve` say, checked once. Every refusal names its flag."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The names are those of the flags."""

    backend: str
    base_url: str
    endpoint: str
    model: str | None
    tokenizer: str | None
    header: dict[str, str]
    insecure: bool
    dataset_name: str
    dataset_path: str | None
    num_prompts: int
    disable_shuffle: bool
    no_oversample: bool
    random_input_len: int
    random_output_len: int
    random_range_ratio: float
    random_prefix_len: int
    sharegpt_output_len: int | None
    custom_output_len: int
    spec_bench_output_len: int
    request_rate: float
    burstiness: float
    max_concurrency: int | None
    num_warmups: int
    seed: int
    ignore_eos: bool
    sampling: dict[str, float]
    """The sampling flags that were given, by their request field."""
    extra_body: dict[str, Any]
    goodput: dict[str, float]
    """Targets in milliseconds."""
    percentile_metrics: tuple[str, ...]
    metric_percentiles: tuple[float, ...]
    save_result: bool
    save_detailed: bool
    append_result: bool
    result_dir: str | None
    result_filename: str | None
    label: str | None
    metadata: dict[str, str]
    disable_tqdm: bool
    request_id_prefix: str
    ready_check_timeout_sec: float
    request_timeout: float

    def __post_init__(self) -> None:
        _require(self.request_rate > 0, "--request-rate", "must be above 0, or inf to send everything at once")
        _require(self.burstiness > 0, "--burstiness", "must be above 0; 1 is a Poisson process")
        _require(0 <= self.random_range_ratio < 1, "--random-range-ratio", "must be at least 0 and below 1")
        _require(self.custom_output_len != 0, "--custom-output-len", "must be 1 or more, or -1 to take each line's own")
        _require(self.request_timeout > 0, "--request-timeout", "must be above 0 seconds")
        needs_path = self.dataset_name != "random"
        _require(bool(self.dataset_path) == needs_path, "--dataset-path", _path_reason(needs_path, self.dataset_name))
        if not (self.save_result or self.append_result):
            for flag, value in (("--result-dir", self.result_dir), ("--result-filename", self.result_filename)):
                _require(value is None, flag, "needs --save-result or --append-result")

    @property
    def api_url(self) -> str:
        return self.base_url + self.endpoint


def _require(ok: bool, flag: str, reason: str) -> None:
    if not ok:
        raise ConfigError(f"{flag}: {reason}", param=flag)


def _path_reason(needed: bool, dataset: str) -> str:
    return f"needed with --dataset-name {dataset}" if needed else "not used with --dataset-name random; leave it out"


def parse_pairs(flag: str, items: tuple[str, ...]) -> dict[str, str]:
    """KEY=VALUE items to a dict."""
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        _require(bool(equals and key.strip()), flag, f"{item!r} is not KEY=VALUE")
        _require(not ({"\r", "\n"} & set(item)), flag, f"{item!r} holds a line break")
        pairs[key.strip()] = value.strip()
    return pairs


def parse_goodput(items: tuple[str, ...]) -> dict[str, float]:
    """ttft:200 tpot:50 to milliseconds by metric."""
    targets = {}
    for item in items:
        name, _, value = item.partition(":")
        known = ", ".join(GOODPUT_METRICS)
        _require(name in GOODPUT_METRICS, "--goodput", f"{item!r} names no metric; use {known}, as in ttft:200")
        targets[name] = _number("--goodput", value, item)
        _require(0 <= targets[name] < math.inf, "--goodput", f"{item!r} needs a number of milliseconds, 0 or more")
    return targets


def parse_metrics(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        _require(name in METRICS, "--percentile-metrics", f"{name!r} is none of {', '.join(METRICS)}")
    return names


def parse_percentiles(text: str) -> tuple[float, ...]:
    flag = "--metric-percentiles"
    values = tuple(dict.fromkeys(_number(flag, part, part) for part in text.split(",")))
    for value in values:
        _require(0 <= value <= 100, flag, f"{value:g} is not between 0 and 100")
    return values


def parse_extra_body(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--extra-body: not JSON: {error}", param="--extra-body") from error
    _require(isinstance(value, dict), "--extra-body", 'must be a JSON object, as in {"top_k": 20}')
    return dict(value)


def _number(flag: str, text: str, item: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ConfigError(f"{flag}: {item!r} holds no number", param=flag) from error
