"""One process of each kind dies under load. The long version is `python -m tests.chaos.kill`."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.kill import Plan, torment
from tests.chaos.served import save_sensitive_llama


@pytest.mark.e2e
def test_whoever_is_killed_no_token_is_wrong_no_request_hangs_and_nothing_is_left(tmp_path: Path) -> None:
    save_sensitive_llama(tmp_path)
    plan = Plan(
        kills=4,
        kinds=("gateway", "decode", "prefill", "controller"),
        each_once=True,
        clients=6,
        cases_each=1,
        calm_s=1.0,
        pause_s=0.5,
    )
    verdict = asyncio.run(torment(tmp_path, plan))
    assert [kill.kind for kill in verdict.kills] == list(plan.kinds)
    assert verdict.load.endings["done"] > 0
    assert not any(verdict.faults.values()), verdict.faults
