"""The click group behind `slipstream bench`."""

from __future__ import annotations

import click

from bench.cost import cost
from bench.exactness import exactness
from bench.serving.cli import serve


@click.group()
def bench() -> None:
    """Measure a server, or compare output with Transformers'."""


for command in (serve, cost, exactness):
    bench.add_command(command)
