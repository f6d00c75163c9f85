"""What may be asked of replanning, and what is refused before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cluster.config.loading import load
from cluster.config.tree import SlipstreamConfig
from cluster.groups import group_of, groups_of
from cluster.hardware import of_cores
from cluster.replan_setup import (
    Grounds,
    arrangement_as_configured,
    grounds_of,
    predictor_of,
    read_files,
    replanner_of,
)
from cluster.resources import share_out
from core.errors import ConfigError
from core.types import Role
from placement.arranged import Simulated, simulated
from placement.arrangement import Arrangement
from placement.latency import Speculation
from placement.outcome import Targets
from placement.profile import Drafting, Setting, write_profile
from placement.shaped import Shaped
from placement.traffic import Period
from placement.worker_shape import WorkerShape
from tests.placement.profiles import disturbed, profile


@pytest.fixture
def made(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    write_profile(profile(), path)
    return path


def config(path: Path, **settings: Any) -> SlipstreamConfig:
    given = {
        "model": "small",
        "device": "cpu",
        "replan": "on",
        "replan_profile": path,
        "replan_slo": "ttft=900,tpot=40",
    }
    return load(None, given | settings)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replan": "on"}, "replan on needs a replan slo: give one, such as ttft=200,tpot=50"),
        ({"replan": "advise", "replan_slo": "ttft=1,tpot=1"}, "replan advise needs a replan profile"),
        ({"replan_interval": 3.0}, "interval has no meaning while replan is off"),
        ({"replan": "off", "replan_slo": "ttft=1,tpot=1"}, "slo has no meaning while replan is off"),
        ({"replan": "on", "replan_slo": "ttft=1", "replan_profile": "p.json"}, "has no tpot"),
        (
            {"replan": "on", "replan_slo": "ttft=1,tpot=1@p95", "replan_profile": "p.json"},
            "--slo: tpot has @p95: replanning has one share, of requests that meet all targets; leave percentiles out",
        ),
        ({"replan": "on", "replan_slo": "ttft=1,tpot=1", "replan_profile": "p", "replan_chunk_tokens": "a"}, "'a' is"),
        (
            {"replan": "on", "replan_slo": "ttft=1,tpot=1", "replan_profile": "p", "replan_max_workers": 1},
            "replan.max_workers 1 is below the 2 workers to begin with",
        ),
        (
            {
                "replan": "on",
                "replan_slo": "ttft=1,tpot=1",
                "replan_profile": "p",
                "prefill_tensor_parallel_size": 2,
            },
            "replan on changes roles, and prefill and decode workers differ in shape (prefill_tensor_parallel_size, ",
        ),
    ],
)
def test_what_is_missing_or_has_no_meaning_is_refused_by_name(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(None, given)
    assert message in caught.value.message


@pytest.mark.parametrize(("word", "mode"), [("off", "off"), ("'off'", "off"), ("advise", "advise"), ("on", "on")])
def test_a_file_may_have_on_and_off_without_quotes(tmp_path: Path, word: str, mode: str) -> None:
    path = tmp_path / "serve.yaml"
    rest = "" if mode == "off" else ', slo: "ttft=1,tpot=1", profile: p.json'
    path.write_text(f"replan: {{mode: {word}{rest}}}")
    assert load(path, {}).replan.mode == mode


def test_files_are_found_from_wherever_a_process_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    found = config(Path("p.json"), traffic_log="log.jsonl", replan_warm_start="old.jsonl")
    assert found.replan.profile == tmp_path / "p.json"
    assert (found.gateway.traffic_log, found.replan.warm_start) == (tmp_path / "log.jsonl", tmp_path / "old.jsonl")


def test_cores_are_shared_out_among_all_workers_that_there_may_come_to_be(made: Path) -> None:
    assert share_out(config(made), 4.0, 0.0)[0].cpus == 2.0
    assert share_out(config(made, replan_max_workers=4), 4.0, 0.0)[0].cpus == 1.0
    with pytest.raises(ConfigError, match=r"4 workers of 2 CPUs each do not fit on 4"):
        share_out(config(made, replan_max_workers=4, cpus_per_worker=2.0), 4.0, 0.0)


@pytest.mark.parametrize(
    ("settings", "threads", "message"),
    [
        ({"model": "large"}, 1, "has model small, and the workers have large"),
        ({"tensor_parallel_size": 2}, 1, "has tensor_parallel_size 1, and the workers have 2"),
        ({"quantization": "int8"}, 1, "has quantization None, and the workers have int8"),
        ({}, 2, "has threads 1, and the workers have 2"),
        ({"device": "cuda"}, 1, "it is of cpu, and the workers compute on cuda"),
    ],
)
def test_a_profile_of_other_workers_is_refused(
    made: Path, settings: dict[str, Any], threads: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        grounds_of(config(made, **settings), threads)
    assert message in caught.value.message


def test_workers_that_draft_are_predicted_to_draft_and_a_profile_has_to_know_how_well(tmp_path: Path) -> None:
    drafts = Drafting(
        drafter="hybrid",
        prompts="random",
        budget=4,
        acceptance_length=2.5,
        rows=4.2,
        draft_ms=1.0,
        draft_sequence_ms=0.5,
    )
    path = tmp_path / "drafting.json"
    write_profile(profile(drafting=(drafts,)), path)
    drafting = config(path, speculation="hybrid")
    grounds = grounds_of(drafting, 1)
    assert grounds is not None
    assert predictor_of(drafting, grounds).group.speculation == Speculation(2.5, 5, 1.0, 0.5)
    assert predictor_of(config(path), grounds).group.speculation is None
    with pytest.raises(ConfigError, match=r"knows nothing of drafts by suffix, .* profile with --speculation suffix"):
        grounds_of(config(path, speculation="suffix"), 1)


def test_workers_are_reckoned_once_at_the_start_and_what_is_extrapolated_of_them_is_said(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reckoned: list[Simulated] = []

    def counted(*given: Any, **options: Any) -> Simulated:
        reckoned.append(simulated(*given, **options))
        return reckoned[-1]

    monkeypatch.setattr("cluster.replan_setup.simulated", counted)
    grounds_of(config(made, replan_max_workers=9), 1)
    assert len(reckoned) == 1
    assert "replan.profile: 9 workers on one machine are extrapolated" in caplog.text


def test_workers_on_cores_are_reckoned_with_cores_although_there_are_gpus(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.hardware._nvidia_smi", lambda *_: "NVIDIA H100 80GB HBM3, 81559\n")
    grounds = grounds_of(config(made, device="cpu"), 1)
    assert grounds is not None
    assert set(grounds.topology.pools) == {"cpu"}


@pytest.mark.parametrize("gpus", [0, 8])
def test_the_nodes_of_a_cluster_that_is_joined_are_what_there_is(
    gpus: int, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "NodeID": "n", "NodeManagerAddress": "10.0.0.1"}
    resources = {"CPU": 16.0, "GPU": float(gpus), "memory": 64e9, "accelerator_type:H100": 1.0}
    monkeypatch.setattr("ray.nodes", lambda: [node | {"Resources": resources}, node | {"Resources": resources}])
    grounds = grounds_of(config(made, device="cpu", ray_address="auto"), 1)
    assert grounds is not None
    assert grounds.topology.pools == {"cpu": 32}


def test_it_is_said_when_there_is_nothing_that_replanning_could_change(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = {"colocated": True, "decode_replicas": 1}
    grounds_of(config(made, **alone), 1)
    assert "nothing can be changed while there is no other way to use 1 worker: allow more" in caplog.text
    caplog.clear()
    grounds_of(config(made, **alone, replan_chunk_tokens="256"), 1)
    grounds_of(config(made, **alone, replan_max_workers=2), 1)
    grounds_of(config(made), 1)
    assert "nothing can be changed" not in caplog.text


def test_a_season_is_learnt_by_the_forecasts_that_can(made: Path) -> None:
    with pytest.raises(ConfigError, match="season has no meaning with forecast kalman: take holt-winters or prophet"):
        config(made, replan_forecast="kalman", replan_season=3600.0)
    short = config(made, replan_forecast="holt-winters", replan_season=40.0)
    with pytest.raises(
        ConfigError, match=r"replan\.season 40: it is two periods .* one is 30 s; lower replan\.interval"
    ):
        grounds_of(short, 1)
    ahead = []
    for season in (None, 120.0):
        found = config(made, replan_forecast="holt-winters", replan_season=season)
        grounds = grounds_of(found, 1)
        assert grounds is not None
        before = [Period(rate=rate, prompt=100.0, output=50.0) for rate in (1.0, 1.0, 1.0, 9.0) * 12]
        ahead.append(replanner_of(found, replace(grounds, before=tuple(before))).traffic._rate.ahead(4))
    assert ahead[0] < 6.0 < ahead[1]


@pytest.mark.parametrize("setting", ["profile", "further_profiles", "warm_start"])
def test_files_that_cannot_be_read_are_named_by_their_setting(made: Path, tmp_path: Path, setting: str) -> None:
    missing = tmp_path / "none.csv"
    with pytest.raises(ConfigError, match=rf"replan\.{setting}: .*none\.csv can't be read"):
        read_files(config(made, replan_shapes="1x1,2x1", **{f"replan_{setting}": str(missing)}))


def test_nothing_is_read_while_nobody_replans() -> None:
    assert grounds_of(load(None, {}), 1) is None


def test_the_replanner_begins_with_the_workers_as_configured_and_is_paced_by_the_interval(made: Path) -> None:
    settings = {"prefill_replicas": 2, "replan_interval": 2.0, "replan_chunk_tokens": "512", "replan_max_workers": 5}
    found = config(made, **settings)
    replanner = replanner_of(found, Grounds(profile(), of_cores(4, 32 * 10**9, 10.0), ()))
    assert replanner.arrangement == Arrangement(2, 1, 0, 2048)
    assert replanner.settings.goal.targets == Targets(900.0, 40.0)
    assert (replanner.settings.reactive_s, replanner.settings.predictive_s) == (2.0, 12.0)
    assert (replanner.settings.chunk_tokens, replanner.settings.most_workers) == ((512, 2048), 5)


def test_steps_are_those_of_whoever_computes_prompts(made: Path) -> None:
    both = config(made, colocated=True, decode_replicas=3)
    assert arrangement_as_configured(both) == Arrangement(0, 0, 3, 512)


def test_steps_that_a_plan_has_changed_have_room_for_a_token_of_every_sequence() -> None:
    engine = load(None, {"max_num_seqs": 32}).engine
    assert engine.batched_tokens(Role.PREFILL) == 2048
    assert engine.batched_tokens(Role.PREFILL, 256) == 256
    assert engine.batched_tokens(Role.DECODE, 8) == 32


def test_a_warm_start_from_long_ago_is_refused_by_its_setting(made: Path, tmp_path: Path) -> None:
    trace = tmp_path / "old.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n0,10,10\n1e9,10,10\n")
    with pytest.raises(ConfigError, match=r"replan\.warm_start: the earlier trace is of .* times of 30 s"):
        grounds_of(config(made, replan_warm_start=trace), 1)


def test_what_workers_may_come_to_do_unlike_those_that_were_profiled_is_warned_of(
    made: Path, caplog: pytest.LogCaptureFixture
) -> None:
    grounds_of(config(made, max_num_seqs=32, max_num_batched_tokens=512), 1)
    assert "may have steps" not in caplog.text
    grounds_of(config(made, max_num_seqs=64, max_num_batched_tokens=2048), 1)
    assert "replan.profile: workers are extrapolated: they may have steps with 64 sequences that decode" in caplog.text
    assert "they may have steps with 2048 tokens of prompts, and no more than 1024 were measured" in caplog.text


def test_a_profile_of_another_machine_is_warned_of(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_profile(profile(setting=Setting(device="cpu", versions={"torch": "1.0"})), made)
    grounds_of(config(made), 1)
    assert "replan.profile: profiled with torch 1.0, and here it is" in caplog.text


def test_a_warm_start_that_is_no_trace_is_refused(made: Path, tmp_path: Path) -> None:
    trace = tmp_path / "old.jsonl"
    trace.write_text("")
    with pytest.raises(ConfigError, match="empty trace"):
        grounds_of(config(made, replan_warm_start=trace), 1)


def test_a_profile_whose_fit_is_off_is_warned_of(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    grounds_of(config(made), 1)
    assert "the fit of the profile" not in caplog.text
    write_profile(disturbed(), made)
    grounds_of(config(made), 1)
    assert "replan.profile: the fit of the profile with 1 cpu a stage is off by" in caplog.text


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def made_for_two(tmp_path: Path) -> Path:
    path = tmp_path / "two.json"
    write_profile(profile(setting=Setting(device="cpu", tp=2)), path)
    return path


ONE, TWO = WorkerShape(1, 1), WorkerShape(2, 1)
SHAPES = {"replan_shapes": "1x1,2x1", "colocated": True, "decode_replicas": 3}


def test_a_cluster_whose_shapes_may_change_has_a_group_of_each_and_shares_devices_out_once(made: Path) -> None:
    found = config(made, **SHAPES)
    one, two = groups_of(found)
    assert [(group.name, group.workers, group.most) for group in (one, two)] == [
        ("worker-tp1-pp1", 3, 3),
        ("worker-tp2-pp1", 0, 1),
    ]
    assert two.config.engine.tensor_parallel_size == 2
    assert group_of(found, Role.BOTH) == one
    assert group_of(found, Role.BOTH, TWO) == two
    assert [share.cpus for share in share_out(found, 6.0, 0.0)] == [2.0, 4.0]
    assert [share.gpus for share in share_out(config(made, **SHAPES, device="cuda"), 6.0, 3.0)] == [1, 2]
    with pytest.raises(ConfigError, match=r"3 workers need a GPU each or 1 workers need 2 GPUs each and the cluster"):
        share_out(config(made, **SHAPES, device="cuda"), 6.0, 2.0)
    with pytest.raises(ConfigError, match=r"3 workers of 3 CPUs each or 1 workers of 6 CPUs each do not fit on 6"):
        share_out(config(made, **SHAPES, cpus_per_worker=3.0), 6.0, 0.0)


def test_a_shape_that_there_are_no_devices_for_is_not_deployed(made: Path) -> None:
    found = config(made, **SHAPES | {"replan_shapes": "1x1,2x1,4x1"})
    assert [group.shape for group in groups_of(found)] == [ONE, TWO]


def test_more_workers_are_reckoned_in_those_as_configured(made: Path) -> None:
    grown = config(made, **SHAPES | {"replan_max_workers": 5})
    assert (grown.most_devices, grown.most_workers) == (5, 5)
    large = config(made, **SHAPES | {"replan_max_workers": 4, "tensor_parallel_size": 2})
    assert (large.most_devices, large.most_workers) == (8, 8)


def test_prefill_workers_may_begin_with_another_shape_where_shapes_may_change(made: Path) -> None:
    found = config(made, replan_shapes="1x1,2x1", prefill_tensor_parallel_size=2)
    assert arrangement_as_configured(found) == Arrangement(1, 1, 0, 2048, TWO, ONE)
    assert [(group.shape, group.workers) for group in groups_of(found)] == [(ONE, 1), (TWO, 1)]
    cores = {"cpus_per_worker": 2.0, "prefill_cpus_per_worker": 4.0}
    planned = config(made, replan_shapes="1x1,2x1", prefill_tensor_parallel_size=2, **cores)
    assert [group.config.cluster.cpus_per_worker for group in groups_of(planned)] == [2.0, 4.0]


def test_every_shape_needs_a_profile_of_its_tp(made: Path, made_for_two: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"replan.shapes: shape 2x1: no profile is of TP 2, only of 1; make one with "
    ):
        grounds_of(config(made, **SHAPES), 1)
    found = config(made, **SHAPES, replan_further_profiles=str(made_for_two))
    grounds = grounds_of(found, 1)
    assert grounds is not None
    workers = predictor_of(found, grounds)
    assert isinstance(workers, Shaped)
    assert {*workers.of} == {ONE, TWO}
    replanner = replanner_of(found, grounds)
    assert replanner.arrangement == Arrangement(0, 0, 3, 512, ONE, ONE)
    assert (replanner.settings.shapes, replanner.settings.devices) == ((ONE, TWO), 3)
    stages = config(made, **SHAPES | {"replan_shapes": "1x1,1x2"})
    assert grounds_of(stages, 1) is not None, "PP is reckoned from the profile of its TP"


def test_profiles_of_unlike_workers_are_refused(made: Path, tmp_path: Path) -> None:
    other = profile(setting=Setting(device="cpu", tp=2))
    path = tmp_path / "other.json"
    write_profile(replace(other, model=replace(other.model, fingerprint="bad")), path)
    with pytest.raises(ConfigError, match="profiles of unlike workers: fingerprint f00 and bad"):
        grounds_of(config(made, **SHAPES, replan_further_profiles=str(path)), 1)


def test_it_is_said_when_no_way_leads_to_another_shape(
    made: Path, made_for_two: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = {"decode_replicas": 1, "replan_further_profiles": str(made_for_two)}
    grounds_of(config(made, **SHAPES | one), 1)
    assert "nothing can be changed" in caplog.text
    caplog.clear()
    grounds_of(config(made, **SHAPES | one | {"decode_replicas": 3}), 1)
    assert "nothing can be changed" not in caplog.text


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replan_shapes": "2x1"}, "replan.shapes 2x1: the workers begin with 1x1; name it too"),
        ({"replan_shapes": "1x1,2"}, "'2' is no TP and PP; write them as 1x1,2x1"),
        ({"replan_shapes": "1x1,2x1", "workers_per_node": 2}, "workers_per_node is of workers of one shape"),
        (
            {"replan_shapes": "1x1", "cpus_per_worker": 1.0, "prefill_cpus_per_worker": 2.0},
            "devices of prefill workers have other cores than those of the others",
        ),
        ({"replan_further_profiles": "a.json"}, "further_profiles has no meaning without replan shapes"),
    ],
)
def test_shapes_that_have_no_meaning_are_refused_by_name(made: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config(made, **given)
    assert message in caught.value.message
