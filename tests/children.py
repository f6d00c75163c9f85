"""Processes that this one has started."""

from __future__ import annotations

import psutil


def children_with(part: str) -> list[psutil.Process]:
    """Those with it in their command line."""
    return [child for child in psutil.Process().children() if part in _command(child)]


def _command(process: psutil.Process) -> list[str]:
    """Empty once it has ended, as one of another test may just have."""
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []
