"""The command line, as a test runs it."""

from __future__ import annotations

from click.testing import CliRunner

from cluster.cli import cli


def output_of(*arguments: object) -> str:
    """What the command prints. Raises what it raises."""
    result = CliRunner().invoke(cli, [*map(str, arguments)])
    if result.exception is not None:
        raise result.exception
    return result.stdout
