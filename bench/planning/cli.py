"""The flags of `slipstream bench plan`: those of `slipstream plan` that say what is planned, and what to run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from bench.flags import BadFlag
from cluster.cli_plan import plan as plan_command
from core.errors import ConfigError, Unavailable

_ELSEWHERE = ("kind", "topology_file", "ray_address", "out", "plot", "as_json")
"""Of `slipstream plan`, what is for layouts that are not run here, and how it is printed."""


@click.command("plan")
@click.option("--layout", "names", multiple=True, help="Run it, by its name. Default: the best, and the next three.")
@click.option("--rates", help="Requests/s, as 0.5,1,2. Default: 30, 60 and 85 % of the best layout's goodput.")
@click.option("--requests", default=60, type=click.IntRange(2), show_default=True, help="Of each run.")
@click.option(
    "--rounds", default=3, type=click.IntRange(1), show_default=True, help="In which these come, rates by turns."
)
@click.option(
    "--dataset",
    type=click.Path(path_type=Path),
    help="Questions in which prompts end. Default: random tokens; with --speculation a few questions of our own.",
)
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def plan(
    names: tuple[str, ...],
    rates: str | None,
    requests: int,
    rounds: int,
    dataset: Path | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Serve layouts of a plan on this machine, and set what they do beside what is predicted."""
    try:
        from bench.planning.report import table
        from bench.planning.session import compare
        from engine.checkpoints.bars import Bars

        with Bars() as progress:
            found = compare(names, rates, requests, rounds, dataset, progress, **flags)
    except ConfigError as error:
        raise BadFlag(error.message) from error
    except Unavailable as error:
        raise click.ClickException(error.message) from error
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else table(found))


plan.params[:0] = [flag for flag in plan_command.params if flag.name not in _ELSEWHERE]
