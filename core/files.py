"""Files that a command was asked to write."""

from __future__ import annotations

import os
from pathlib import Path

from core.errors import ConfigError


def check_writable(path: Path | None, flag: str) -> None:
    """Before that is worked for which is to be written there, if anything is. Raises ConfigError, by the flag that
    named the file."""
    if path is None:
        return
    if not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    elif path.is_dir():
        why = "it is a folder"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "permission denied"
    else:
        return
    raise ConfigError(f"--{flag}: {path} can't be written: {why}", param=flag)


def write_text(path: Path, text: str, flag: str) -> None:
    """In UTF-8, anew. Raises ConfigError, by the flag that named the file, if it can't be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--{flag}: {path} can't be written: {error.strerror}", param=flag) from error
