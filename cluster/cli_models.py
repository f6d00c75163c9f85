"""`slipstream models`: fetch models ahead of serving them, and see and delete what was fetched.

Exit status: 0, or 2 with one `error: …` line on standard error; 130 after Ctrl-C.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cluster.one_line import one_line
from core.errors import ModelError

if TYPE_CHECKING:
    from engine.checkpoints.cache import Cached

_cache_dir = click.option(
    "--cache-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where models are kept. Default: $SLIPSTREAM_CACHE, or ~/.cache/slipstream and Hugging Face's own cache.",
)


@click.group()
def models() -> None:
    """Fetch, list and remove models."""


@models.command()
@click.argument("model")
@click.option("--revision", help="Branch, tag or commit of a Hugging Face model.")
@_cache_dir
def pull(model: str, revision: str | None, cache_dir: Path | None) -> None:
    """Get MODEL ready to serve and print its folder.

    MODEL is `demo`, a Hugging Face id, a folder, or a .gguf file.
    """
    from engine.checkpoints import resolve
    from engine.checkpoints.bars import Bars
    from engine.model_config import ModelConfig

    with _one_line(), Bars() as progress:
        folder = resolve(
            model, revision=revision, cache_dir=cache_dir, progress=progress, check_config=ModelConfig.from_dict
        )
    click.echo(folder)


@models.command("list")
@_cache_dir
def list_models(cache_dir: Path | None) -> None:
    """Show the models at hand: name, size and folder."""
    from engine.checkpoints.cache import size_text

    with _one_line():
        entries = [*_converted(cache_dir), *_downloaded(cache_dir)]
    width = max((len(entry.name) for entry in entries), default=0)
    for entry in entries:
        click.echo(f"{entry.name:<{width}}  {size_text(entry.size):>9}  {entry.path}")
    if not entries:
        click.echo("no models yet: run `slipstream models pull demo`", err=True)


@models.command()
@click.argument("name")
@_cache_dir
def rm(name: str, cache_dir: Path | None) -> None:
    """Delete the model NAME, as `list` shows it, from this machine's caches."""
    from engine.checkpoints import Silent
    from engine.checkpoints.cache import Cache, size_text

    with _one_line():
        cache = Cache(cache_dir)
        if entry := _find(name, _converted(cache_dir)):
            cache.remove(entry, Silent())
        elif entry := _find(name, _downloaded(cache_dir)):
            from engine.checkpoints import hub

            hub.remove(entry, cache.hub)
        else:
            raise ModelError(f"no model {name!r} in the cache: see `slipstream models list`")
    click.echo(f"removed {entry.name} ({size_text(entry.size)})")


def _converted(cache_dir: Path | None) -> list[Cached]:
    from engine.checkpoints.cache import Cache

    return Cache(cache_dir).converted()


def _downloaded(cache_dir: Path | None) -> list[Cached]:
    from engine.checkpoints.cache import Cache
    from engine.checkpoints.hub import cached_models

    return cached_models(Cache(cache_dir).hub)


def _find(name: str, entries: list[Cached]) -> Cached | None:
    return next((entry for entry in entries if name in (entry.name, entry.path.name)), None)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        with one_line():
            yield
    except KeyboardInterrupt:
        click.echo("error: interrupted; run the same command again to continue", err=True)
        sys.exit(130)
