"""Compiles and loads the kernels. The shared object is kept by what it was made from: sources, flags, PyTorch."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import torch

from engine.checkpoints.cache import Cache

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = (
    *("-O3", "-std=c++20", "-shared", "-fPIC", "-fopenmp"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma"),
)
_COMPILE_TIMEOUT_S = 600.0

logger = logging.getLogger(__name__)


@cache
def load() -> bool:
    """Make torch.ops.slipstream callable, compiling it first if this machine has not done so yet (about 15 s). False,
    and the reason in the log, where the kernels can't be had; asked once per process."""
    if (reason := _why_not() or _make()) is not None:
        logger.warning("no native kernels, PyTorch's are slower: %s", reason)
        return False
    try:
        torch.ops.load_library(str(library_path()))  # type: ignore[no-untyped-call]
    except OSError as error:
        logger.warning("no native kernels: %s can't be loaded (%s); remove it", library_path(), error)
        return False
    return True


def library_path() -> Path:
    """Where the compiled kernels are, or would be."""
    digest = hashlib.blake2b(f"{torch.__version__} {_compiler()} {_FLAGS}".encode(), digest_size=8)
    for source in sorted(_SOURCES.iterdir()):
        digest.update(source.read_bytes())
    return Cache().root / "native" / f"slipstream-{digest.hexdigest()}.so"


def _compiler() -> str:
    return os.environ.get("CXX", "c++")


def _why_not() -> str | None:
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX512-BF16"
    if not library_path().exists() and shutil.which(_compiler()) is None:
        return f"there is no C++ compiler {_compiler()}; install g++, or set CXX"
    return None


def _make() -> str | None:
    """Compile unless it was done; the reason if that fails. Processes that want it at the same time wait for one."""
    path = library_path()
    if path.exists():
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with (path.parent / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return None if path.exists() else _compile(path)
    except OSError as error:
        return f"{path.parent} can't be written: {error.strerror}; set SLIPSTREAM_CACHE to a folder"


def _compile(path: Path) -> str | None:
    """Write beside `path` and rename: a killed compiler leaves nothing that would be loaded."""
    root, unfinished = Path(torch.__file__).parent, path.with_suffix(".tmp")
    include = [f"-isystem{root / 'include' / folder}" for folder in ("", "torch/csrc/api/include")]
    link = [f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{root / 'lib'}"]
    command = [_compiler(), *_FLAGS, *include, str(_SOURCES / "ops.cpp"), "-o", str(unfinished), *link]
    try:
        made = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S, check=False)  # noqa: S603
    except subprocess.TimeoutExpired:
        return f"{_compiler()} took more than {_COMPILE_TIMEOUT_S:g} s"
    except OSError as error:
        return f"{_compiler()} can't be run: {error.strerror}"
    if made.returncode != 0:
        errors = [line for line in made.stderr.splitlines() if "error" in line.lower()]
        return f"{_compiler()} failed: {(errors or ['no reason given'])[0]}"
    unfinished.replace(path)
    return None
