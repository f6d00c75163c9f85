"""The flags of `slipstream bench replan`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from bench.flags import BadFlag, check_plot
from core.errors import ConfigError
from core.files import write_text
from core.finite import FiniteRange
from placement.forecast_names import NAMES

_path = click.Path(path_type=Path)
_seconds = FiniteRange(min=1)


def _rates(_: click.Context, __: click.Parameter, text: str | None) -> tuple[float, float] | None:
    """ "2,5" -> (2.0, 5.0)."""
    if text is None:
        return None
    try:
        before, after = (float(part) for part in text.split(","))
    except ValueError as error:
        raise BadFlag(f"--rates: {text!r} is not a rate before and one after the shift, such as 2,5") from error
    if not (0 < before < float("inf") and 0 < after < float("inf")):
        raise BadFlag(f"--rates: {text}: both are above 0")
    return before, after


@click.command()
@click.argument("model", default="demo")
@click.option("--profile", type=_path, required=True, help="Of slipstream profile --beside 1.")
@click.option("--slo", required=True, help="Targets in ms, as ttft=1500,tpot=30.")
@click.option("--share", default=0.9, type=FiniteRange(0, 1, min_open=True, max_open=True), show_default=True)
@click.option("--workers", default=2, type=click.IntRange(2, 64), show_default=True)
@click.option("--max-workers", type=click.IntRange(2, 64), help="As --replan-max-workers of serve.")
@click.option("--shapes", help="TP x PP that workers may change to, as 1x1,2x1; they begin with the first.")
@click.option("--further-profile", "further", type=_path, multiple=True, help="Of workers of each other TP of these.")
@click.option("--before", default="prompt=300,output=30,cv=0.3", show_default=True, help="Lengths before the shift.")
@click.option("--after", default="prompt=40,output=100,cv=0.3", show_default=True, help="Lengths after it.")
@click.option("--rates", callback=_rates, help="Requests/s before and after, as 2,5. Default: for which it matters.")
@click.option("--before-s", default=40.0, type=_seconds, show_default=True, help="Seconds before the shift.")
@click.option("--after-s", default=80.0, type=_seconds, show_default=True, help="Seconds after it.")
@click.option("--interval", default=1.0, type=FiniteRange(0.1, 60), show_default=True, help="As for serve.")
@click.option("--forecast", default="constant", type=click.Choice(NAMES), show_default=True, help="As for serve.")
@click.option("--repeats", default=1, type=click.IntRange(1, 100), show_default=True, help="Of both runs, in turn.")
@click.option("--seed", default=0, show_default=True)
@click.option("--plot", type=_path, help="Draw attainment over time into this file, as SVG.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def replan(plot: Path | None, as_json: bool, **flags: Any) -> None:
    """Change traffic at once, from long prompts to long outputs, with replanning and without."""
    try:
        check_plot(plot)
        from bench.replanning.plot import svg
        from bench.replanning.report import table
        from bench.replanning.session import Asked, run
        from engine.checkpoints.bars import Bars

        with Bars() as progress:
            report = run(Asked(**flags), progress)
        if plot is not None:
            write_text(plot, svg(report), "plot")
    except ConfigError as error:
        raise BadFlag(error.message) from error
    click.echo(msgspec.json.format(msgspec.json.encode(report)).decode() if as_json else table(report))
