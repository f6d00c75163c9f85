"""C++ of ours, compiled once for a machine into the user's cache and kept by what it was made from."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

_COMPILE_TIMEOUT_S = 600.0

logger = logging.getLogger(__name__)


def cache_root() -> Path:
    """$SLIPSTREAM_CACHE, else $XDG_CACHE_HOME/slipstream, else ~/.cache/slipstream."""
    if named := os.environ.get("SLIPSTREAM_CACHE"):
        return Path(named).expanduser().absolute()
    return (Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "slipstream").expanduser().absolute()


def compiler() -> str:
    """$CXX, else c++."""
    return os.environ.get("CXX", "c++")


def library_path(name: str, sources: Path, made_with: str) -> Path:
    """Where the library `name` of the files in the folder `sources` is, or would be. `made_with` is what else the
    result depends on: flags, versions of what it is linked to."""
    digest = hashlib.blake2b(f"{compiler()} {made_with}".encode(), digest_size=8)
    for source in sorted(sources.iterdir()):
        digest.update(source.read_bytes())
    return cache_root() / "native" / f"{name}-{digest.hexdigest()}.so"


def load(name: str, sources: Path, flags: Sequence[str]) -> ctypes.CDLL | None:
    """The library `name` of the .cpp files in `sources`, compiled first if this machine has not done so yet; None, and
    the reason in the log, if it can't be had."""
    path = library_path(name, sources, str(tuple(flags)))
    reason = None if path.exists() else why_no_compiler()
    units = [str(source) for source in sorted(sources.glob("*.cpp"))]
    if (reason := reason or compile_once(path, [*flags, *units])) is not None:
        logger.warning("no native %s, Python's are slower: %s", name, reason)
        return None
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        logger.warning("no native %s: %s can't be loaded (%s); remove it", name, path, error)
        return None


def why_no_compiler() -> str | None:
    """What to do so that C++ can be compiled here, or None if it can be."""
    if shutil.which(compiler()) is None:
        return f"there is no C++ compiler {compiler()}; install g++, or set CXX"
    return None


def compile_once(path: Path, arguments: Sequence[str]) -> str | None:
    """Make `path` by `compiler arguments -o path` unless it is there; the reason if that fails. Processes that want it
    at the same time wait for one."""
    if path.exists():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return None if path.exists() else _compile(path, arguments)
    except OSError as error:
        return f"{path.parent} can't be written: {error.strerror}; set SLIPSTREAM_CACHE to a folder"


def _compile(path: Path, arguments: Sequence[str]) -> str | None:
    """Write beside `path` and rename: a killed compiler leaves nothing that would be loaded."""
    unfinished = path.with_suffix(".tmp")
    command = [compiler(), *arguments, "-o", str(unfinished)]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"{compiler()} took more than {_COMPILE_TIMEOUT_S:g} s"
    except OSError as error:
        return f"{compiler()} can't be run: {error.strerror}"
    if made.returncode != 0:
        errors = [line for line in made.stderr.splitlines() if "error" in line.lower()]
        return f"{compiler()} failed: {(errors or ['no reason given'])[0]}"
    unfinished.replace(path)
    return None
