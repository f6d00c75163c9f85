"""`slipstream plan replay`: from a trace and a profile to what replanning would have done."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import numpy as np
import pytest
from click.testing import CliRunner

from cluster.cli import cli
from core.errors import ConfigError
from core.served import Served
from core.types import FinishReason
from placement.latency import Coefficients, StepLatency
from placement.profile import Setting, write_profile
from placement.traces import served_lines
from tests.commands import output_of
from tests.placement.profiles import disturbed, profile
from tests.placement.traces import by_turns

LINKED = "nodes: [{name: here, device: cpu, devices: 4, memory_gb: 8}]\nlinks: [{within: here, gb_per_s: 10}]"


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """A trace whose rate goes from 1 to 12/s after a minute, a profile of `small` on a core, and a node of four."""
    rng = np.random.default_rng(0)
    times = np.cumsum(np.concatenate([rng.exponential(1, 60), rng.exponential(1 / 12, 1500)]))
    rows = [f"{at},{rng.poisson(1500)},{1 + rng.poisson(20)}" for at in times]
    (tmp_path / "trace.csv").write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    write_profile(profile(), tmp_path / "profile.json")
    (tmp_path / "cluster.yaml").write_text(LINKED)
    flags = {"profile": "profile.json", "topology": "cluster.yaml"}
    named = [part for name, file in flags.items() for part in (f"--{name}", str(tmp_path / file))]
    return str(tmp_path / "trace.csv"), *named, "--slo", "ttft=1500,tpot=30"


def run(*arguments: object) -> str:
    return output_of("plan", "replay", *arguments)


def replayed(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_a_replay_adds_the_workers_that_the_trace_needs(files) -> None:
    found = replayed(*files, "--workers", 1, "--max-workers", 4)
    assert found["start"]["both"] == 1
    counts = [
        sum(changed["change"]["to"][role] for role in ("prefill", "decode", "both")) for changed in found["changes"]
    ]
    first = next(changed for changed, count in zip(found["changes"], counts, strict=True) if count > 1)
    assert 55 < first["at_s"] < 120
    assert re.search(r"expected at \d+\.?\d* requests/s of 1\d{3} prompt and 2\d output tokens", first["change"]["why"])
    assert max(counts) <= 4
    assert found["attainment"] > found["without"]
    assert found["requests"] == 1560 == sum(interval["requests"] for interval in found["intervals"])


def test_the_table_and_the_picture_say_the_same(files, tmp_path: Path) -> None:
    text = run(*files, "--workers", 2, "--start", "prefill=1,decode=1", "--plot", tmp_path / "replay.svg")
    assert "at the start 1 prefill + 1 decode, steps of " in text
    assert "% attained with 2 workers on average, " in text
    texts = [element.text for element in Xml.parse(tmp_path / "replay.svg").iter() if element.text]
    assert {"with replanning", "without", "prefill", "decode", "both"} <= set(texts)


def test_workers_that_draft_are_replayed_so(files) -> None:
    fast = (*files, "--workers", 2, "--slo", "ttft=3000,tpot=7")
    with pytest.raises(ConfigError, match="out of reach"):
        run(*fast)
    drafts = ("--speculation", "hybrid", "--acceptance-length", 3)
    assert replayed(*fast, *drafts)["without"] > 0.02
    with pytest.raises(ConfigError, match="--speculation hybrid: the profile does not know it"):
        run(*fast, "--speculation", "hybrid")


def test_a_forecast_may_begin_with_an_earlier_trace(files) -> None:
    """Which has a season of a minute, in periods of 6 s."""
    flags = ("--forecast", "holt-winters", "--season", 60, "--interval", 1, "--warm-start", files[0])
    assert replayed(*files, "--workers", 2, *flags)["requests"] == 1560


def test_a_log_of_ours_is_replayed_at_another_rate(files, tmp_path: Path) -> None:
    served = [Served(1e9 + i, 200, 50, 20, 90.0, 12.0, FinishReason.STOP) for i in range(60)]
    (tmp_path / "log.jsonl").write_bytes(served_lines(served))
    found = replayed(tmp_path / "log.jsonl", *files[1:], "--workers", 2, "--rate", 4)
    assert (found["requests"], found["rate_rps"], found["attainment"]) == (60, 4.0, 1.0)


def test_prompts_of_a_trace_hit_no_more_than_the_workers_have_memory_for(files, tmp_path: Path) -> None:
    """Without hits they take 120 ms; a worker has memory for one of them."""
    flags = (by_turns(tmp_path, 3), *files[1:5], "--slo", "ttft=60,tpot=30", "--kv-cache-memory", 160_000_000)
    assert replayed(*flags, "--workers", 3)["without"] > 0.9
    with pytest.raises(ConfigError, match="out of reach"):
        run(*flags, "--workers", 1)


def test_a_profile_whose_fit_is_off_is_warned_of(files, tmp_path: Path) -> None:
    write_profile(disturbed(), tmp_path / "profile.json")
    (tmp_path / "one.csv").write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,10\n1,100,10\n")
    found = replayed(tmp_path / "one.csv", *files[1:], "--workers", 2)
    assert any("something else computed meanwhile" in warning for warning in found["warnings"])


def test_requests_that_no_worker_can_hold_are_left_out_and_counted(files, tmp_path: Path) -> None:
    rows = ["arrived_at,num_prefill_tokens,num_decode_tokens", "0,100,10", "1,9000,3"]
    (tmp_path / "two.csv").write_text("\n".join(rows))
    arguments = (tmp_path / "two.csv", *files[1:], "--workers", 2)
    found = replayed(*arguments)
    assert (found["requests"], found["left_out"], found["workers"]) == (1, 1, 2.0)
    assert "warning: 1 more requests are left out: no worker can hold them" in run(*arguments)


def test_it_is_found_in_the_help_of_plan_and_has_its_own() -> None:
    shown = CliRunner().invoke(cli, ["plan", "--help"]).stdout
    assert "slipstream plan replay TRACE" in shown
    assert "Usage: cli plan replay [OPTIONS] TRACE" in run("--help")


def test_a_model_in_a_folder_of_that_name_is_planned_for(files) -> None:
    result = CliRunner().invoke(cli, ["plan", "./replay", *files[1:], "--lengths", "prompt=200,output=20"])
    assert "--profile: it is of small, not of ./replay" in str(result.exception)


FASTER = StepLatency(
    Coefficients(8.0, 0.030, 2e-6), Coefficients(6.5, 0.00017, 0.015), Coefficients(5.3, 0.00016, 0.03), 6, 13.0
)
"""Steps of a TP group of two, which take somewhat less than half as long as those of one."""


@pytest.fixture
def of_two(files, tmp_path: Path) -> tuple[str, ...]:
    """The same with a profile of TP 2 beside that of TP 1."""
    write_profile(profile(FASTER, setting=Setting(device="cpu", tp=2)), tmp_path / "of_two.json")
    return (*files, "--profile", str(tmp_path / "of_two.json"))


def test_a_replay_changes_tp_where_that_attains_more(of_two) -> None:
    flags = ("--workers", 4, "--start", "both=4", "--slo", "ttft=1500,tpot=14", "--horizon", 600)
    found = replayed(*of_two, *flags, "--shapes", "1x1,2x1")
    first = found["changes"][0]
    assert first["change"]["to"]["decode_shape"] == {"tp": 2, "pp": 1}
    assert "while workers of other shapes start" in first["change"]["why"]
    assert found["start"] == {
        "prefill": 0, "decode": 0, "both": 4, "chunk_tokens": found["start"]["chunk_tokens"],
        "prefill_shape": {"tp": 1, "pp": 1}, "decode_shape": {"tp": 1, "pp": 1},
    }  # fmt: skip
    assert found["attainment"] > found["without"] + 0.2
    assert sum(interval["requests"] for interval in found["intervals"]) == 1560
    shown = run(*of_two, *flags, "--shapes", "1x1,2x1")
    assert "at the start 4 of both roles (1x1), steps of" in shown
    assert "(2x1), steps of" in shown


def test_a_replay_with_a_single_shape_is_one_without(of_two, files) -> None:
    plain, single = replayed(*files, "--workers", 3), replayed(*files, "--workers", 3, "--shapes", "1x1")
    assert plain["attainment"] == single["attainment"]
    assert [change["at_s"] for change in plain["changes"]] == [change["at_s"] for change in single["changes"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"--shapes": "1x1,4x1"},
            "shape 4x1: no profile is of TP 4, only of 1, 2; make one with slipstream profile --t",
        ),
        ({"--shapes": "2"}, "--shapes: '2' is no TP and PP; write them as 1x1,2x1"),
        ({"--shapes": "1x1", "--pipeline-parallel-size": "2"}, "--shapes has the PP of each shape"),
        ({"--shapes": "1x8"}, "shape 1x8: .*8 stages, and 4 layers"),
        ({}, "--profile: workers are of one shape; give one profile, or --shapes too"),
    ],
)
def test_shapes_that_cannot_be_are_refused(of_two, change: dict[str, str], message: str) -> None:
    flags = {"--workers": "2"} | change
    result = CliRunner().invoke(cli, ["plan", "replay", *of_two, *(part for flag in flags.items() for part in flag)])
    shown = result.exception.message if isinstance(result.exception, ConfigError) else result.output
    assert result.exit_code != 0
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--workers": "0"}, "0 is not in the range"),
        ({"--workers": "4", "--max-workers": "3"}, "--max-workers 3: --workers has 4"),
        ({"--slo": "ttft=1,tpot=1"}, "out of reach for 90% of the first 200 requests: without load 0% attain them"),
        ({"--profile": "none.json"}, "none.json can't be read"),
        ({"--warm-start": "none.csv"}, "none.csv can't be read"),
        ({"--season": "60"}, "the forecast constant knows no season: take holt-winters"),
        ({"--season": "40", "--forecast": "holt-winters"}, "--season 40: it is two periods .* one is 30 s"),
        ({"--start": "both=1"}, "--start: both=1 is 1 in all, and --workers 2"),
        ({"--start": "both=²"}, "'both=²' is no role and number"),
        ({"--rate": "1e-4"}, "days at 0.0001 requests/s, and a replay 14 at the most: give a higher"),
        ({"--chunk-tokens": "16"}, "--workers 2: none of --chunk-tokens"),
        ({"--plot": "/there/is/none.svg"}, "--plot: /there/is/none.svg can't be written"),
        ({"--kv-cache-memory": "1kB"}, "the model fits nowhere"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(files, change: dict[str, str], message: str) -> None:
    flags = {"--workers": "2"} | change
    result = CliRunner().invoke(cli, ["plan", "replay", *files, *(part for flag in flags.items() for part in flag)])
    assert result.exit_code != 0
    shown = result.exception.message if isinstance(result.exception, ConfigError) else result.output
    assert re.search(message, shown), shown


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "line 1: expected the columns"), ("arrived_at,num_prefill_tokens,num_decode_tokens\n0,1,x\n", "line 2: ")],
)
def test_a_trace_that_is_none_is_refused_by_line(files, tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "bad.csv").write_text(text)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "bad.csv", *files[1:], "--workers", 2)


def test_what_is_extrapolated_or_was_measured_elsewhere_is_said(files, tmp_path: Path) -> None:
    write_profile(profile(setting=Setting(device="cpu", versions={"torch": "1.0"})), tmp_path / "profile.json")
    said = " ".join(replayed(*files, "--workers", 2, "--chunk-tokens", "2048")["warnings"])
    assert "workers are extrapolated: they may have steps with 2048 tokens of prompts, and no more than 1024" in said
    assert "torch" not in said  # the topology is of other machines
    here = [part for part in files if part not in ("--topology", str(tmp_path / "cluster.yaml"))]
    assert "profiled with torch 1.0, and here it is" in " ".join(replayed(*here, "--workers", 1)["warnings"])
