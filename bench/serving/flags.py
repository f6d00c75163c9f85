"""The flags of `slipstream bench serve`. Names and meanings are those of `vllm bench serve`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from bench.serving.options import ENDPOINTS
from core.finite import FiniteRange

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")

Decorator = Callable[[Any], Any]

_POSITIVE = click.IntRange(min=1)
_COUNT = click.IntRange(min=0)


def _group(*flags: Decorator) -> Decorator:
    """One decorator that adds all flags, in this order."""

    def add(command: Any) -> Any:
        for flag in reversed(flags):
            command = flag(command)
        return command

    return add


server_flags = _group(
    click.option(
        "--backend",
        type=click.Choice(list(ENDPOINTS)),
        default="openai",
        show_default=True,
        help="openai: /v1/completions; openai-chat: /v1/chat/completions.",
    ),
    click.option("--base-url", help="Default: http://HOST:PORT."),
    click.option("--host", default="127.0.0.1", show_default=True),
    click.option("--port", type=click.IntRange(1, 65535), default=8000, show_default=True),
    click.option("--endpoint", help="Default: the one of --backend."),
    click.option("--model", help="Default: the first of /v1/models."),
    click.option(
        "--header",
        multiple=True,
        metavar="KEY=VALUE...",
        help="Sent with every request. OPENAI_API_KEY, where set, is sent as a bearer token.",
    ),
    click.option("--insecure", is_flag=True, help="Don't verify TLS certificates."),
    click.option(
        "--ready-check-timeout-sec",
        type=FiniteRange(min=0),
        default=0,
        show_default=True,
        help="Wait as long for the server to come up and a first request to succeed; 0: don't.",
    ),
    click.option("--request-timeout", type=float, default=21600, show_default=True, help="Seconds a request may take."),
    click.option("--request-id-prefix", help="Of x-request-id. Default: bench-<random>-."),
)


dataset_flags = _group(
    click.option(
        "--dataset-name",
        type=click.Choice(["random", "sharegpt", "spec-bench", "spec_bench", "custom"]),
        default="random",
        show_default=True,
        help="custom: JSON lines with `prompt` or `turns`.",
    ),
    click.option("--dataset-path", help="File of the dataset; not for random."),
    click.option("--num-prompts", type=_POSITIVE, default=1000, show_default=True),
    click.option("--seed", type=_COUNT, default=0, show_default=True, help="Of prompts and arrivals."),
    click.option("--disable-shuffle", is_flag=True, help="Take the prompts of a file in their order."),
    click.option("--no-oversample", is_flag=True, help="Don't repeat prompts when a file has too few."),
    click.option("--input-len", type=_POSITIVE, help="Same as --random-input-len."),
    click.option("--output-len", type=_POSITIVE, help="The output length of whichever dataset is used."),
    click.option("--random-input-len", type=_POSITIVE, default=1024, show_default=True),
    click.option("--random-output-len", type=_POSITIVE, default=128, show_default=True),
    click.option(
        "--random-range-ratio",
        type=float,
        default=0.0,
        show_default=True,
        help="Lengths are uniform on [len (1 - r), len (1 + r)].",
    ),
    click.option(
        "--random-prefix-len",
        type=_COUNT,
        default=0,
        show_default=True,
        help="Tokens all prompts start with, on top of the input length.",
    ),
    click.option("--sharegpt-output-len", type=_POSITIVE, help="Default: the length of each answer in the file."),
    click.option(
        "--custom-output-len",
        type=click.IntRange(min=-1),
        default=256,
        show_default=True,
        help="-1: each line's own `output_tokens`.",
    ),
    click.option("--spec-bench-output-len", type=_POSITIVE, default=256, show_default=True),
    click.option(
        "--tokenizer",
        help="Folder with tokenizer.json, for text prompts of exact lengths. Without it the server's /tokenize "
        "is used, and random prompts for completions are sent as token ids.",
    ),
)


load_flags = _group(
    click.option(
        "--request-rate",
        type=float,
        default=float("inf"),
        show_default=True,
        help="Requests per second; inf: all at once.",
    ),
    click.option(
        "--burstiness",
        type=float,
        default=1.0,
        show_default=True,
        help="Shape of the gamma law of gaps: 1 is a Poisson process, less is burstier, more is more even.",
    ),
    click.option("--max-concurrency", type=_POSITIVE, help="Requests under way at a time; others wait."),
    click.option("--num-warmups", type=_COUNT, default=0, show_default=True),
    click.option(
        "--ignore-eos/--no-ignore-eos",
        default=None,
        help="Generate to the full output length. Default: for --dataset-name random only.",
    ),
    *(click.option(f"--{name.replace('_', '-')}", name, type=FiniteRange()) for name in SAMPLING if name != "top_k"),
    click.option("--top-k", type=int),
    click.option("--extra-body", metavar="JSON", help="Fields added to every request; they win over flags."),
)


report_flags = _group(
    click.option(
        "--goodput",
        multiple=True,
        metavar="METRIC:MS...",
        help="Targets in milliseconds, as in ttft:200 tpot:50; metrics: ttft, tpot, e2el.",
    ),
    click.option("--percentile-metrics", default="ttft,tpot,itl,e2el", show_default=True),
    click.option("--metric-percentiles", default="50,90,99", show_default=True),
    click.option("--save-result", is_flag=True, help="Write the result as JSON."),
    click.option("--append-result", is_flag=True, help="Add it to the file instead of replacing that."),
    click.option("--save-detailed", is_flag=True, help="Every request's numbers, and those by category."),
    click.option("--result-dir", help="Default: the current folder."),
    click.option("--result-filename", help="Default: LABEL-RATEqps-MODEL-DATE.json."),
    click.option("--label", help="Default: the backend."),
    click.option("--metadata", multiple=True, metavar="KEY=VALUE...", help="Added to the result."),
    click.option("--disable-tqdm", is_flag=True, help="No progress bar."),
)
