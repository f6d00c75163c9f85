"""`slipstream simulate --reference`: agreement is reported case by case, and disagreement is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from cluster.cli import cli
from placement.pipeline import Pipelines, simulate_plainly
from tests.placement.pipelines import SMALL, azure_like

REQUESTS = azure_like(80)
PROFILE = {
    "prefill": SMALL.prefill,
    "decoding_smallbs": SMALL.decode,
    "decoding_largebs": SMALL.large_decode,
    "decoding_large_small_bs_threshold": SMALL.large_batch,
}
CASE = {
    "id": "sim",
    "backend": "distserve",
    "model": "m",
    "workload": "w",
    "arrival": "gamma",
    "cv": 2.0,
    "slo_ttft_ms": 400,
    "slo_tpot_ms": 30,
}


def simulation() -> dict[str, Any]:
    requests = REQUESTS.with_gaps(REQUESTS.gaps * 4)  # drawn for cv 2: a file has them divided by 4
    outcome = simulate_plainly(Pipelines(SMALL, 2, 9000, SMALL, 1), requests, 3.0)
    p90 = float(np.percentile(outcome.ttft_ms, 90))
    both = 100 * float(np.mean((outcome.ttft_ms <= 400) & (outcome.tpot_ms <= 30)))
    out = {
        "p90_ttft_lt_target": p90 < 400,
        "attainment": {"both": [{"target": [400, 30], "attainment_pct": both}]},
        "ttft_ms": {"mean": float(outcome.ttft_ms.mean()), "p90": p90},
        "e2e_ms": {"max": float(outcome.e2e_ms.max())},
        "first3_tpot_ms": outcome.tpot_ms[:3].tolist(),
        "wall_s": 0.4,
    }
    sizes = {"tp_prefill": 1, "pp_prefill": 2, "tp_decode": 1, "pp_decode": 1}
    return CASE | sizes | {"rate_rps": 3, "out": out}


def search() -> dict[str, Any]:
    out = {"n_configs": 3, "n_evaluated": 3, "unsupported": [], "per_config_goodput_per_gpu": []}
    cluster = {"num_node": 1, "ngpu_per_node": 3, "max_per_gpu_rate": 4, "esp": 0.5}
    return CASE | cluster | {"id": "search", "out": out}


def reference(**changes: Any) -> dict[str, Any]:
    return {
        "profile_coefficients": {"distserve": {"m": {"1": PROFILE}}},
        "max_num_tokens": [{"model": "m", "tp": 1, "pp": pp, "max_num_tokens": 9000} for pp in (1, 2)],
        "model_layers_heads": {"m": [4, 1]},
        "workloads": {"w": np.stack([REQUESTS.prompt_tokens, REQUESTS.output_tokens], axis=1).tolist()},
        "unit_gaps": {"cv2": REQUESTS.gaps.tolist()},
        "simulations": [simulation()],
    } | changes


def run(folder: Path, content: Any) -> tuple[int, dict[str, Any]]:
    path = folder / "reference.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    result = CliRunner().invoke(cli, ["simulate", "--reference", str(path), "--json"], catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, json.loads(result.stdout)


def test_a_file_of_our_own_results_agrees(tmp_path: Path) -> None:
    status, report = run(tmp_path, reference())
    [case] = report["cases"]
    assert (status, report["agrees"], case["agrees"]) == (0, True, True)
    assert {check["what"] for check in case["checks"]} >= {
        "ttft_ms p90",
        "attainment both [400, 30]",
        "tpot of request 2",
    }
    assert case["unchecked"] == ["wall_s"]


@pytest.mark.parametrize(("factor", "agrees"), [(1.0009, True), (1.0011, False)])
def test_times_have_to_be_within_a_tenth_of_a_percent(tmp_path: Path, factor: float, agrees: bool) -> None:
    case = simulation()
    case["out"]["ttft_ms"]["p90"] *= factor
    status, report = run(tmp_path, reference(simulations=[case]))
    assert (status == 0, report["agrees"]) == (agrees, agrees)


def test_goodput_has_to_be_equal_for_every_configuration(tmp_path: Path) -> None:
    """The expected goodputs are those of a first run, then one is a step off."""
    case = search()
    status, report = run(tmp_path, reference(simulations=[], searches=[case]))
    got = {check["what"]: check["got"] for check in report["cases"][0]["checks"]}
    assert status == 1  # three configurations are missing from the file
    assert report["cases"][0]["strategy"] == "distserve-low-affinity"
    splits = [[1, 1, 1, 1, 1], [1, 1, 1, 1, 2], [1, 1, 2, 1, 1]]
    case["out"]["per_config_goodput_per_gpu"] = [[split, got[f"goodput {split}"]] for split in splits]
    assert run(tmp_path, reference(simulations=[], searches=[case]))[0] == 0
    case["out"]["per_config_goodput_per_gpu"][1][1] += 0.5
    assert run(tmp_path, reference(simulations=[], searches=[case]))[0] == 1


def test_what_cannot_be_evaluated_is_reported_with_the_reason(tmp_path: Path) -> None:
    content = reference(simulations=[], searches=[search()])
    content["max_num_tokens"] = content["max_num_tokens"][:1]
    _, report = run(tmp_path, content)
    assert "TP 1 and PP 2" in report["cases"][0]["refused"]["[1, 1, 2, 1, 1]"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"workload": "x"}, "sim: workloads has no 'x'; it has 'w'"),
        ({"cv": 3.0}, "unit_gaps has no 'cv3'"),
        ({"model": "x"}, "model_layers_heads has no 'x'"),
        ({"tp_prefill": 3}, "no profile for TP 3"),
        ({"out": {"ttft_ms": {"median": 1.0}}}, "out.ttft_ms is not of the format"),
    ],
)
def test_a_case_that_cannot_be_run_says_why_and_the_rest_goes_on(tmp_path: Path, change: dict, message: str) -> None:
    status, report = run(tmp_path, reference(simulations=[simulation() | change, simulation()]))
    assert status == 1
    assert message in report["cases"][0]["failed"]
    assert report["cases"][1]["agrees"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no file of reference results"),
        ({"workloads": []}, "no file of reference results: .*"),
        (reference(searches=[search() | {"esp": 0}]), r"`float` > 0\.0 - at `\$\.searches\[0\]\.esp`"),
        (reference(searches=[search() | {"max_per_gpu_rate": -1}]), "max_per_gpu_rate"),
        (reference(searches=[search() | {"ttft_percentile": 101}]), "<= 100.0 - at .*ttft_percentile"),
        (reference(simulations=[simulation() | {"rate_rps": -1}]), "rate_rps"),
        (reference(simulations=[simulation() | {"pp_prefill": 0}]), "`int` >= 1 - at .*pp_prefill"),
        (reference(simulations=[simulation() | {"cv": 1e200}]), "<= 100.0 - at .*cv"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(Exception, match=message):
        run(tmp_path, content)
