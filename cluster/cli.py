"""The `slipstream` command. Subcommands are imported when they are called: `--help` must not load torch or Ray."""

from __future__ import annotations

import importlib
import os
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from cluster.config.loading import load, said_of_plan
from cluster.one_line import one_line
from cluster.options import ListOptions, config_options
from core.errors import ConfigError
from core.finite import FiniteRange

LAZY = {
    "bench": ("bench.cli", "bench", "Measure a server."),
    "drafts": ("cluster.cli_drafts", "drafts", "Make and train what drafts tokens."),
    "models": ("cluster.cli_models", "models", "Fetch and list models."),
    "plan": ("cluster.cli_plan", "plan", "Find the layout that serves a model best."),
    "profile": ("bench.profiling.cli", "profile", "Measure a model's steps for the planner."),
    "topology": ("cluster.cli_topology", "topology", "Describe devices and links for the planner."),
    "simulate": ("placement.cli", "simulate", "Predict how a layout serves a workload."),
}


class LazyGroup(click.Group):
    """Knows its subcommands by name and imports them on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *LAZY])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in LAZY:
            return super().get_command(ctx, cmd_name)
        module, attribute, _ = LAZY[cmd_name]
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows = [(name, text) for name, (_, _, text) in LAZY.items()]
        rows += [(name, command.get_short_help_str()) for name, command in self.commands.items()]
        with formatter.section("Commands"):
            formatter.write_dl(sorted(rows))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("slipstream"), prog_name="slipstream")
def cli() -> None:
    """Serve language models with prefill and decode on separate device groups."""


@cli.command(cls=ListOptions)
@click.argument("model", required=False)
@click.option("--config", "config_file", type=click.Path(path_type=Path), help="A YAML file with the same settings.")
@click.option("--plan", "plan_file", type=click.Path(path_type=Path), help="What slipstream plan --json printed.")
@click.option("--slo", help="Plan by targets in ms, as ttft=200,tpot=50: profile, choose a layout, and serve it.")
@click.option("--trace", type=click.Path(path_type=Path), help="With --slo: the requests to plan for, as for plan.")
@click.option("--lengths", help="With --slo, instead of a trace: mean tokens, as prompt=512,output=128,cv=0.8.")
@click.option("--rate", type=FiniteRange(0, min_open=True), help="With --slo: requests/s. Default: the most.")
@click.option("--dataset", type=click.Path(path_type=Path), help="With --slo: questions to measure drafts with.")
@config_options
def serve(
    model: str | None,
    config_file: Path | None,
    plan_file: Path | None,
    slo: str | None,
    trace: Path | None,
    lengths: str | None,
    rate: float | None,
    dataset: Path | None,
    **flags: Any,
) -> None:
    """Serve MODEL: a Hugging Face id, a folder, a .gguf file, or demo."""
    from rich.console import Console

    given = {name: value for name, value in flags.items() if value is not None}
    console = Console()
    if model is not None:
        given["model"] = model
    for name, value in {"trace": trace, "lengths": lengths, "rate": rate, "dataset": dataset}.items():
        if slo is None and value is not None:
            raise ConfigError(f"--{name} has no meaning without --slo; give targets, or leave it out", param=name)
    if plan_file is not None and (config_file is not None or slo is not None):
        raise ConfigError("--plan: it is a configuration too; give it, or --config, or --slo", param="plan")
    say = partial(console.print, highlight=False, soft_wrap=True, markup=False)
    if slo is not None:
        from cluster.by_targets import Asked, config_for

        config = config_for(Asked(slo, trace, lengths, rate, dataset), config_file, given, say)
    elif plan_file is not None:
        from cluster.planned import planned_tree

        tree = planned_tree(plan_file, replanning=given.get("replan", "off") != "off")
        config = said_of_plan(tree, given, plan_file, say)
    else:
        config = load(config_file, given)
    from cluster.launcher import serve as run

    sys.exit(run(config, console))


def main() -> None:
    """Entry point. An error of ours is one line on standard error and exit status 2."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # Ray's prints every connection that closes
    with one_line():
        cli()
