"""The folder where models that Slipstream fetched or converted wait to be served.

    <root>/models/<key>/            a ready folder: Hugging Face files and `slipstream.json`, which lists them
    <root>/models/.<key>.lock       held (flock) by the process that prepares <key>
    <root>/models/.<key>.tmp-*/     what that process has written so far
    <root>/downloads/               archives that a conversion still needs
    <root>/hub/                     Hugging Face downloads, when a folder was named; else Hugging Face's own cache

A folder is ready or absent: it is written beside its place, synced, and renamed into it. A killed process leaves only a
`.tmp-` folder, which the next holder of the lock removes.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.compiler import cache_root
from core.errors import ModelError
from engine.checkpoints.progress import Progress

FORMAT = 1
"""Raised when a conversion writes something else, so that folders of an older kind are made again."""

MANIFEST = "slipstream.json"
_ELSEWHERE = "set SLIPSTREAM_CACHE (or --cache-dir) to a folder"


@dataclass(frozen=True)
class Cached:
    """A model at hand. `name` is what `slipstream serve` takes; `size` is in bytes."""

    name: str
    path: Path
    size: int


class Cache:
    """`root` None: $SLIPSTREAM_CACHE, else $XDG_CACHE_HOME/slipstream, else ~/.cache/slipstream."""

    def __init__(self, root: Path | None = None) -> None:
        named = root or os.environ.get("SLIPSTREAM_CACHE")
        self.root = root.expanduser().absolute() if root else cache_root()
        self.models = self.root / "models"
        self.downloads = self.root / "downloads"
        self.hub = self.root / "hub" if named else None

    def ready(self, key: str) -> Path | None:
        """The folder of `key` if every file its manifest lists is there with the size it had."""
        folder = self.models / key
        manifest = _manifest(folder)
        if manifest is None or manifest.get("format") != FORMAT:
            return None
        files = manifest["files"].items()
        with disk_errors("reading the cache", self.root):
            whole = all((file := folder / name).is_file() and file.stat().st_size == size for name, size in files)
        return folder if whole else None

    @contextmanager
    def exclusive(self, key: str, progress: Progress) -> Iterator[None]:
        """Wait until no other process prepares `key`, and clear what dead ones left of it."""
        with disk_errors("preparing the cache", self.root):
            self.models.mkdir(parents=True, exist_ok=True)
            self.downloads.mkdir(exist_ok=True)
            lock = (self.models / f".{key}.lock").open("a")
        with lock:
            with disk_errors("locking the cache", self.root):
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    progress.begin(f"{key}: waiting for another process that prepares it")
                    fcntl.flock(lock, fcntl.LOCK_EX)
                for stale in self.models.glob(f".{key}.tmp-*"):
                    shutil.rmtree(stale, ignore_errors=True)
            yield

    @contextmanager
    def workspace(self, key: str) -> Iterator[Path]:
        """A scratch folder on the disk of the cache, gone afterwards. The caller holds `exclusive(key)`."""
        with disk_errors("writing the model", self.root):
            work = Path(tempfile.mkdtemp(prefix=f".{key}.tmp-", dir=self.models))
        try:
            yield work
        finally:
            shutil.rmtree(work, ignore_errors=True)

    def publish(self, made: Path, key: str, *, name: str, source: str) -> Path:
        """Move the finished folder `made`, which lies in a workspace of `key`, into its place."""
        target = self.models / key
        with disk_errors("writing the model", self.root):
            files = {file.name: file.stat().st_size for file in sorted(made.iterdir())}
            manifest = {"format": FORMAT, "name": name, "source": source, "files": files}
            (made / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
            for file in made.iterdir():
                file.chmod((made / MANIFEST).stat().st_mode)  # safetensors makes its files private to one user
                _sync(file)
            _sync(made)
            if target.exists():
                target.rename(made.parent / "replaced")
            made.rename(target)
            _sync(self.models)
        return target

    def converted(self) -> list[Cached]:
        """The ready folders of this cache, by name."""
        found = []
        for folder in sorted(self.models.glob("[!.]*")):
            manifest = _manifest(folder)
            if manifest is not None and self.ready(folder.name):
                size = sum(manifest["files"].values())
                found.append(Cached(manifest["name"], folder, size))
        return found

    def remove(self, entry: Cached, progress: Progress) -> None:
        """Delete a converted model; a server that has it open keeps what it has mapped."""
        key = entry.path.name
        with self.exclusive(key, progress), self.workspace(key) as work, disk_errors("removing the model", self.root):
            entry.path.rename(work / "removed")


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise ModelError unless the disk of `folder` has `needed` bytes free."""
    home = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(home).free
    if free < needed:
        raise ModelError(
            f"not enough disk space in {folder}: {purpose} needs {size_text(needed)} and {size_text(free)} is free; "
            f"free some space, or {_ELSEWHERE} on a larger disk"
        )


@contextmanager
def disk_errors(doing: str, folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into a ModelError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ModelError(disk_error_text(error, doing, folder)) from error


def disk_error_text(error: OSError, doing: str, folder: Path) -> str:
    """One line for an OSError met while `doing` something in `folder`."""
    place = error.filename or folder
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {folder} is full: free some space, or {_ELSEWHERE} on a larger disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"can't write to {place} ({error.strerror}): make {folder} writable, or {_ELSEWHERE} that is"
    if error.errno in (errno.EEXIST, errno.ENOTDIR):
        return f"{place} is in the way ({error.strerror}): move it, or {_ELSEWHERE} of its own"
    return f"{doing} failed at {place}: {error.strerror or error}; check the disk, or {_ELSEWHERE} on another one"


def size_text(size: int) -> str:
    """Bytes the way disks are sold: 92_871_040 is "93 MB"."""
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= scale:
            return f"{size / scale:.{0 if size >= 10 * scale else 1}f} {unit}"
    return f"{size} bytes"


def _manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) else None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
