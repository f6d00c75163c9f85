"""What the commands of `slipstream bench` do with flags that cannot be."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from core.errors import ConfigError


class BadFlag(click.ClickException):
    """Shown as one line on stderr."""

    exit_code = 2


def check_meant(ctx: click.Context, unused: Iterable[str], why: str) -> None:
    """Raise ConfigError for a parameter that was given and has no meaning, `why`: "with --quality"."""
    for name in unused:
        if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE:
            raise ConfigError(f"--{name.replace('_', '-')} has no meaning {why}")


def check_plot(plot: Path | None) -> None:
    """Before anything is measured. Raises ConfigError."""
    if plot is not None and (plot.suffix != ".svg" or not plot.parent.is_dir()):
        raise ConfigError(f"--plot: {plot} is no .svg file in a folder that there is; name another")
