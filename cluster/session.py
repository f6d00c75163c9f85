"""The folder of a Ray cluster of our own, and what a launcher that was killed has left of an earlier one.

The launcher holds a lock on the folder's `owner` file while it lives. The kernel lets go of it with the process, so a
folder whose lock is free is nobody's, whatever has become of the process id.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

PREFIX = "slipstream-"
OWNER = "owner"
END_S = 5.0


@contextmanager
def session_folder(say: Callable[[str], None], root: Path | None = None) -> Iterator[Path]:
    """A new folder for Ray; removed at the end, once the processes that still write there have ended. What stale
    folders hold goes first. `say` is told what could not be removed."""
    root = root or Path(tempfile.gettempdir())
    for stale in root.glob(f"{PREFIX}*"):
        if _is_stale(stale):
            _remove(stale, 0.0, say)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=root))
    with _own(folder):
        try:
            yield folder
        finally:
            _remove(folder, END_S, say)


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """The owner file appears with its lock already held: nobody sees a folder that only looks stale."""
    unlocked = folder / f"{OWNER}.new"
    with unlocked.open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(f"{os.getpid()}\n")
        file.flush()
        unlocked.rename(folder / OWNER)
        yield


def _is_stale(folder: Path) -> bool:
    """Whether it is ours and its launcher has gone."""
    try:
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            return False
        with (folder / OWNER).open(encoding="ascii") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # no owner file, gone in between, or locked
        return False


def _remove(folder: Path, patience_s: float, say: Callable[[str], None]) -> None:
    """Wait for the processes of the folder, kill those that stay, and delete it."""
    _, alive = psutil.wait_procs(_processes(folder), timeout=patience_s)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=END_S)
    try:
        shutil.rmtree(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        say(f"could not remove {folder}: {error.strerror or error}; it can be deleted by hand")


def _processes(folder: Path) -> list[psutil.Process]:
    return [p for p in psutil.process_iter() if p.pid != os.getpid() and _runs_in(p, folder)]


def _runs_in(process: psutil.Process, folder: Path) -> bool:
    """Whether it is a process of the Ray cluster in the folder: one with a flag that names it, or one that Ray has
    renamed and that logs there."""
    inside = f"{folder}{os.sep}"
    try:
        if process.uids().real != os.getuid():
            return False
        command = process.cmdline()
        if command and command[0].startswith("ray::"):
            return any(file.path.startswith(inside) for file in process.open_files())
        return any(part.startswith("--") and f"={inside}" in part for part in command)
    except psutil.Error:  # gone, or not ours to look at
        return False
