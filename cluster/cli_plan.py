"""`slipstream plan`: which layout serves a workload best, on devices that are here or only in a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from cluster.planning import searched
from cluster.sizes import parse_sizes
from core.files import check_writable, write_text
from core.finite import FiniteRange
from placement.plan_plot import svg
from placement.plan_table import table

_path = click.Path(path_type=Path)
_positive = FiniteRange(min=0, min_open=True)


class WithReplay(click.Command):
    """`plan replay …` is a command of its own; a folder of this name is a model as ./replay."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args[:1] != ["replay"]:
            return super().make_context(info_name, args, parent, **extra)
        from cluster.cli_replay import replay

        return replay.make_context(f"{info_name} replay", args[1:], parent, **extra)


@click.command(cls=WithReplay, epilog="slipstream plan replay TRACE: what replanning would have done with a trace.")
@click.argument("model", default="demo")
@click.option("--slo", required=True, help="Targets in ms, as ttft=200,tpot=50, or ttft=200@p95,tpot=50@p90,e2e=9000.")
@click.option(
    "--share",
    type=FiniteRange(0, 1, min_open=True, max_open=True),
    help="Of requests that are to meet all targets without a percentile. [default: 0.9]",
)
@click.option("--profile", "profiles", type=_path, multiple=True, help="Of slipstream profile; one for each shape.")
@click.option("--device", "kind", help="Instead of profile and topology: nodes of such devices, by a table.")
@click.option("--topology", "topology_file", type=_path, help="A YAML file. Default: this machine.")
@click.option("--ray-address", help="Plan for the nodes of a running Ray cluster, with links as they are sold.")
@click.option("--devices", type=click.IntRange(1), help="No more than so many.")
@click.option("--trace", type=_path, help="Requests: a .csv as Azure's, or a .jsonl as Mooncake's or our log.")
@click.option("--lengths", help="Instead of a trace: mean tokens, as prompt=512,output=128,cv=0.8,cached=0.5.")
@click.option(
    "--burstiness", type=FiniteRange(1e-4, 1e4), help="Of these: the shape of gamma gaps. Default: 1, Poisson."
)
@click.option("--rate", type=_positive, help="Requests/s to serve as cheaply as can be. Default: the most per device.")
@click.option("--objective", default="per-device", type=click.Choice(["per-device", "per-dollar", "total"]))
@click.option("--chunk-tokens", default="512,2048", show_default=True, callback=parse_sizes, help="Of a step, to try.")
@click.option("--pipeline-parallel-size", default="1", show_default=True, callback=parse_sizes, help="To try.")
@click.option("--max-num-seqs", default=64, type=click.IntRange(1, 4096), show_default=True, help="As for serve.")
@click.option("--kv-cache-memory", help="As for serve. Default: 1GiB on a CPU; what weights leave of a GPU.")
@click.option("--handoff-min-tokens", default=0, type=click.IntRange(0), show_default=True, help="As for serve.")
@click.option("--overhead-ms", default=0.0, type=FiniteRange(0), help="Of a request outside of the workers.")
@click.option("--speculation", "drafter", help="Try layouts with this drafter too.")
@click.option("--acceptance-length", type=FiniteRange(1), help="Tokens of a step with drafts, on average.")
@click.option("--draft-tokens", type=click.IntRange(1), help="With it: drafts that a step verifies. Default: 4.")
@click.option("--draft-ms", type=FiniteRange(0), help="With it: of a step's drafting. Default: 0.")
@click.option("--learner-devices", help="Kept free for the learner: 2, where there are as many, or of a kind, L4=2.")
@click.option(
    "--out",
    type=_path,
    help="Write the configuration for slipstream serve --config, or for Kubernetes what the name says: "
    "…rayservice.yaml, or …values.yaml for the Helm chart.",
)
@click.option("--plot", type=_path, help="Draw the ranking and the Pareto front: an SVG file.")
@click.option("--json/--table", "as_json", default=False, help="How it is printed. [default: table]")
def plan(out: Path | None, plot: Path | None, as_json: bool, **flags: Any) -> None:
    """Find the layout that serves MODEL best within its targets, and say what it will reach."""
    check_writable(out, "out")
    check_writable(plot, "plot")
    found = searched(**flags)
    able = found.settle()
    if out is not None:
        from cluster.deployable import write_deployable

        write_deployable(found, able, out)
    if plot is not None:
        write_text(plot, svg(found.made.plan), "plot")
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(found.made.plan)).decode())
    else:
        click.echo(table(found.made.plan))
