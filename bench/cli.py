"""The click group behind `slipstream bench`."""

from __future__ import annotations

import click

from bench.cost import cost
from bench.engine_speed.cli import engine
from bench.exactness import exactness
from bench.gpu_speed.cli import gpu
from bench.planning.cli import plan
from bench.replanning.cli import replan
from bench.serving.cli import serve
from bench.soak.cli import soak_command
from bench.speculation.cli import speculation
from bench.transfer.cli import transfer


@click.group()
def bench() -> None:
    """Measure or soak a server, measure an engine or parts of it, or compare output with what was expected."""


for command in (serve, engine, gpu, soak_command, speculation, plan, replan, transfer, cost, exactness):
    bench.add_command(command)
