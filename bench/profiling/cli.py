"""The flags of `slipstream profile`. Loads torch only once they are understood."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import msgspec

from core.errors import ConfigError


@click.command("profile")
@click.argument("model", default="demo")
@click.option("--quick", is_flag=True, help="Fewer steps of smaller sizes, some seconds for a small model.")
@click.option("--out", default="profile.json", type=click.Path(path_type=Path), show_default=True, help="Written anew.")
@click.option("--threads", type=click.IntRange(1), help="Cores of each rank. Default: all, shared out evenly.")
@click.option("--tensor-parallel-size", default=1, type=click.IntRange(1, 64), show_default=True, help="As for serve.")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float16", "float32"]), help="As for serve.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), help="As for serve.")
@click.option("--quantization", type=click.Choice(["int8", "fp8"]), help="As for serve.")
@click.option("--kv-cache-memory", help="As for serve: steps that need more are not measured.")
@click.option("--json", "as_json", is_flag=True, help="Print what is stored.")
def profile(model: str, quick: bool, out: Path, threads: int | None, as_json: bool, **engine: Any) -> None:
    """Measure the steps of MODEL on this machine, fit the planner's latency model to them, and store both."""
    from cluster.config import load
    from cluster.machine import usable_cores
    from placement.profile import write_profile

    settings = load(None, {name: value for name, value in engine.items() if value is not None}).engine
    cores = usable_cores()
    if threads is None:
        threads = max(1, cores // settings.ranks)
    elif threads * settings.ranks > cores:
        raise ConfigError(f"--threads: {settings.ranks} x {threads} are more than the {cores} cores here; give fewer")
    from bench.profiling.measure import Options, measure
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars

    with Bars() as progress:
        folder = resolve(model, progress=progress)
        options = Options(model=model, folder=folder, engine=settings, threads=threads, quick=quick)
        found = measure(options, progress)
    write_profile(found, out)
    click.echo(msgspec.json.format(msgspec.json.encode(found)).decode() if as_json else found.table())
    click.echo(f"stored as {out}", err=True)
