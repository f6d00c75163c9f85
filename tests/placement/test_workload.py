"""Workloads, arrivals and traces; what is wrong with them is said by line."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from core.errors import ConfigError
from placement.arrivals import fixed_gaps, gamma_gaps, poisson_gaps
from placement.lengths import parse_lengths
from placement.prefixes import prefix_hits
from placement.traces import read_trace
from tests.placement.pipelines import workload

AZURE = "arrived_at,num_prefill_tokens,num_decode_tokens\n"


def file(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_every_rate_meets_the_same_rhythm() -> None:
    requests = workload([1] * 4, [1] * 4, [0.0, 0.5, 2.0, 1.0])
    np.testing.assert_allclose(requests.arrivals_ms(2.0), [0.0, 250.0, 1250.0, 1750.0])
    np.testing.assert_allclose(requests.arrivals_ms(4.0), requests.arrivals_ms(2.0) / 2)


def test_lengths_may_say_what_part_of_each_prompt_a_cache_has() -> None:
    plain, some, most = (
        parse_lengths(f"prompt=300,output=50,cv=0.5{more}") for more in ("", ",cached=0.6", ",cached=0.9999")
    )
    assert not plain.cached_tokens.any()
    np.testing.assert_allclose(some.cached_tokens, 0.6 * some.prompt_tokens, atol=0.5)
    np.testing.assert_array_equal(most.cached_tokens, most.prompt_tokens - 1)
    for one in (some, most):
        np.testing.assert_array_equal(one.prompt_tokens, plain.prompt_tokens)
        np.testing.assert_array_equal(one.output_tokens, plain.output_tokens)
        np.testing.assert_array_equal(one.gaps, plain.gaps)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("prompt=9,output=9,cached=1", "cached is 1, not a share"),
        ("prompt=9,output=9,cached=-0.1", "cached is -0.1, not 0 or more"),
        ("prompt=9,output=9,cached=half", "cached is 'half'"),
        ("prompt=9,output=9,cashed=0.5", "is not one mean for prompt"),
    ],
)
def test_lengths_that_cannot_be_are_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=r"write --lengths prompt=512,output=128,.* and cached=0\.5") as refused:
        parse_lengths(text)
    assert named in refused.value.message


@pytest.mark.parametrize(("cv", "tolerance"), [(0.5, 0.03), (1.0, 0.05), (3.0, 0.15)])
def test_gaps_have_a_mean_of_one_and_the_variation_asked_for(cv: float, tolerance: float) -> None:
    gaps = gamma_gaps(40_000, cv, np.random.default_rng(0))[1:]
    assert gaps.mean() == pytest.approx(1.0, abs=tolerance)
    assert gaps.std() == pytest.approx(cv, rel=tolerance)


def test_the_first_request_comes_at_once() -> None:
    assert fixed_gaps(3).tolist() == [0.0, 1.0, 1.0]
    assert poisson_gaps(3, np.random.default_rng(0))[0] == 0.0
    with pytest.raises(ConfigError, match="cv is 0"):
        gamma_gaps(3, 0.0, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("prompts", "outputs", "gaps", "message"),
    [
        ([], [], [], "empty"),
        ([1, 0], [1, 1], [0.0, 1.0], "request 1: prompt_tokens is 0"),
        ([1], [0], [0.0], "request 0: output_tokens is 0"),
        ([1], [1], [float("nan")], "request 0: gaps is nan"),
        ([1, 1], [1], [0.0, 1.0], "2 prompts but 1 output_tokens"),
    ],
)
def test_requests_that_cannot_be_are_refused(prompts: list, outputs: list, gaps: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        workload(prompts, outputs, gaps)


def test_azure_traces_are_read_with_their_rhythm_and_rate(tmp_path: Path) -> None:
    trace = read_trace(file(tmp_path, "t.csv", AZURE + "10.0,374,44\n10.5,396,109\n12.0,5,1\n"))
    assert trace.rate == pytest.approx(1.0)
    assert trace.workload.prompt_tokens.tolist() == [374, 396, 5]
    assert trace.workload.output_tokens.tolist() == [44, 109, 1]
    np.testing.assert_allclose(trace.workload.arrivals_ms(trace.rate), [0.0, 500.0, 2000.0])


def test_mooncake_traces_tell_what_a_prefix_cache_hits(tmp_path: Path) -> None:
    lines = [
        '{"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]}',
        '{"timestamp": 1000, "input_length": 1600, "output_length": 6, "hash_ids": [0, 1, 3, 4]}',
        '{"timestamp": 2000, "input_length": 1024, "output_length": 6, "hash_ids": [0, 1]}',
    ]
    path = file(tmp_path, "t.jsonl", "\n".join(lines))
    assert read_trace(path).workload.cached_tokens.tolist() == [0, 1024, 1023]  # one token is always computed
    assert read_trace(path).rate == pytest.approx(1.0)
    assert read_trace(path, cache_tokens=0).workload.cached_tokens.tolist() == [0, 0, 0]


def test_requests_come_when_they_came_where_longer_ones_are_left_out() -> None:
    asked = workload([10, 90, 90, 10, 10], [1] * 5, [0.5, 1.0, 2.0, 0.5, 1.0])
    kept = asked.no_longer_than(50)
    assert kept.arrivals_ms(2.0 * 3 / 5).tolist() == pytest.approx(asked.arrivals_ms(2.0)[[0, 3, 4]].tolist())
    with pytest.raises(ConfigError, match="the workload is empty"):
        asked.no_longer_than(5)


def test_a_full_cache_forgets_the_ends_of_old_prompts_first() -> None:
    assert prefix_hits(["ab", "cd", "ab", "c"], 10, 30).tolist() == [0, 0, 10, 10]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "line 1: expected the columns arrived_at"),
        ("t.csv", AZURE, "empty trace"),
        ("t.csv", AZURE + "0,1,1\n1,x,1\n", "line 3: .1,x,1. is not a time in seconds and two counts"),
        ("t.csv", AZURE + "0,1,1\n1,1\n", "line 3: .1,1. is not a time"),
        ("t.csv", AZURE + "0,1,1\n1," + 2**17 * "1" + "1,1\n", "line 3: field larger"),
        ("t.csv", AZURE + "0,1,1\n1,1,0\n", "line 3: 1 prompt and 0 output"),
        ("t.csv", AZURE + "5,1,1\n1,1,1\n", "line 3: arrives at 1, but"),
        ("t.csv", AZURE + "nan,1,1\n", "line 2: arrives at nan"),
        ("t.csv", AZURE + "1,1,1\n1,1,1\n", "arrive at once"),
        ("t.jsonl", "", "empty trace"),
        ("t.jsonl", '{"timestamp": 0, "input_length": 1}\n', "line 1"),
        ("t.jsonl", '\n{"timestamp": \n', "line 2"),
        ("t.txt", "", "a .csv .Azure. or a .jsonl"),
    ],
)
def test_a_bad_trace_is_refused_by_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(file(tmp_path, name, text))


def test_a_trace_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.csv can't be read"):
        read_trace(tmp_path / "none.csv")
