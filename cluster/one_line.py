"""An error of ours, as a command shows it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import click

from core.errors import SlipstreamError


@contextmanager
def one_line() -> Iterator[None]:
    """One line on standard error, and exit status 2."""
    try:
        yield
    except SlipstreamError as error:
        click.echo(f"error: {error.message}", err=True)
        sys.exit(2)
