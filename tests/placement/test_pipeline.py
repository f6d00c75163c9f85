"""The DistServe-compatible simulator: its definition, and the native one beside it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

from core.errors import ConfigError
from placement import native
from placement.latency import Coefficients, DistServeLatency
from placement.outcome import Targets
from placement.pipeline import Pipelines, simulate_plainly
from placement.workload import Workload
from tests.placement.pipelines import SMALL, azure_like, pipelines, workload, workloads

PLAIN = DistServeLatency(Coefficients(10.0, 0.1, 0.0), Coefficients(5.0, 0.0, 1.0), Coefficients(50.0, 0.0, 1.0), 3)
APART = Pipelines(PLAIN, 1, 1000, PLAIN, 1)


@pytest.fixture
def library() -> None:
    if native.load() is None:
        pytest.skip("no native simulators here")


def test_one_request_takes_the_sum_of_its_steps() -> None:
    outcome = simulate_plainly(APART, workload([100], [2], [0.0]), 1.0)
    prefill = 10.0 + 0.1 * 100 + 1.0 + 2.0 + 1e-4 * 100
    first, second = 5.0 + 1.0 + 2.0 + 1e-4 * 100, 5.0 + 1.0 + 2.0 + 1e-4 * 101
    assert outcome.ttft_ms == pytest.approx([prefill])
    assert outcome.tpot_ms == pytest.approx([(first + second) / 2])
    assert outcome.e2e_ms == pytest.approx([prefill + first + second])


def test_stages_share_the_work_of_a_prompt_and_each_adds_a_hop() -> None:
    outcome = simulate_plainly(replace(APART, prefill_stages=2), workload([100], [1], [0.0]), 1.0)
    assert outcome.ttft_ms == pytest.approx([10.0 + 0.1 * 100 + 2 * 2.0 + 2.0 + 1e-4 * 100])


def test_prompts_that_come_together_share_a_batch_up_to_the_cap() -> None:
    outcome = simulate_plainly(replace(APART, prefill_cap=250), workload([100, 100, 100], [1, 1, 1], [0.0] * 3), 1.0)
    both = 10.0 + 0.1 * 200 + 1.0 + 2.0 + 1e-4 * 200
    assert outcome.ttft_ms == pytest.approx([both, both, both + 10.0 + 0.1 * 100 + 1.0 + 2.0 + 1e-4 * 100])


def test_a_large_decode_batch_has_coefficients_of_its_own() -> None:
    together = simulate_plainly(APART, workload([10] * 3, [1] * 3, [0.0] * 3), 1.0)
    assert together.tpot_ms == pytest.approx([50.0 + 3.0 + 2.0 + 1e-4 * 30] * 3)


def test_a_pipeline_that_does_both_lets_prompts_go_first() -> None:
    """The second prompt comes while the first is prefilled, so the first decode waits for it."""
    both = replace(APART, colocated=True)
    requests = workload([100, 100], [1, 1], [0.0, 0.01])
    apart, shared = simulate_plainly(APART, requests, 1.0), simulate_plainly(both, requests, 1.0)
    assert shared.ttft_ms == pytest.approx(apart.ttft_ms)
    assert shared.tpot_ms[0] > apart.tpot_ms[0] + 20.0


def test_a_prompt_that_fits_no_batch_is_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"1001 tokens.*1000"):
        simulate_plainly(APART, workload([1001], [1], [0.0]), 1.0)
    with pytest.raises(ConfigError, match=r"50001 tokens.*50000"):
        native.simulate(replace(APART, prefill_cap=90_000), workload([50_000], [1], [0.0]), 1.0)


@pytest.mark.usefixtures("library")
@settings(deadline=None, max_examples=80)
@given(pipelines(), workloads())
def test_the_native_simulator_computes_the_same(system: Pipelines, requests: Workload) -> None:
    plain, compiled = simulate_plainly(system, requests, 7.0), native.simulate(system, requests, 7.0)
    for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(compiled, name))


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("rate", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("stages", [(1, 1), (2, 3), (4, 1)])
def test_the_native_simulator_computes_the_same_under_load(rate: float, stages: tuple[int, int]) -> None:
    system = Pipelines(SMALL, stages[0], 9000, SMALL, stages[1])
    requests = azure_like(150)
    plain, compiled = simulate_plainly(system, requests, rate), native.simulate(system, requests, rate)
    np.testing.assert_array_equal(plain.e2e_ms, compiled.e2e_ms)


def test_without_a_compiler_the_definition_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "load", lambda: None)
    requests = azure_like(20)
    plain = simulate_plainly(replace(APART, prefill_cap=9000), requests, 2.0)
    np.testing.assert_array_equal(native.simulate(replace(APART, prefill_cap=9000), requests, 2.0).e2e_ms, plain.e2e_ms)


def test_attainment_counts_requests_that_meet_both_targets() -> None:
    outcome = simulate_plainly(APART, workload([100, 900], [1, 1], [0.0, 100.0]), 1.0)
    assert outcome.attainment(Targets(50.0, 9.0)) == 0.5
    assert outcome.attainment(Targets(200.0, 9.0)) == 1.0
    assert outcome.attainment(Targets(200.0, 1.0)) == 0.0


def test_a_machine_without_a_compiler_is_told_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path))
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load.cache_clear()
    try:
        assert native.load() is None
    finally:
        native.load.cache_clear()
    assert "install g++" in caplog.text
