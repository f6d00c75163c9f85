"""The click group behind `slipstream bench`."""

from __future__ import annotations

import click

from bench.cost import cost
from bench.engine_speed.cli import engine
from bench.exactness import exactness
from bench.serving.cli import serve


@click.group()
def bench() -> None:
    """Measure a server or an engine, or compare output with Transformers'."""


for command in (serve, engine, cost, exactness):
    bench.add_command(command)
