"""`slipstream simulate LAYOUT --trace FILE`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import ConfigError
from placement.layout import Link, Outage, Role
from placement.layout_file import read_layout
from placement.outcome import Targets
from placement.slo import parse_slo
from tests.commands import output_of

LAYOUT = """
groups:
  - name: prefill
    role: prefill
    latency: &step {prompt: [10, 0.1, 0], decode: [5, 0, 1], large_decode: [50, 0, 1], large_rows: 100}
    kv_tokens: 10000
  - name: decode
    role: decode
    count: 2
    latency: *step
    kv_tokens: 10000
    speculation: {acceptance_length: 2, rows: 4}
links:
  - {from: prefill, to: decode, ms_per_token: 0.5, latency_ms: 3}
outages:
  - {group: prefill, at_ms: 90000, for_ms: 10}
"""
TRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n0,100,3\n10,200,3\n20,100,1\n"


@pytest.fixture
def layout(tmp_path: Path) -> Path:
    (tmp_path / "layout.yaml").write_text(LAYOUT)
    return tmp_path / "layout.yaml"


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    (tmp_path / "trace.csv").write_text(TRACE)
    return tmp_path / "trace.csv"


def run(*arguments: object) -> str:
    return output_of("simulate", *arguments)


def test_it_predicts_what_a_layout_does_with_a_trace(layout: Path, trace: Path) -> None:
    found: dict[str, Any] = json.loads(run(layout, "--trace", trace, "--slo", "ttft=25,tpot=100", "--json"))
    assert (found["requests"], found["rate_rps"], found["preemptions"]) == (3, 0.1, 0)
    assert found["ttft_ms"]["mean"] == pytest.approx((20 + 30 + 20) / 3)
    assert found["tpot_ms"]["p50"] == pytest.approx((100 * 0.5 + 3 + 5 + 4) / 2)
    assert found["attainment"] == pytest.approx(2 / 3)
    assert found["goodput_rps"] == pytest.approx(0.2 / 3)
    assert len(found["busy"]) == 3


def test_a_trace_is_cut_or_repeated(layout: Path, trace: Path) -> None:
    assert "2 requests" in run(layout, "--trace", trace, "--requests", 2)
    assert "7 requests" in run(layout, "--trace", trace, "--requests", 7)


def test_the_table_says_the_same(layout: Path, trace: Path) -> None:
    printed = run(layout, "--trace", trace, "--slo", "ttft=25,tpot=100", "--rate", 2)
    assert "3 requests at 2/s" in printed
    assert "66.7% meet both targets" in printed


def test_prompts_hit_no_more_than_the_groups_that_compute_them_have_memory_for(layout: Path, tmp_path: Path) -> None:
    """Of 4 blocks of 512 tokens the second prompt leaves the third one, which is the first again, 1."""
    prompts = ([0, 1, 2], [5, 6, 7], [0, 1, 2])
    lines = [
        json.dumps({"timestamp": 10_000 * at, "input_length": 1500, "output_length": 1, "hash_ids": hashes})
        for at, hashes in enumerate(prompts)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(lines))
    for kv_tokens, cached in ((2100, 512), (4000, 1499)):
        layout.write_text(LAYOUT.replace("kv_tokens: 10000", f"kv_tokens: {kv_tokens}", 1))
        found = json.loads(run(layout, "--trace", tmp_path / "trace.jsonl", "--json"))
        assert found["ttft_ms"]["mean"] == pytest.approx((160 + 160 + 10 + 0.1 * (1500 - cached)) / 3)


@pytest.mark.parametrize("arrival", [("fixed",), ("gamma", "--cv", "3", "--seed", "1")])
def test_another_rhythm_can_be_asked_for(layout: Path, trace: Path, arrival: tuple[str, ...]) -> None:
    assert "3 requests" in run(layout, "--trace", trace, "--arrival", *arrival)


def test_a_layout_is_read_with_all_that_it_says(layout: Path) -> None:
    found = read_layout(layout)
    assert [group.role for group in found.groups] == [Role.PREFILL, Role.DECODE, Role.DECODE]
    assert found.links == (Link(0.5, 3.0),)
    assert found.paths == {(0, 1): 0, (0, 2): 0}
    assert found.outages == (Outage(0, 90_000, 10),)
    assert found.groups[1].speculation is not None


def test_a_layout_may_say_what_large_steps_take_and_when_nothing_is_saved(layout: Path) -> None:
    more = "large_rows: 100, shared_ms: 3, shared_rows: 8, large_prompt: [0, 0.2, 0], large_tokens: 256"
    layout.write_text(LAYOUT.replace("large_rows: 100", more))
    latency = read_layout(layout).groups[0].latency
    assert latency.step_ms(256, 0.0, 0.0, 2, 2) == pytest.approx(51.2 + 7.0 - 3.0 * 0.75)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("name: decode", "nmae: decode", "nmae"),
        ("large_rows: 100", "large_rows: 100, extra: 1", "extra"),
        ("role: decode", "role: both-ish", "role is 'both-ish', not one of prefill, decode, both"),
        ("role: decode", "role: prefill", "no group that decodes"),
        ("to: decode", "to: decoder", "no group 'decoder'; there are prefill, decode"),
        ("name: decode", "name: prefill", "two groups are named prefill"),
        ("count: 2", "count: 0", "count is 0"),
        ("count: 2", "count: 1000000000000", r"<= 10000 - at `\$\.groups\[.*\]\.count`"),
        ("rows: 4", "rows: 9000000000000000000", r"speculation\.rows`"),
        ("groups:", "groups: [", "layout.yaml: "),
        ("rows: 4", "rows: 1", "acceptance length of 2 with 1 rows"),
    ],
)
def test_a_bad_layout_is_refused_by_name(layout: Path, old: str, new: str, message: str) -> None:
    layout.write_text(LAYOUT.replace(old, new))
    with pytest.raises(ConfigError, match=message):
        read_layout(layout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give a LAYOUT and a --trace"),
        (("--cv", "2"), "--cv and --seed are for --arrival gamma"),
        (("--reference", "x", "--rate", "2"), "leave the rest out"),
        (("none.yaml", "--trace", "none.csv"), "none.yaml can't be read"),
        (("--reference", "none.json"), "none.json can't be read"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(*arguments)


def test_targets_are_read_in_milliseconds() -> None:
    assert parse_slo("ttft=200, tpot=12.5") == Targets(200.0, 12.5)
    text = "ttft=200@p95,tpot=12.5,e2e=9000@p99.9"
    assert parse_slo(text) == Targets(200.0, 12.5, 9000.0, (("ttft", 0.95), ("e2e", 0.999)))
    assert parse_slo(text).told() == text


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "'' is not one target"),
        ("ttft=200", "has no tpot"),
        ("tpot=200,e2e=1", "has no ttft"),
        ("ttft=1,ttft=2", "'ttft=2' is not one target"),
        ("ttft=x,tpot=1", "ttft is 'x'"),
        ("ttft=-1,tpot=1", "ttft is -1, not above 0"),
        ("ttft=1,tpot=1,e2e=0", "e2e is 0, not above 0"),
        ("ttft=1,tpot=1,itl=3", "'itl=3' is not one target"),
        ("ttft=1@p0,tpot=1", "ttft has the percentile 'p0'"),
        ("ttft=1,tpot=1@p100", "tpot has the percentile 'p100'"),
        ("ttft=1,tpot=1,e2e=2@90", "e2e has the percentile '90'"),
        ("ttft=1,tpot=1,e2e=2@pp5", "e2e has the percentile 'pp5'"),
        ("ttft=1,tpot=1@,e2e=2@", "tpot has the percentile ''"),
    ],
)
def test_other_targets_are_refused_by_name_with_an_example(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match="write --slo ttft=200,tpot=50") as refused:
        parse_slo(text)
    assert named in refused.value.message


def test_the_share_that_meets_each_target_is_told(layout: Path, trace: Path) -> None:
    printed = run(layout, "--trace", trace, "--slo", "ttft=25@p60,tpot=100,e2e=80", "--rate", 0.1)
    assert "33.3% meet all targets" in printed
    assert "ttft 66.7%, tpot 100.0%, e2e 33.3%" in printed
