"""Files that a command was asked to write."""

from __future__ import annotations

from pathlib import Path

from core.errors import ConfigError


def write_text(path: Path, text: str, flag: str) -> None:
    """In UTF-8, anew. Raises ConfigError, by the flag that named the file, if it can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--{flag}: {path} can't be written: {error.strerror}", param=flag) from error
