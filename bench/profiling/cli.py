"""The flags of `slipstream profile`. Loads torch only once they are understood."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import msgspec

from bench.flags import check_meant
from core.errors import ConfigError
from core.files import check_writable
from placement.profile import Profile, write_profile


@click.command("profile")
@click.argument("model", default="demo")
@click.option("--quick", is_flag=True, help="Fewer steps of smaller sizes, and fewer rounds of servers.")
@click.option("--roofline", help="Measure nothing: reckon it for a device of a table, such as H100.")
@click.option("--out", default="profile.json", type=click.Path(path_type=Path), show_default=True, help="Written anew.")
@click.option("--threads", type=click.IntRange(1), help="Cores of each rank. Default: all, shared out evenly.")
@click.option("--beside", default=0, type=click.IntRange(0), help="Workers on a CPU: how they slow each other down.")
@click.option("--serving", is_flag=True, help="And what a server adds: gateway, links, hand-off. CPU only.")
@click.option("--speculation", "drafter", help="And what this drafter takes and brings.")
@click.option("--draft-tokens", default=4, type=click.IntRange(1), show_default=True, help="That it may draft a step.")
@click.option("--speculation-rule", help="As for serve.")
@click.option("--speculation-controller", help="As for serve.")
@click.option("--speculation-memory", help="As for serve.")
@click.option("--speculation-weights", multiple=True, metavar="NAME=PATH", help="As for serve; one at a time.")
@click.option(
    "--dataset", type=click.Path(path_type=Path), help="Questions that it drafts for. Default: a few of our own."
)
@click.option("--tensor-parallel-size", default=1, type=click.IntRange(1, 64), show_default=True, help="As for serve.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="As for serve.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="As for serve.")
@click.option("--quantization", type=click.Choice(["int8", "fp8"]), help="As for serve.")
@click.option("--kv-cache-memory", help="As for serve: steps that need more are not measured.")
@click.option("--json", "as_json", is_flag=True, help="Print what is stored.")
@click.pass_context
def profile(
    ctx: click.Context, /, model: str, quick: bool, roofline: str | None, out: Path, as_json: bool, **flags: Any
) -> None:
    """Measure the steps of MODEL on this machine, fit the planner's latency model to them, and store both."""
    check_writable(out, "out")
    if roofline is not None:
        from cluster.model_size import roofline_of

        check_meant(ctx, ("quick", *(name for name in flags if name != "tensor_parallel_size")), "with --roofline")
        found = roofline_of(model, roofline, flags["tensor_parallel_size"])
    else:
        found = _measured(model, quick, **flags)
    write_profile(found, out)
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else found.table())
    if doubt := found.doubt():
        click.echo(f"warning: {doubt}", err=True)
    click.echo(f"stored as {out}", err=True)


def _measured(
    model: str,
    quick: bool,
    threads: int | None,
    beside: int,
    serving: bool,
    drafter: str | None,
    draft_tokens: int,
    dataset: Path | None,
    **given: Any,
) -> Profile:
    if drafter is None and dataset is not None:
        raise ConfigError("--dataset: it is what a drafter drafts for; give --speculation too", param="dataset")
    from cluster.config.loading import load
    from cluster.machine import usable_cores

    given |= {} if drafter is None else {"speculation": drafter, "speculation_budget": draft_tokens}
    config = load(None, {name: value for name, value in given.items() if value not in (None, ())})
    settings, speculation = config.engine, config.speculation.settings
    cores, processes = usable_cores(), settings.ranks * (1 + beside)
    if processes * (threads or 1) > cores:
        raise ConfigError(f"--threads: {processes} x {threads or 1} are more than the {cores} cores here; give fewer")
    threads = threads or cores // processes
    from bench.profiling.measure import Options, measure
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars

    with Bars() as progress:
        folder = resolve(model, progress=progress)
        if speculation is not None:
            speculation.check_weights(folder, settings.dtype)
        options = Options(model=model, folder=folder, engine=settings, threads=threads, quick=quick, beside=beside)
        options = replace(options, speculation=speculation, dataset=dataset)
        found = measure(options, progress)
        if not serving:
            return found
        if found.setting.device != "cpu":
            raise ConfigError("--serving: measured on a CPU only; leave it out")
        from bench.profiling.serving import measure_serving

        engine = settings.model_dump(exclude_unset=True)
        around = measure_serving(found, folder, engine, cores, options.rounds, progress)
        return msgspec.structs.replace(found, serving=around)
