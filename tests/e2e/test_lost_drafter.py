"""A drafter that never comes back costs its worker, which Ray Serve replaces, and no request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.conftest import TIMEOUT_S, Server, served
from tests.speculation.hanging_once import HUNG, LOST, SITE

pytestmark = pytest.mark.e2e
LOST_S = 3.0
SPECULATION = ("--speculation", "hanging", "--speculation-controller", "fixed", "--speculation-budget", "6")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def drafting(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Server, Path]]:
    """Two workers that decode, and the file that says where the drafter hangs."""
    (tmp_path / "sitecustomize.py").write_text(SITE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), str(ROOT))))
    monkeypatch.setenv(HUNG, str(tmp_path / "hung"))
    monkeypatch.setenv(LOST, str(LOST_S))
    with served(folder, "--decode-replicas", "2", *SPECULATION) as server:
        yield server, tmp_path / "hung"


def answer(server: Server, prompt: str, **wish: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 40, "temperature": 0, "ignore_eos": True, **wish}
    response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    found: dict[str, Any] = response.raise_for_status().json()
    return found


def test_a_worker_that_a_drafter_does_not_give_back_is_replaced_and_its_requests_are_answered_elsewhere(
    drafting: tuple[Server, Path],
) -> None:
    server, hung = drafting
    prompts = [letter * 9 for letter in "abcdefgh"]
    plain = [answer(server, prompt, speculation=False)["choices"] for prompt in prompts]
    with ThreadPoolExecutor(len(prompts)) as clients:
        found = list(clients.map(lambda prompt: answer(server, prompt), prompts))
    assert [one["choices"] for one in found] == plain
    assert any(one["usage"]["completion_tokens_details"]["drafted_tokens"] for one in found)
    lost = int(hung.read_text())
    deadline = time.monotonic() + TIMEOUT_S
    while psutil.pid_exists(lost) or server.roles != ["decode", "decode", "prefill"]:
        assert time.monotonic() < deadline, "it was not replaced"
        time.sleep(0.05)
    assert len(server.replicas("worker")) == 3
    assert answer(server, prompts[0])["choices"] == plain[0]
