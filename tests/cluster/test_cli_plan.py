"""`slipstream plan`: from profiles, a topology and a workload to a layout, and to what `slipstream serve` takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from cluster.cli import cli
from cluster.config.loading import load
from cluster.config.replan import ReplanSection
from cluster.config.tree import SlipstreamConfig
from cluster.groups import groups_of
from cluster.planning import measured_elsewhere
from core.errors import ConfigError
from placement.latency import Coefficients, StepLatency
from placement.profile import Setting, write_profile
from tests.commands import output_of
from tests.placement.layouts import STEP
from tests.placement.profiles import disturbed, profile
from tests.placement.traces import by_turns

NODE = "nodes: [{name: here, device: cpu, devices: 4, memory_gb: 8, dollars_per_hour: 2}]"
LINKED = NODE + "\nlinks: [{within: here, gb_per_s: 10}]"
LENGTHS = ("--lengths", "prompt=200,output=20,cv=0.3")
SLO = ("--slo", "ttft=400,tpot=60")
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


@pytest.fixture
def files(tmp_path: Path) -> tuple[str, ...]:
    """A profile of `small` on a core, and a node of four."""
    write_profile(profile(), tmp_path / "profile.json")
    (tmp_path / "cluster.yaml").write_text(LINKED)
    return "--profile", str(tmp_path / "profile.json"), "--topology", str(tmp_path / "cluster.yaml")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """Of a model of eight billion parameters there is only the configuration."""
    (tmp_path / "large").mkdir()
    (tmp_path / "large" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "large"


def run(*arguments: object) -> str:
    return output_of("plan", *arguments)


def planned(*arguments: object) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*arguments, "--json"))
    return found


def test_the_plan_is_the_best_of_its_ranking_with_what_it_will_reach(files) -> None:
    found = planned("small", *files, *SLO, *LENGTHS)
    assert found["chosen"] == found["ranking"][0]
    assert found["ranking"] == sorted(found["ranking"], key=lambda entry: -entry["score"])
    assert {entry["disaggregated"] for entry in found["ranking"]} == {True, False}
    assert found["rate_rps"] == found["chosen"]["goodput_rps"]
    for metric in ("ttft_p50", "ttft_p90", "tpot_p99", "attainment"):
        assert (
            found["predicted"][metric]["low"]
            <= found["predicted"][metric]["mean"]
            <= found["predicted"][metric]["high"]
        )
    assert found["predicted"]["attainment"]["high"] >= 0.9
    assert found["predicted"]["ttft_p50"]["mean"] < found["predicted"]["ttft_p90"]["mean"] < 400
    assert found["sources"] == {"cpu TP1": "measured"}
    assert found["verdict"].split(":")[0] == ("disaggregate" if found["chosen"]["disaggregated"] else "colocate")


def test_what_many_fast_devices_will_reach_is_told_of_runs_that_are_long_enough(large: Path) -> None:
    """2000 requests would be over before any of them could be late."""
    found = planned(large, "--device", "H100", "--devices", 16, "--slo", "ttft=1000,tpot=30", *LENGTHS)
    assert found["predicted"]["attainment"]["mean"] >= 0.9
    ranked, front = (max(one["goodput_rps"] / one["devices"] for one in found[of]) for of in ("ranking", "pareto"))
    assert front < 1.1 * ranked


def test_for_a_rate_the_fewest_devices_are_taken_that_attain_the_targets(files) -> None:
    low, high = (planned("small", *files, *SLO, *LENGTHS, "--rate", rate) for rate in (2, 100))
    assert low["chosen"]["devices"] == 1 < high["chosen"]["devices"]
    assert (low["rate_rps"], high["rate_rps"]) == (2, 100)
    assert high["predicted"]["attainment"]["mean"] > 0.88


def test_bursts_cost_goodput(files) -> None:
    flags = ("--lengths", "prompt=1500,output=20", "--devices", 1)
    steady, bursty = (planned("small", *files, *SLO, *flags, "--burstiness", shape) for shape in (4, 0.25))
    assert bursty["chosen"]["goodput_rps"] < 0.9 * steady["chosen"]["goodput_rps"]


def test_prompts_of_a_trace_hit_no_more_than_the_devices_have_memory_for(files, tmp_path: Path) -> None:
    flags = ("--trace", by_turns(tmp_path, 3), "--slo", "ttft=4000,tpot=60", "--devices", 1, "--rate", 1)
    little, enough = (
        planned("small", *files, *flags, "--kv-cache-memory", size)["predicted"]["ttft_p50"]["mean"]
        for size in (160_000_000, 500_000_000)
    )
    assert enough < 50 < 100 < little


def test_no_more_devices_are_taken_than_allowed(files) -> None:
    found = planned("small", *files, *SLO, *LENGTHS, "--devices", 2, "--objective", "total")
    assert max(entry["devices"] for entry in found["ranking"]) == 2
    with pytest.raises(ConfigError, match="--devices 5: the topology has 4"):
        run("small", *files, *SLO, *LENGTHS, "--devices", 5)


TWO_KINDS = (
    "nodes: [{name: a, device: L40S, devices: 1, memory_gb: 48}, {name: b, device: H100, devices: 4, memory_gb: 80}]\n"
    "links: [{within: b, gb_per_s: 100}, {between: [a, b], gb_per_s: 10}]"
)


@pytest.mark.parametrize(("asked", "left"), [("2", {"L40S": 1, "H100": 2}), ("H100=3", {"L40S": 1, "H100": 1})])
def test_the_learner_gets_devices_of_a_kind_that_has_them(large: Path, tmp_path: Path, asked: str, left) -> None:
    (tmp_path / "two.yaml").write_text(TWO_KINDS)
    flags = ("--topology", tmp_path / "two.yaml", "--slo", "ttft=2000,tpot=200", *LENGTHS, "--objective", "total")
    found = planned(large, *flags, "--learner-devices", asked)
    assert max(entry["devices"] for entry in found["ranking"]) <= sum(left.values())
    assert found["chosen"]["devices"] >= left["H100"]


@pytest.mark.parametrize("asked", ["4", "L40S=1"])
def test_devices_that_the_learner_cannot_have_are_refused_with_the_numbers(large, tmp_path: Path, asked: str) -> None:
    (tmp_path / "two.yaml").write_text(TWO_KINDS)
    with pytest.raises(ConfigError, match=f"--learner-devices {asked}: the topology has 1 L40S and 4 H100, and one"):
        run(large, "--topology", tmp_path / "two.yaml", *SLO, *LENGTHS, "--learner-devices", asked)


def test_the_configuration_is_one_that_serve_takes(files, tmp_path: Path) -> None:
    found = planned("small", *files, *SLO, *LENGTHS, "--chunk-tokens", 1024, "--out", tmp_path / "serve.yaml")
    config = load(tmp_path / "serve.yaml", {})
    assert config.cluster.colocated is not found["chosen"]["disaggregated"]
    assert config.cluster.num_workers == found["chosen"]["devices"]
    assert (config.model, config.engine.max_num_batched_tokens, config.engine.sequences) == ("small", 1024, 64)
    assert (config.engine.kv_cache_bytes, config.cluster.cpus_per_worker) == (2**30, 1.0)


def test_a_plan_is_served_as_its_configuration_is_with_flags_on_top(files, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "plan.json").write_text(
        run("small", *files, *SLO, *LENGTHS, "--json", "--out", tmp_path / "serve.yaml")
    )
    served = []
    monkeypatch.setattr("cluster.launcher.serve", lambda config, _console: served.append(config) or 0)
    for flags in (("--plan", "plan.json"), ("--config", "serve.yaml")):
        CliRunner().invoke(cli, ["serve", flags[0], str(tmp_path / flags[1]), "--port", "1"], catch_exceptions=False)
    assert served[0] == served[1]
    assert (served[0].gateway.port, served[0].model) == (1, "small")


def test_a_plan_that_is_replanned_needs_no_word_of_profiles_targets_and_shapes(tmp_path: Path, monkeypatch) -> None:
    for tp in (1, 2):
        write_profile(profile(setting=Setting(device="cpu", tp=tp)), tmp_path / f"{tp}.json")
    (tmp_path / "cluster.yaml").write_text(LINKED)
    known = [flag for tp in (1, 2) for flag in ("--profile", str(tmp_path / f"{tp}.json"))]
    asked = ("small", *known, "--topology", tmp_path / "cluster.yaml", *LENGTHS)
    served = []
    monkeypatch.setattr("cluster.launcher.serve", lambda config, _console: served.append(config) or 0)
    for slo in ("ttft=400,tpot=60", "ttft=400@p95,tpot=60"):
        (tmp_path / f"{slo}.json").write_text(run(*asked, "--json", "--slo", slo, "--share", "0.8"))

    def serve(slo: str, *flags: str) -> SlipstreamConfig:
        given = ["serve", "--plan", str(tmp_path / f"{slo}.json"), *flags]
        CliRunner().invoke(cli, given, catch_exceptions=False)
        return served[-1]

    assert serve("ttft=400,tpot=60").replan == ReplanSection()
    replan = serve("ttft=400,tpot=60", "--replan", "on").replan
    assert (replan.slo, replan.share, {*replan.shapes}) == ("ttft=400,tpot=60", 0.8, {"1x1", "2x1"})
    assert {replan.profile, *replan.further_profiles} == {tmp_path / "1.json", tmp_path / "2.json"}
    limited = serve("ttft=400,tpot=60", "--replan", "advise", "--replan-shapes", str(replan.shapes[0]))
    assert limited.replan.shapes == replan.shapes[:1]
    with pytest.raises(ConfigError, match="ttft has @p95: replanning has one share"):
        serve("ttft=400@p95,tpot=60", "--replan", "on")
    assert serve("ttft=400@p95,tpot=60", "--replan", "on", "--replan-slo", "ttft=1,tpot=1").replan.slo


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"plan\.json is no plan: .*make one with slipstream plan --json"),
        ('{"serve": null}', "none of the plan's layouts can be served; its warnings say why"),
        ('{"serve": {"engine": {"seats": 1}}}', "unknown setting engine.seats"),
    ],
)
def test_a_file_that_is_no_plan_is_refused_by_serve(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, ["serve", "--plan", str(tmp_path / "plan.json")], catch_exceptions=False)


def test_workers_of_two_shapes_are_planned_and_served(tmp_path: Path) -> None:
    slow = StepLatency(Coefficients(50.0, 1.0, 0.0), STEP.decode, STEP.large_decode, STEP.large_rows)
    for name, latency, threads in (("one", slow, 1), ("two", STEP, 2)):
        setting = Setting(device="cpu", threads=threads)
        write_profile(profile(latency, setting=setting), tmp_path / f"{name}.json")
    (tmp_path / "cluster.yaml").write_text(LINKED)
    both = [flag for name in ("one", "two") for flag in ("--profile", str(tmp_path / f"{name}.json"))]
    slo = ("--slo", "ttft=100,tpot=20")
    known = ("small", *both, "--topology", tmp_path / "cluster.yaml", *slo, *LENGTHS)
    found = planned(*known, "--out", tmp_path / "serve.yaml")
    names = {entry["name"] for entry in found["ranking"]}
    assert any("prefill cpu TP1 of 2 cores + " in name and "decode cpu TP1," in name for name in names)
    assert found["chosen"]["name"].startswith("1 prefill cpu TP1 of 2 cores + 1 decode cpu TP1, together on a node")
    prefill, decode = groups_of(load(tmp_path / "serve.yaml", {}))
    assert (prefill.workers, prefill.config.cluster.cpus_per_worker) == (1, 2.0)
    assert (decode.workers, decode.config.cluster.cpus_per_worker) == (1, 1.0)


def test_layouts_with_drafts_are_tried_if_asked_and_told_to_serve(files, tmp_path: Path) -> None:
    drafts = (
        "--speculation",
        "prompt_lookup",
        "--acceptance-length",
        "4",
        "--draft-tokens",
        "4",
        "--max-num-seqs",
        "32",
    )
    found = planned("small", *files, *SLO, *LENGTHS, *drafts, "--out", tmp_path / "serve.yaml")
    assert "with drafts" in found["chosen"]["name"]
    config = load(tmp_path / "serve.yaml", {})
    assert (config.speculation.drafter, config.speculation.budget) == (("prompt_lookup",), 4)


def test_the_table_says_why_and_ranks(files) -> None:
    text = run("small", *files, *SLO, *LENGTHS)
    for part in ("chosen: ", "why: ", "disaggregate or not: ", "attainment ", "95 % interval", "cpu TP1 measured"):
        assert part in text


def test_requests_that_were_never_measured_are_warned_of_with_the_range(files) -> None:
    found = planned("small", *files, "--slo", "ttft=5000,tpot=500", "--lengths", "prompt=2000,output=20")
    assert any("sequences of 2020 tokens, and none longer than 1025" in warning for warning in found["warnings"])


def test_a_profile_whose_fit_is_off_is_warned_of(files, tmp_path: Path) -> None:
    write_profile(disturbed(), tmp_path / "profile.json")
    found = planned("small", *files, "--slo", "ttft=5000,tpot=500", *LENGTHS)
    assert any("something else computed meanwhile" in warning for warning in found["warnings"])


def test_requests_that_the_model_cannot_take_are_left_out_and_counted(files, tmp_path: Path) -> None:
    rows = [f"{i},{9000 if i == 7 else 200},20" for i in range(50)]
    (tmp_path / "t.csv").write_text("\n".join(["arrived_at,num_prefill_tokens,num_decode_tokens", *rows]))
    found = planned("small", *files, *SLO, "--trace", tmp_path / "t.csv")
    assert "1 of 50 requests are left out: they have more than the 4096 tokens of the model" in found["warnings"]


def test_profiles_of_different_weights_do_not_go_together(files, tmp_path: Path) -> None:
    other = profile(setting=Setting(device="cpu", threads=2))
    facts = replace(other.model, dtype="float32")
    write_profile(replace(other, model=facts), tmp_path / "other.json")
    with pytest.raises(ConfigError, match="--profile: two differ in dtype: bfloat16 and float32"):
        run("small", *files, "--profile", tmp_path / "other.json", *SLO, *LENGTHS)


def test_a_profile_of_another_machine_is_warned_of() -> None:
    setting = Setting(device="cpu", hardware={"device": "An Abacus", "cores": 4096}, versions={"torch": "0.1"})
    said = measured_elsewhere([profile(setting=setting)])
    assert [sentence.split(", and")[0] for sentence in said] == [
        "profiled with torch 0.1",
        "profiled with device An Abacus",
        "profiled with cores 4096",
    ]


def test_devices_that_are_not_at_hand_are_planned_for_by_a_roofline_that_is_marked(large: Path) -> None:
    flags = ("--device", "H100", "--devices", 4, "--slo", "ttft=500,tpot=30", *LENGTHS)
    found = planned(large, *flags)
    assert set(found["sources"].values()) == {"roofline"}
    assert any("is a roofline, not measured" in warning for warning in found["warnings"])
    assert found["chosen"]["devices"] <= 4


def test_prompts_that_a_cache_has_a_part_of_are_served_more_of(files) -> None:
    plain, cached = (
        planned("small", *files, *SLO, "--lengths", f"prompt=200,output=20,cv=0.3{more}")
        for more in ("", ",cached=0.7")
    )
    assert cached["chosen"]["goodput_rps"] > 1.2 * plain["chosen"]["goodput_rps"]


def test_targets_by_percentile_and_of_all_of_a_request_are_planned_for_and_told(files) -> None:
    slo = ("--slo", "ttft=400@p97,tpot=60,e2e=900@p50")
    found = planned("small", *files, *slo, *LENGTHS)
    assert (found["e2e_ms"], found["percentiles"]) == (900.0, {"ttft": 97.0, "e2e": 50.0})
    reached = {name: found["predicted"][f"{name}_met"]["mean"] for name in ("ttft", "tpot", "e2e")}
    assert reached["ttft"] > 0.95
    assert 0.45 < reached["e2e"] < 1.0
    told = run("small", *files, *slo, *LENGTHS)
    assert "targets: TPOT 60 ms for 90% of requests, TTFT 400 ms for 97%, E2E 900 ms for 50%" in told
    assert re.search(r"of all targets; alone TTFT (9\d|100)", told)
    plain = planned("small", *files, *SLO, *LENGTHS)
    assert (plain["e2e_ms"], plain["percentiles"]) == (None, {})
    assert found["chosen"]["goodput_rps"] < plain["chosen"]["goodput_rps"]


def test_why_no_disaggregated_layout_will_do_is_listed(files, tmp_path: Path) -> None:
    """Over so slow a link the second token comes late; and one core is not enough for two workers."""
    (tmp_path / "cluster.yaml").write_text(LINKED.replace("gb_per_s: 10", "gb_per_s: 0.001"))
    found = planned("small", *files, *SLO, *LENGTHS)
    assert found["verdict"].startswith("colocate: disaggregated, no layout attains")
    assert set(found["refused"]) == {f"cpu TP1 + cpu TP1, chunks of {chunk}" for chunk in (512, 2048)}
    assert all(" TPOT is " in why for why in found["refused"].values())
    assert "infeasible: cpu TP1 + cpu TP1, chunks of 512" in run("small", *files, *SLO, *LENGTHS)
    (tmp_path / "cluster.yaml").write_text(LINKED.replace("devices: 4", "devices: 1"))
    told = run("small", *files, *SLO, *LENGTHS)
    assert "infeasible: layouts apart: 1 cpu to serve with have no room for a group to prefill and" in told


def test_a_model_that_fits_nowhere_is_refused_with_the_numbers(large: Path, tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text("nodes: [{name: a, device: RTX4090, devices: 1, memory_gb: 12}]")
    with pytest.raises(ConfigError, match=r"fits nowhere: RTX4090 TP1: 16\.1 GB of weights .* the 10\.8 GB that 1 dev"):
        run(large, "--topology", tmp_path / "small.yaml", *SLO, *LENGTHS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--slo", "ttft=1,tpot=1", *LENGTHS), "without load the best is TTFT .* and TPOT"),
        ((*SLO, *LENGTHS, "--rate", "10000"), r"no layout on 4 devices attains .* the most is"),
        (("--slo", "ttft=400@p95,tpot=60@p90", "--share", 0.8, *LENGTHS), "--share: each target .* leave --share out"),
        (SLO, "give a --trace, or --lengths"),
        ((*SLO, *LENGTHS, "--trace", "x.csv"), "give a --trace, or --lengths"),
        ((*SLO, "--trace", "x.csv", "--burstiness", "0.5"), "--burstiness is for --lengths: a trace has a rhythm"),
        ((*SLO, *LENGTHS, "--device", "H100"), "--device stands for a profile and a topology"),
        ((*SLO, *LENGTHS, "--speculation", "prompt_lookup"), "the profile does not know it; profile with"),
        ((*SLO, *LENGTHS, "--speculation", "magic", "--acceptance-length", "2"), "no drafter is called 'magic'"),
        ((*SLO, *LENGTHS, "--speculation", "ngram", "--draft-ms", "3"), "--draft-ms has no meaning without --acc"),
        ((*SLO, *LENGTHS, "--draft-tokens", "8"), "--draft-tokens has no meaning without --acceptance-length"),
        ((*SLO, *LENGTHS, "--chunk-tokens", "512;x"), "--chunk-tokens: '512;x' is not a list of sizes"),
        ((*SLO, *LENGTHS, "--chunk-tokens", "51²"), "--chunk-tokens: '51²' is not a list of sizes"),
        ((*SLO, "--lengths", "prompt=5000,output=5"), "the workload is empty"),
        ((*SLO, *LENGTHS, "--learner-devices", "gpu=1"), "'gpu=1' is no number of devices, nor KIND=NUMBER of 4 cpu"),
        ((*SLO, *LENGTHS, "--learner-devices", "-1"), "'-1' is no number of devices, nor KIND=NUMBER of 4 cpu"),
    ],
)
def test_what_cannot_be_is_refused_with_what_to_do(files, arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run("small", *files, *arguments)


def test_a_profile_of_another_model_is_refused(files) -> None:
    with pytest.raises(ConfigError, match="--profile: it is of small, not of demo"):
        run("demo", *files, *SLO, *LENGTHS)


def test_prices_are_asked_for_where_they_count(files, tmp_path: Path) -> None:
    assert planned("small", *files, *SLO, *LENGTHS, "--objective", "per-dollar")["chosen"]["dollars_per_hour"] > 0
    (tmp_path / "cluster.yaml").write_text(LINKED.replace(", dollars_per_hour: 2", ""))
    with pytest.raises(ConfigError, match="dollars_per_hour is missing in the topology"):
        run("small", *files, *SLO, *LENGTHS, "--objective", "per-dollar")
