"""`slipstream bench plan`: what is run, and how predicted and measured are set side by side."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from bench.planning.choice import rates_of
from bench.planning.comparison import Comparison, Outcomes, Round, Run, within
from bench.planning.load import Server, outcome_of, serving
from bench.planning.others import Others, wait_for_others
from bench.planning.pace import Pace, beside, pace_of
from bench.planning.part import Part, answer
from bench.planning.report import table
from bench.planning.session import Tried, undisturbed
from bench.serving.timeline import Timeline
from cluster.cli import cli
from cluster.config.loading import validated
from cluster.machine import usable_cores
from cluster.membership import Member
from core.errors import ConfigError, Unavailable
from core.types import Role
from engine.checkpoints.progress import Silent
from engine.kv_layout import KVLayout
from placement.layout import Layout
from placement.layout import Role as Does
from placement.native import serve
from placement.outcome import Outcome, Targets
from placement.profile import Drafting, Setting, write_profile
from placement.workload import Workload
from tests.children import children_with
from tests.placement.layouts import group
from tests.placement.pipelines import workload
from tests.placement.profiles import profile
from tests.tiny import save_byte_tokenizer, save_tiny_llama

TARGETS = Targets(ttft_ms=100.0, tpot_ms=20.0)


def outcome(ttft: list[float], tpot: list[float]) -> Outcome:
    return Outcome(np.array(ttft), np.array(tpot), np.array(ttft))


def run(layout: str, rate: float, predicted: Outcome, measured: Outcome, others: float = 0.0) -> Run:
    rounds = [
        Round(Outcomes(predicted, measured, measured), pace, others) for pace in (Pace(1.0, 1.2), Pace(1.21, 1.2))
    ]
    return Run.of(layout, rate, rounds, TARGETS)


def test_a_run_is_of_the_requests_of_all_its_rounds() -> None:
    """Percentiles of all, not means of each round's."""
    soon, late = outcome([10.0, 20.0, 30.0], [1.0] * 3), outcome([500.0], [30.0])
    rounds = [Round(Outcomes(soon, soon, soon), Pace(), 0.1), Round(Outcomes(soon, late, late), Pace(), 0.3)]
    found = Run.of("a", 1.0, rounds, TARGETS)
    assert found.measured.ttft_ms["p50"] == 25.0
    assert (found.predicted.attainment, found.measured.attainment, found.at_pace.attainment) == (1.0, 0.75, 0.75)
    assert found.others_cores == 0.3


def test_a_workload_is_cut_in_parts_that_have_all_of_it() -> None:
    asked = workload([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], [0.1, 0.2, 0.3, 0.4, 0.5])
    found = asked.parts(2)
    assert [part.prompt_tokens.tolist() for part in found] == [[1, 2, 3], [4, 5]]
    assert [part.gaps.tolist() for part in found] == [[0.1, 0.2, 0.3], [0.4, 0.5]]


def test_errors_are_relative_to_what_was_measured_and_attainment_is_in_points() -> None:
    found = run("a", 1.0, outcome([90.0, 90.0], [11.0, 11.0]), outcome([100.0, 120.0], [10.0, 10.0]))
    assert found.errors["ttft_p50"] == pytest.approx(90 / 110 - 1)
    assert found.errors["tpot_p90"] == pytest.approx(0.1)
    assert found.errors["attainment"] == pytest.approx(0.5)


def test_the_pace_is_the_median_of_what_requests_alone_took_beside_the_prediction() -> None:
    predicted = Outcome(np.full(3, 100.0), np.array([10.0, 0.0, 20.0]), np.full(3, 600.0))
    measured = Outcome(np.array([110.0, 120.0, 900.0]), np.array([12.0, 0.0, 26.0]), np.full(3, 700.0))
    assert beside(predicted, measured) == pytest.approx((1.2, 1.25))
    first_only = Outcome(np.full(2, 100.0), np.zeros(2), np.full(2, 100.0))
    assert beside(first_only, Outcome(np.full(2, 150.0), np.zeros(2), np.full(2, 150.0))) == pytest.approx((1.5, 1.5))


class Simulated:
    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def outcome(self, asked: Workload, rate: float) -> Outcome:
        return serve(self.layout, asked, rate).outcome


def test_requests_that_tell_the_pace_come_one_at_a_time() -> None:
    """So that they are as fast as predicted, whoever would have waited."""
    layout = Layout((group(Does.BOTH),), report_ms=0.0)
    asked = workload([200, 300] * 10, [20, 30] * 10, [0.0] * 20)
    assert pace_of(Simulated(layout), layout, asked) == pytest.approx((1.0, 1.0))  # type: ignore[arg-type]
    slower = Simulated(Pace(1.1, 1.05).of(layout))
    assert pace_of(slower, layout, asked) == pytest.approx((1.1, 1.05), rel=0.01)  # type: ignore[arg-type]


def test_the_pace_of_a_round_is_between_that_before_and_that_after() -> None:
    assert Pace.mean([Pace(1.0, 1.0), Pace(1.21, 1.44)]) == pytest.approx((1.1, 1.2))


def test_the_best_is_the_one_with_most_within_the_targets_at_the_highest_rate() -> None:
    good, late = outcome([50.0], [10.0]), outcome([500.0], [10.0])
    slower = outcome([60.0], [10.0])
    runs = [run("a", 1.0, late, good), run("a", 2.0, good, late), run("b", 2.0, slower, slower)]
    found = Comparison.of("m", TARGETS, 1, "a", runs)
    assert (found.best_predicted, found.best_measured) == ("a", "b")
    assert "which was not predicted" in table(found)


def test_the_table_marks_figures_that_are_not_true_and_counts_those_that_are() -> None:
    found = Comparison.of(
        "m", TARGETS, 1, "a", [run("a", 1.5, outcome([50.0], [10.0]), outcome([52.0], [14.0]), others=0.4)]
    )
    assert found.true == {"ttft_p50": 1, "ttft_p90": 1, "tpot_p50": 0, "tpot_p90": 0, "attainment": 1}
    text = table(found)
    assert text.count("!") == 2
    assert "-3.8%" in text
    assert "other processes took 0.40 cores" in text
    assert "alone then, first tokens took 1.10 times as long, further ones 1.20:" in text
    assert (
        "\n3 of 5 figures are true as profiled; of 1 runs ttft p50 1 (within 10 %), ttft p90 1 (within 15 %), " in text
    )
    assert (
        "attainment 1 (within 5 points)\n5 of 5 figures are true if steps take as much longer as for requests alone"
        in text
    )


def test_five_points_are_within_five_points() -> None:
    """Of 40 requests 19 and 21: as floating point has it, 0.05 and a bit."""
    errors = {
        n: run(
            "a",
            1.0,
            outcome([50.0 if i < n else 500.0 for i in range(40)], [10.0] * 40),
            outcome([50.0 if i < 21 else 500.0 for i in range(40)], [10.0] * 40),
        ).errors["attainment"]
        for n in (18, 19)
    }
    assert abs(errors[19]) > 0.05
    assert (within("attainment", errors[19]), within("attainment", errors[18])) == (True, False)


@pytest.mark.parametrize("rates", ["a", "1,,2", "0,1", "1,inf"])
def test_rates_are_numbers_above_zero(rates: str) -> None:
    with pytest.raises(ConfigError, match="--rates"):
        rates_of(rates, 1.0)


def test_rates_are_shares_of_the_goodput_unless_they_are_given() -> None:
    assert rates_of(None, 10.0) == pytest.approx([3.0, 6.0, 8.5])
    assert rates_of("2,1", 10.0) == [1.0, 2.0]


def test_a_request_that_failed_or_got_too_little_ends_the_measurement() -> None:
    asked = workload([4], [3], [0.0])
    answered = Timeline(index=0, start=1.0, chunks=[1.5, 1.6], end=2.5, finished=True, completion_tokens=3)
    found = outcome_of([answered], asked)
    assert (found.ttft_ms[0], found.tpot_ms[0]) == pytest.approx((500.0, 500.0))
    answered.completion_tokens = 2
    with pytest.raises(Unavailable, match="2 of 3 tokens came"):
        outcome_of([answered], asked)
    answered.error = "HTTP 503: no"
    with pytest.raises(Unavailable, match="request 0 of the load failed: HTTP 503"):
        outcome_of([answered], asked)


def test_what_this_process_takes_is_not_others(monkeypatch) -> None:
    """Nor is a machine that stands still."""
    times = psutil.cpu_times()
    monkeypatch.setattr(psutil, "cpu_times", lambda: times)
    others = Others()
    sum(range(10**6))
    assert others.cores() == 0.0


class Scripted:
    """What others take, a figure for each look."""

    def __init__(self, *cores: float) -> None:
        self.left = [*cores]

    def __call__(self) -> Scripted:
        return self

    def cores(self) -> float:
        return self.left.pop(0)


def test_a_round_waits_until_others_rest(monkeypatch) -> None:
    others = Scripted(1.0, 0.3, 0.1)
    monkeypatch.setattr("bench.planning.others.Others", others)
    monkeypatch.setattr("bench.planning.others._LOOK_S", 0.001)
    assert wait_for_others(0.15) > 0.0
    assert not others.left
    others.left = [0.1]
    assert wait_for_others(0.15) == 0.0
    others.left = [1.0] * 10_000
    monkeypatch.setattr("bench.planning.others._PATIENCE_S", 0.02)
    assert wait_for_others(0.15) >= 0.02


def test_a_disturbed_round_is_repeated_with_the_pace_before_it_and_the_better_one_counts(monkeypatch) -> None:
    monkeypatch.setattr("bench.planning.session.wait_for_others", lambda most_cores: 0.0)
    soon, late = outcome([10.0], [1.0]), outcome([90.0], [9.0])

    def found(before: Pace | None, cores: list[float], measured: list[Outcome]) -> Tried:
        monkeypatch.setattr("bench.planning.session.Others", Scripted(*cores))
        paces = (Pace(number, 1.0) for number in range(1, 9))
        return undisturbed(lambda: measured.pop(0), lambda: next(paces), before, Silent())

    assert found(Pace(), [0.1], [soon]) == Tried(0.1, soon, Pace(), Pace(1.0))
    assert found(None, [0.1], [soon]) == Tried(0.1, soon, Pace(1.0), Pace(2.0))
    assert found(Pace(), [0.8, 0.1], [late, soon]) == Tried(0.1, soon, Pace(2.0), Pace(3.0))
    assert found(Pace(), [0.8, 0.9], [soon, late]) == Tried(0.8, soon, Pace(), Pace(1.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


TREE = {"engine": {"device": "cpu", "dtype": "float32", "kv_cache_memory": "16MiB"}}


@pytest.mark.skipif(usable_cores() < 2, reason="needs a core for each worker")
def test_workers_and_gateway_are_processes_that_hand_over_and_end(model) -> None:
    tree = TREE | {
        "model": str(model),
        "cluster": {"prefill_replicas": 1, "decode_replicas": 1, "handoff_min_tokens": 0},
    }
    with serving(tree, model, Setting(device="cpu")) as server:
        parts = children_with("bench.planning.part")
        assert len(parts) == 3
        before = server.computed()
        found = server.timelines(workload([20, 30, 5], [4, 1, 9], [0.0, 0.01, 0.01]), 1.0)
        deadline = time.monotonic() + 60
        while (computed := server.computed().since(before)).steps < 1 + 8 and time.monotonic() < deadline:
            pass  # workers tell late where the machine is busy
    assert [len(timeline.chunks) for timeline in found] == [4, 1, 9]
    assert [timeline.prompt_tokens for timeline in found] == [20, 30, 5]
    assert 1 + 8 <= computed.steps <= 3 + 3 + 8  # prompts that come at once are computed together
    assert 0.0 < computed.ms < 1e3 * sum(timeline.latency for timeline in found)
    assert not any(part.is_running() for part in parts)


def test_a_part_that_does_not_come_up_is_an_error(model) -> None:
    tree = TREE | {"model": str(model), "cluster": {"colocated": True, "decode_replicas": 1}}
    with (
        pytest.raises(ConfigError, match="both-0 ended before it was ready"),
        serving(tree, model / "none", Setting(device="cpu")),
    ):
        pytest.fail("it can't have been ready")


async def test_a_worker_that_dies_before_its_gateway_is_ready_is_named(model, monkeypatch) -> None:
    monkeypatch.setattr("bench.planning.part._READY_S", 0.1)
    monkeypatch.setattr("cluster.front.ACQUAINTANCE_S", 0.1)
    tree = TREE | {"model": str(model), "gateway": {"port": 0}, "cluster": {"colocated": True, "decode_replicas": 1}}
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="a")
    dead = Member(worker_id="both-0", address="127.0.0.1:1", role=Role.BOTH, layout=layout)
    with pytest.raises(Unavailable, match="both-0 did not answer the gateway in"):
        await asyncio.wait_for(answer(Part(tree, str(model), members=[dead]), validated(tree)), 60)


@pytest.fixture
def beside_tests(monkeypatch) -> None:
    """Other tests compute meanwhile, all the time: it would wait for their end, and try each round again and again."""
    monkeypatch.setattr("bench.planning.others._PATIENCE_S", 0.0)
    monkeypatch.setattr("bench.planning.session.TRIES", 1)


def planned(model: Path, folder: Path, *flags: str, **changes: object):
    facts = replace(profile().model, name=str(model), dtype="float32", max_tokens=256, weight_bytes=10**6)
    write_profile(replace(profile(**changes), model=facts), folder / "profile.json")
    fixed = ["--slo", "ttft=5000,tpot=500", "--lengths", "prompt=20,output=6", "--kv-cache-memory", "64MiB"]
    return CliRunner().invoke(
        cli, ["bench", "plan", str(model), "--profile", str(folder / "profile.json"), *fixed, *flags]
    )


@pytest.mark.usefixtures("beside_tests")
def test_a_layout_of_the_plan_is_run_and_told_beside_its_prediction(model, tmp_path) -> None:
    flags = ["--layout", "1 x cpu TP1, chunks of 512", "--rates", "20", "--requests", "5", "--json"]
    result = planned(model, tmp_path, *flags, "--rounds", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    (told,) = found["runs"]
    assert (told["layout"], told["rate_rps"]) == ("1 x cpu TP1, chunks of 512", 20.0)
    assert found["best_measured"] == told["layout"]
    assert told["measured"]["ttft_ms"]["p50"] > 0
    assert told["predicted"]["ttft_ms"]["p50"] > 14
    assert len(told["paces"]) == 2
    paces = [pace for each in told["paces"] for pace in each]
    at_pace = told["at_pace"]["ttft_ms"]["p50"] / told["predicted"]["ttft_ms"]["p50"]
    assert min(1.0, *paces) - 1e-9 <= at_pace <= max(1.0, *paces) + 1e-9


def test_prompts_end_in_questions_and_no_two_begin_alike() -> None:
    server = Server("http://127.0.0.1:1", "m", 1000, [[1, 2, 3], [4, 5]])
    asked = workload([6, 2, 6], [1, 1, 1], [0.0] * 3)
    prompts = [json.loads(body)["prompt"] for body in server._bodies(asked)]
    assert [len(prompt) for prompt in prompts] == [6, 2, 6]
    assert [prompt[-2:] for prompt in prompts] == [[2, 3], [4, 5], [2, 3]]
    assert prompts[0][:3] != prompts[2][:3]


def test_prompts_begin_alike_as_far_as_a_cache_is_to_have_them() -> None:
    server = Server("http://127.0.0.1:1", "m", 1000, [[1, 2]])
    some = Workload(*np.array([[5, 40, 40], [1, 1, 1]], np.int32), np.zeros(3), np.array([4, 20, 30], np.int32))
    prompts = [json.loads(body)["prompt"] for body in server._bodies(some)]
    assert [len(prompt) for prompt in prompts] == [5, 40, 40]
    assert prompts[0][:4] == prompts[1][:4]
    assert prompts[1][:20] == prompts[2][:20]
    assert prompts[1][20:30] != prompts[2][20:30]
    assert [prompt[-2:] for prompt in prompts[1:]] == [[1, 2], [1, 2]]


def test_targets_one_by_one_are_told_where_they_have_percentiles() -> None:
    targets = Targets(100.0, 20.0, 450.0, shares=(("ttft", 0.75),))
    predicted = Outcome(np.array([90.0, 110.0]), np.array([10.0, 10.0]), np.array([400.0, 500.0]))
    measured = Outcome(np.array([90.0, 90.0]), np.array([10.0, 30.0]), np.array([400.0, 500.0]))
    found = Run.of("a", 1.5, [Round(Outcomes(predicted, predicted, measured), Pace(), 0.0)], targets)
    assert (found.predicted.attainment, found.measured.attainment) == (0.5, 0.5)
    compared = Comparison.of("m", targets, 2, "a", [found])
    assert (compared.e2e_ms, compared.percentiles) == (450.0, {"ttft": 75.0})
    alone = "targets met, each alone: ttft 50.0% / 100.0%, tpot 100.0% / 50.0%, e2e 50.0% / 50.0%"
    assert alone in table(compared)


@pytest.mark.usefixtures("beside_tests")
def test_a_layout_with_drafts_is_run_with_the_questions_of_a_file(model, tmp_path) -> None:
    (tmp_path / "asked.jsonl").write_text('{"turns": ["abcabcabcabcabcabc"]}\n')
    drafts = Drafting(
        drafter="prompt_lookup",
        prompts="asked.jsonl",
        budget=3,
        acceptance_length=1.5,
        rows=2.0,
        draft_ms=0.1,
        draft_sequence_ms=0.1,
    )
    flags = ["--layout", "1 x cpu TP1 with drafts, chunks of 512", "--rates", "20", "--requests", "5", "--json"]
    flags += ["--speculation", "prompt_lookup", "--dataset", str(tmp_path / "asked.jsonl")]
    result = planned(model, tmp_path, *flags, drafting=(drafts,))
    assert result.exit_code == 0, result.output
    (told,) = json.loads(result.stdout)["runs"]
    assert told["layout"] == "1 x cpu TP1 with drafts, chunks of 512"
    assert told["measured"]["tpot_ms"]["p50"] > 0.0


def test_rounds_have_a_request_each_at_the_least(model, tmp_path) -> None:
    result = planned(model, tmp_path, "--requests", "3", "--rounds", "4")
    assert result.exit_code == 2
    assert "--rounds 4: more than the 3 of --requests" in result.stderr


def test_a_layout_that_is_not_in_the_plan_is_refused_with_those_that_are(model, tmp_path) -> None:
    result = planned(model, tmp_path, "--layout", "3 x TPU")
    assert result.exit_code == 2
    assert "there is no '3 x TPU'" in result.stderr
    assert "1 x cpu TP1, chunks of 2048" in result.stderr
