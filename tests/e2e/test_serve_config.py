"""Deployed by others: `serve run FILE`, with the configuration that a RayService holds."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from cluster.checks import hold_port
from cluster.deployable import NAME

pytestmark = pytest.mark.e2e
START_S = 120.0


@contextmanager
def deployed(file: Path, app_dir: Path) -> Iterator[None]:
    """On a Ray cluster of its own, not on one of another test's that runs here just now."""
    serve = str(Path(sys.executable).with_name("serve"))
    command = [serve, "run", str(file), "--app-dir", str(app_dir), "--address", "local"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            launcher = psutil.Process(process.pid)
            tree = [launcher, *launcher.children(recursive=True)]
            for left in tree:  # its way to end is Ray's own
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            psutil.wait_procs(tree, 10)


def answered(url: str) -> httpx.Response:
    """By whoever listens there, once it does."""
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(url, timeout=10)
            if answer.status_code not in (404, 503) or time.monotonic() > deadline:
                return answer
        assert time.monotonic() < deadline, f"nobody answers at {url}"
        time.sleep(0.2)


def test_the_builder_makes_the_application_of_a_configuration(folder: Path, tmp_path: Path) -> None:
    with hold_port("127.0.0.1", 0) as port, hold_port("127.0.0.1", 0) as proxy:
        answers_on(port, proxy, folder, tmp_path)


def answers_on(port: int, proxy: int, folder: Path, tmp_path: Path) -> None:
    tree = {
        "model": str(folder),
        "engine": {"dtype": "float32", "device": "cpu", "kv_cache_memory": "16MiB"},
        "cluster": {"cpus_per_worker": 1.0, "handoff_min_tokens": 0},
        "gateway": {"port": port, "served_model_name": "tiny"},
    }
    config = {
        "http_options": {"host": "127.0.0.1", "port": proxy},
        "applications": [{"name": NAME, "import_path": "cluster.serve_app:application", "args": tree}],
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
    with deployed(tmp_path / "serve.yaml", Path(__file__).parents[2]):
        assert answered(f"http://127.0.0.1:{port}/health").status_code == 200
        body = {"model": "tiny", "prompt": "hello there", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] > 0
        assert answered(f"http://127.0.0.1:{proxy}/-/healthz").text == "success", "as KubeRay asks"
        misdirected = httpx.get(f"http://127.0.0.1:{proxy}/v1/models", timeout=10)
        assert misdirected.status_code == 421
        assert re.search(rf"the API is at http://127\.0\.0\.1:{port}", misdirected.text)
