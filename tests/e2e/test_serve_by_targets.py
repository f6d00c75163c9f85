"""`slipstream serve FOLDER --slo` on this machine: measured, planned, served."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest

from core.compiler import cache_root
from tests.e2e.conftest import served

pytestmark = pytest.mark.e2e


def test_targets_alone_are_enough_to_be_served(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = cache_root() / "native"
    compiled.mkdir(parents=True, exist_ok=True)
    (tmp_path / "native").symlink_to(compiled)
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    with served(folder, "--slo", "ttft=5000,tpot=1000", "--lengths", "prompt=60,output=12,cv=0.5") as server:
        body = {"model": "tiny", "prompt": "hello there", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
    assert answer.json()["usage"]["completion_tokens"] > 0
    said = "".join(server.output)
    assert "chosen: " in said
    assert "attainment " in said
    assert list((tmp_path / "profiles").glob("*.json"))
