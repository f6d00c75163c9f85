"""The log of served requests as a file, which placement.traces reads."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError
from core.served import Served
from placement.traces import served_lines

logger = logging.getLogger(__name__)

MOST_BYTES = 64 * 2**20


class TrafficLog:
    """Lines in `path`; once they are MOST_BYTES they become `path`.1, in place of what that held."""

    def __init__(self, path: Path, most_bytes: int = MOST_BYTES) -> None:
        """Raises ConfigError if nothing can be written there."""
        self._path = path
        self._most_bytes = most_bytes
        try:
            path.open("ab").close()
        except OSError as error:
            raise ConfigError(f"traffic_log: {path} can't be written: {error.strerror}", param="traffic_log") from error

    def append(self, served: Sequence[Served]) -> None:
        """What can't be written is told of and left out: serving goes on."""
        if not served:
            return
        try:
            if self._path.exists() and self._path.stat().st_size >= self._most_bytes:
                self._path.replace(self._path.with_name(f"{self._path.name}.1"))
            with self._path.open("ab") as file:
                file.write(served_lines(served))
        except OSError as error:
            logger.warning("%d requests are not in %s: %s", len(served), self._path, error.strerror)
