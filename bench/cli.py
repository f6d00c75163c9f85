"""The click group behind `slipstream bench`."""

from __future__ import annotations

import click

from bench.serving.cli import serve


@click.group()
def bench() -> None:
    """Measure a running server."""


bench.add_command(serve)
