"""`slipstream serve --replan-shapes` on Ray: workers of TP 1 give way to one of TP 2 while requests run."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from placement.latency import Coefficients, StepLatency
from placement.profile import Setting, write_profile
from tests.e2e.conftest import Server, assert_drained, served
from tests.e2e.test_replanning_served import FEW, shown, under_load, until
from tests.placement.profiles import profile

pytestmark = pytest.mark.e2e

SLOW = StepLatency(Coefficients(10.0, 0.1, 0.0), Coefficients(1000.0, 0.0, 8.0), Coefficients(1400.0, 0.0, 8.0), 100)
FAST = StepLatency(Coefficients(5.0, 0.05, 0.0), Coefficients(10.0, 0.0, 1.0), Coefficients(100.0, 0.0, 1.0), 100)
"""By these profiles no request meets its targets with TP 1, and all do with TP 2; in truth all do with either."""


@pytest.fixture
def profiles(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "one.json", tmp_path / "two.json"
    for path, latency, tp in zip(paths, (SLOW, FAST), (1, 2), strict=True):
        found = profile(latency, setting=Setting(device="cpu", tp=tp))
        facts = replace(found.model, name=str(folder), dtype="float32", weight_bytes=10**6, kv_token_bytes=768)
        write_profile(replace(found, model=facts), path)
    return paths


def of_shape(server: Server, name: str) -> int:
    return len(server.replicas(name))


async def test_tp_is_changed_on_ray_while_requests_run_and_none_of_them_is_lost(
    folder: Path, profiles: tuple[Path, Path]
) -> None:
    flags = {
        "replan": "on",
        "replan-profile": profiles[0],
        "replan-further-profiles": profiles[1],
        "replan-shapes": "1x1,2x1",
        "replan-slo": "ttft=2000,tpot=150",
        "replan-max-workers": 3,
        "replan-interval": 0.3,
        "replan-horizon": 3600,
        "cpus-per-worker": 0.5,
        "decode-replicas": 2,
    }
    with served(folder, "--colocated", *(f"--{name}={value}" for name, value in flags.items())) as server:
        await until(lambda: "arrangement" in shown(server), "a word of the controller")
        assert shown(server)["arrangement"] == "2 of both roles (1x1), steps of 512 tokens"
        async with under_load(server.url) as load:
            load.rate = FEW
            await until(lambda: shown(server)["shapes"] == {"both": "2x1"}, "the decision")
            await until(lambda: of_shape(server, "worker-tp2-pp1") == 1, "a worker of TP 2")
            await until(lambda: of_shape(server, "worker-tp1-pp1") == 0, "the end of the others")
            status = shown(server)
            await until(lambda: load.statuses[200] > 100, "more requests")
        assert set(load.statuses) == {200}, load.statuses
        assert status["arrangement"].startswith("1 of both roles (2x1)")
        assert "while workers of other shapes start" in status["decisions"][0]["why"]
        assert 0 < status["startup_s"] < 60
        assert 'planned_role="both",replica="0",role="gateway",shape="2x1"' in server.metrics()
        assert_drained(server, signal.SIGTERM)
