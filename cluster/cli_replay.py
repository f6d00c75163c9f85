"""`slipstream plan replay`: what replanning would have done with a trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from cluster.sizes import parse_sizes
from core.files import check_writable, write_text
from core.finite import FiniteRange
from placement.forecast_names import NAMES

_path = click.Path(path_type=Path)
_positive = FiniteRange(min=0, min_open=True)


@click.command("replay")
@click.argument("trace", type=_path)
@click.option(
    "--profile",
    "profiles",
    type=_path,
    required=True,
    multiple=True,
    help="Of slipstream profile: a worker. With --shapes one for each TP.",
)
@click.option("--slo", required=True, help="Targets in ms, as ttft=200,tpot=50 or with e2e=9000.")
@click.option("--share", default=0.9, type=FiniteRange(0, 1, min_open=True, max_open=True), show_default=True)
@click.option("--workers", type=click.IntRange(1, 128), required=True, help="At the start.")
@click.option("--max-workers", type=click.IntRange(1, 128), help="That may be started. Default: their number stays.")
@click.option("--shapes", help="TP and PP that workers may change to, as 1x1,2x1; at the start the first.")
@click.option("--start", help="Their roles, as prefill=1,decode=1 or both=2. Default: best for the first requests.")
@click.option("--forecast", type=click.Choice(NAMES), default="constant", show_default=True)
@click.option("--season", type=_positive, help="Seconds after which traffic repeats itself: holt-winters, prophet.")
@click.option("--warm-start", type=_path, help="An earlier trace, for the forecast to begin with.")
@click.option("--rate", type=_positive, help="Requests/s, in the trace's rhythm. Default: the trace's.")
@click.option("--interval", default=5.0, type=FiniteRange(0.1, 3600), show_default=True, help="As for serve.")
@click.option("--horizon", default=120.0, type=_positive, show_default=True, help="As for serve.")
@click.option("--floor", default=1, type=click.IntRange(1, 128), show_default=True, help="As for serve.")
@click.option("--chunk-tokens", default="512,2048", show_default=True, callback=parse_sizes, help="Of a step, to try.")
@click.option("--pipeline-parallel-size", default=1, type=click.IntRange(1), show_default=True, help="As for serve.")
@click.option("--topology", "topology_file", type=_path, help="A YAML file. Default: this machine.")
@click.option("--max-num-seqs", default=64, type=click.IntRange(1, 4096), show_default=True, help="As for serve.")
@click.option("--kv-cache-memory", help="As for serve. Default: 1GiB on a CPU; what weights leave of a GPU.")
@click.option("--handoff-min-tokens", default=0, type=click.IntRange(0), show_default=True, help="As for serve.")
@click.option("--overhead-ms", default=0.0, type=FiniteRange(0), help="Of a request outside of the workers.")
@click.option("--speculation", "drafter", help="Workers draft, as the profile has it of this drafter.")
@click.option("--acceptance-length", type=FiniteRange(1), help="As for plan.")
@click.option("--draft-tokens", type=click.IntRange(1), help="As for plan.")
@click.option("--draft-ms", type=FiniteRange(0), help="As for plan.")
@click.option("--plot", type=_path, help="Draw attainment and roles over time: an SVG file.")
@click.option("--json/--table", "as_json", default=False, help="How it is printed. [default: table]")
def replay(plot: Path | None, as_json: bool, **flags: Any) -> None:
    """Show how replanning would have served TRACE, beside the same workers without it."""
    from cluster.replaying import Asked, replayed
    from placement.replay_shown import svg, table

    check_writable(plot, "plot")
    found = replayed(Asked(**flags))
    if plot is not None:
        write_text(plot, svg(found), "plot")
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else table(found))
