"""The flags of `slipstream bench soak`, and its verdict."""

from __future__ import annotations

import click

from bench.flags import BadFlag
from bench.soak.run import SoakOptions, encoded, soak
from bench.soak.verdict import text
from core.errors import ConfigError, Unavailable
from core.finite import FiniteRange

WARM_UP_SHARE = 0.5
"""Allocators and caches take a while to fill: their curves flatten, a leak does not."""


@click.command("soak")
@click.option("--minutes", default=20.0, type=FiniteRange(0, min_open=True), help="How long. [default: 20]")
@click.option("--base-url", "--url", default="http://127.0.0.1:8000", help="[default: http://127.0.0.1:8000]")
@click.option("--concurrency", default=32, type=click.IntRange(1), help="Clients, none of which pauses. [default: 32]")
@click.option("--warm-up", type=FiniteRange(0), help="Minutes before growth counts; default: half of the time.")
@click.option("--input-len", default=512, type=click.IntRange(1), help="Longest prompt, in tokens. [default: 512]")
@click.option("--output-len", default=128, type=click.IntRange(1), help="Longest output, in tokens. [default: 128]")
@click.option(
    "--request-timeout",
    default=300.0,
    type=FiniteRange(0, min_open=True),
    help="Seconds after which a request without an end is lost. [default: 300]",
)
@click.option("--seed", default=0, type=click.IntRange(0), help="Of the mix of requests. [default: 0]")
@click.option(
    "--pid",
    "pids",
    multiple=True,
    type=click.IntRange(1),
    help="A process of the server, looked at with all below it; may be repeated. Default: found by the port, if the "
    "server is on this machine.",
)
@click.option(
    "--max-growth",
    default=1.0,
    type=FiniteRange(0),
    help="MiB a minute by which the memory of all processes may grow after the warm-up. [default: 1]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the whole report as JSON, every sample included.")
@click.pass_context
def soak_command(
    ctx: click.Context,
    base_url: str,
    minutes: float,
    warm_up: float | None,
    input_len: int,
    output_len: int,
    request_timeout: float,
    max_growth: float,
    as_json: bool,
    *,
    concurrency: int,
    seed: int,
    pids: tuple[int, ...],
) -> None:
    """Keep an OpenAI server under full load and see that nothing is lost and nothing grows.

    Requests are of all lengths and priorities, streamed and whole; some clients leave, some send nonsense. Every answer
    must come, once, with as many tokens as were asked for. Growth is the slope (Theil-Sen) of memory that no other
    process shares, descriptors and threads. Nobody else may use the server meanwhile. Exit status: 0; 1 for a loss or
    growth, or if the server can't be reached; 2 for a bad flag.
    """
    try:
        options = SoakOptions(
            base_url=base_url.rstrip("/"),
            minutes=minutes,
            warm_up=minutes * WARM_UP_SHARE if warm_up is None else warm_up,
            concurrency=concurrency,
            input_tokens=input_len,
            output_tokens=output_len,
            request_timeout_s=request_timeout,
            seed=seed,
            pids=pids,
            max_growth_mib=max_growth,
        )
        report = soak(options, lambda line: click.echo(line, err=True))
    except ConfigError as error:
        raise BadFlag(error.message) from error
    except Unavailable as error:
        raise click.ClickException(error.message) from error
    click.echo(encoded(report) if as_json else text(report))
    ctx.exit(0 if report["ok"] else 1)
