"""GGUF files, dequantized once and kept in the cache; the work itself is in gguf_to_hf.py, in another process."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import xxhash

from core.errors import ModelError
from engine.checkpoints.cache import Cache, disk_errors, require_space, size_text
from engine.checkpoints.folder import CheckConfig
from engine.checkpoints.progress import Progress

_SIDE_FILES = 50_000_000  # room for a tokenizer and configuration beside the weights
_ENDS = 1 << 20


@dataclass(frozen=True)
class Conversion:
    """What to convert, and the words for it. `prompt`: what the chat template must write, where that is known."""

    gguf: Path
    label: str
    prompt: str | None = None


def convert_file(gguf: Path, cache: Cache, progress: Progress, check_config: CheckConfig | None) -> Path:
    """The ready folder of a .gguf file on disk; raises ModelError."""
    key = _key(gguf)
    if folder := cache.ready(key):
        return folder
    with cache.exclusive(key, progress):
        if folder := cache.ready(key):
            return folder
        with cache.workspace(key) as work:
            made = run_conversion(Conversion(gguf, gguf.name), work, progress, check_config)
            return cache.publish(made, key, name=str(gguf), source=str(gguf))


def run_conversion(job: Conversion, work: Path, progress: Progress, check_config: CheckConfig | None) -> Path:
    """Convert into a folder in `work`, and return that folder."""
    out = work / "out"
    log = work / "conversion.log"
    words = {"gguf": str(job.gguf), "out": str(out), "label": job.label, "prompt": job.prompt}
    # -P: a folder named `engine` where the user stands must not be imported instead of ours.
    command = [sys.executable, "-P", "-m", "engine.checkpoints.gguf_to_hf", json.dumps(words)]
    quiet = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
    with disk_errors("converting", work.parent), log.open("w") as errors:
        out.mkdir()
        child = subprocess.Popen(  # noqa: S603 - this interpreter, our own module
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=os.environ | quiet,
        )
    try:
        _follow(child, job, work, progress, check_config)
    finally:
        child.kill()
        child.communicate()
    if child.returncode:
        raise ModelError(_failure(job, child.returncode, log))
    return out


def _follow(
    child: subprocess.Popen[str], job: Conversion, work: Path, progress: Progress, check_config: CheckConfig | None
) -> None:
    """Pass on what the child reports until it ends; the first word against the model stops it."""
    assert child.stdout is not None
    for line in child.stdout:
        match json.loads(line) if line.endswith("\n") else None:  # a killed child may leave half a line
            case {"begin": label}:
                progress.begin(label)
            case {"done": done, "total": total}:
                progress.update(done, total)
            case {"config": config, "parameters": parameters}:
                if check_config is not None:
                    check_config(config)
                require_space(work.parent, 2 * parameters + _SIDE_FILES, f"{job.gguf.name} in bfloat16")
            case {"refused": reason}:
                raise ModelError(f"can't serve {job.label}: {reason}")
    child.wait()


def _failure(job: Conversion, status: int, log: Path) -> str:
    if status == -signal.SIGKILL:
        size = size_text(job.gguf.stat().st_size)
        return f"converting {job.label} ({size}) was killed, most likely for want of memory: free some and try again"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip() if lines else f"exit status {status}"
    if "No space left on device" in last:
        return (
            f"the disk filled up while converting {job.label}: free some space, or set SLIPSTREAM_CACHE to another disk"
        )
    return f"converting {job.label} failed ({last}): use the model in safetensors form, by its Hugging Face id"


def _key(gguf: Path) -> str:
    """Names the content without reading all of it: its size, its time, and a hash of both ends.

    The ends hold the metadata and the last tensor; a file edited in place has another time.
    """
    try:
        stat = gguf.stat()
        with gguf.open("rb") as file:
            digest = xxhash.xxh3_128(f"{stat.st_size} {stat.st_mtime_ns} ".encode() + file.read(_ENDS))
            file.seek(max(0, stat.st_size - _ENDS))
            digest.update(file.read(_ENDS))
    except OSError as error:
        raise ModelError(f"can't read {gguf} ({error.strerror}): make it readable to this user") from error
    return f"{re.sub(r'[^A-Za-z0-9._-]', '_', gguf.stem).lstrip('.')}-{digest.hexdigest()[:12]}"
