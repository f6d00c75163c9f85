"""The `slipstream` command. Subcommands are imported when they are called: `--help` must not load torch or Ray."""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click

from cluster.config import load, overlaid
from cluster.one_line import one_line
from cluster.options import ListOptions, config_options
from core.errors import ConfigError

LAZY = {
    "bench": ("bench.cli", "bench", "Measure a server."),
    "drafts": ("cluster.cli_drafts", "drafts", "Make and train what drafts tokens."),
    "models": ("cluster.cli_models", "models", "Fetch and list models."),
    "plan": ("cluster.cli_plan", "plan", "Find the layout that serves a model best."),
    "profile": ("bench.profiling.cli", "profile", "Measure a model's steps for the planner."),
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
@config_options
def serve(model: str | None, config_file: Path | None, plan_file: Path | None, **flags: Any) -> None:
    """Serve MODEL: a Hugging Face id, a folder, a .gguf file, or demo."""
    given = {name: value for name, value in flags.items() if value is not None}
    if model is not None:
        given["model"] = model
    if plan_file is None:
        config = load(config_file, given)
    elif config_file is not None:
        raise ConfigError("--plan: it is a configuration too; give it, or --config", param="plan")
    else:
        from cluster.planned import planned_tree

        config = overlaid(planned_tree(plan_file), given, plan_file)
    from rich.console import Console

    from cluster.launcher import serve as run

    sys.exit(run(config, Console()))


def main() -> None:
    """Entry point. An error of ours is one line on standard error and exit status 2."""
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # gRPC prints every connection that closes
    with one_line():
        cli()
