"""Lists of sizes on a command line."""

from __future__ import annotations

import click

from core.errors import ConfigError


def parse_sizes(_: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    sizes = [part.strip() for part in text.split(",")]
    if not all(size.isdecimal() and 1 <= int(size) <= 2**20 for size in sizes):
        raise ConfigError(f"--{(option.name or '').replace('_', '-')}: {text!r} is not a list of sizes, such as 1,2,4")
    return tuple(dict.fromkeys(int(size) for size in sizes))
