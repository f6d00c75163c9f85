"""`slipstream bench serve`: from flags to options, and from errors to one line and an exit status."""

from __future__ import annotations

import uuid
from typing import Any

import click

from bench.flags import BadFlag
from bench.serving.flags import SAMPLING, dataset_flags, load_flags, report_flags, server_flags
from bench.serving.options import (
    ENDPOINTS,
    ServeOptions,
    parse_extra_body,
    parse_goodput,
    parse_metrics,
    parse_pairs,
    parse_percentiles,
)
from core.errors import ConfigError, Unavailable

MANY = ("--goodput", "--header", "--metadata")
PREFIXES = ("random", "sharegpt", "custom", "spec_bench")


class _ManyValues(click.Command):
    """`--goodput ttft:200 tpot:50`: flags of MANY take every value up to the next flag, as in argparse."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded: list[str] = []
        flag, has_value = None, False
        for arg in args:
            if arg.startswith("--"):
                flag = next((name for name in MANY if arg == name or arg.startswith(f"{name}=")), None)
                has_value = "=" in arg
            elif flag and has_value:
                expanded.append(flag)
            else:
                has_value = True
            expanded.append(arg)
        return super().parse_args(ctx, expanded)


@click.command(cls=_ManyValues)
@server_flags
@dataset_flags
@load_flags
@report_flags
@click.pass_context
def serve(ctx: click.Context, /, **flags: Any) -> None:
    """Load a server that speaks the OpenAI API and measure it.

    Latencies are in milliseconds: TTFT to the first chunk with text, ITL between chunks, TPOT (E2EL - TTFT) / (output
    tokens - 1), E2EL to the last chunk. Exit status: 0; 1 when every request failed or the server can't be reached; 2
    for a bad flag; 130 after Ctrl-C.
    """
    try:
        _refuse_unused(ctx, flags)
        options = resolve_options(flags)
        from bench.serving.session import run_benchmark

        status = run_benchmark(options)
    except ConfigError as error:
        raise BadFlag(error.message) from error
    except Unavailable as error:
        raise click.ClickException(error.message) from error
    ctx.exit(status)


def _refuse_unused(ctx: click.Context, flags: dict[str, Any]) -> None:
    """Flags that would do nothing: those of another dataset, or --host beside --base-url."""
    given = {name for name in flags if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if "base_url" in given and given & {"host", "port"}:
        raise ConfigError("--base-url: takes the place of --host and --port; give one or the other")
    dataset = flags["dataset_name"].replace("-", "_")
    idle = {"disable_shuffle", "no_oversample"} if dataset == "random" else {"input_len"}
    for name in sorted(given):
        owner = next((prefix for prefix in PREFIXES if name.startswith(f"{prefix}_")), dataset)
        if owner != dataset or name in idle:
            raise ConfigError(
                f"--{name.replace('_', '-')}: not used with --dataset-name {flags['dataset_name']}; leave it out"
            )


def resolve_options(flags: dict[str, Any]) -> ServeOptions:
    """Resolve defaults that depend on other flags, and parse what click doesn't."""
    values = dict(flags)
    host, port, input_len, output_len = (values.pop(name) for name in ("host", "port", "input_len", "output_len"))
    values["dataset_name"] = dataset = values["dataset_name"].replace("_", "-")
    if input_len is not None:
        values["random_input_len"] = input_len
    if output_len is not None:
        values[f"{dataset.replace('-', '_')}_output_len"] = output_len
    if values["ignore_eos"] is None:
        values["ignore_eos"] = dataset == "random"
    host = f"[{host}]" if ":" in host else host
    values |= {
        "base_url": (values["base_url"] or f"http://{host}:{port}").rstrip("/"),
        "endpoint": "/" + (values["endpoint"] or ENDPOINTS[values["backend"]]).lstrip("/"),
        "request_id_prefix": values["request_id_prefix"] or f"bench-{uuid.uuid4().hex[:8]}-",
        "sampling": {name: value for name in SAMPLING if (value := values.pop(name)) is not None},
        "header": parse_pairs("--header", values["header"]),
        "metadata": parse_pairs("--metadata", values["metadata"]),
        "goodput": parse_goodput(values["goodput"]),
        "percentile_metrics": parse_metrics(values["percentile_metrics"]),
        "metric_percentiles": parse_percentiles(values["metric_percentiles"]),
        "extra_body": parse_extra_body(values["extra_body"]),
    }
    return ServeOptions(**values)
