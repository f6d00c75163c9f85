"""`slipstream serve --slo`: a layout for this machine from targets, and what it says on the way."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from click.testing import CliRunner
from msgspec.structs import replace
from transformers import LlamaForCausalLM

from cluster import by_targets, machine, stored_profiles
from cluster.by_targets import Asked, config_for
from cluster.cli import cli
from cluster.config.loading import load as load_config
from cluster.config.replan import ReplanSection
from cluster.config.tree import SlipstreamConfig
from cluster.hardware import of_cores
from cluster.local import local_cluster
from cluster.replan_setup import Grounds, grounds_of, replanner_of
from cluster.stored_profiles import Settings, Way, profile_arguments, profile_of, ways
from core.compiler import cache_root
from core.errors import ConfigError
from core.types import Role
from engine.model_config import ModelConfig
from placement.latency import Coefficients, StepLatency
from placement.native import load
from placement.profile import Drafting, Setting, read_profile, write_profile
from placement.topology import NodeKind, Topology, Wire
from placement.worker_shape import WorkerShape
from tests.cluster.test_live_changes import Load, all_free, job, right, until
from tests.placement.profiles import disturbed, points, profile
from tests.placement.traces import by_turns
from tests.tiny import save_byte_tokenizer, save_tiny_llama

SLO = "ttft=500,tpot=60"
LENGTHS = "prompt=100,output=20,cv=0.3"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny-llama")
    save_tiny_llama(folder)
    save_byte_tokenizer(folder)
    return folder


TOKENS = {"hybrid": 3.0, "prompt_lookup": 1.0, "draft_model": 3.0}
"""That a step brings with drafts."""


ANY_OF_A_CORE = [Way(1, 1, 3), Way(2, 1, 1)]
"""Of four cores, for four workers."""
LATENCY: dict[int, StepLatency] = {}
"""Of workers by TP, where it is another."""


def drafts(name: str) -> Drafting:
    return Drafting(
        drafter=name,
        prompts="random",
        budget=4,
        acceptance_length=TOKENS[name],
        rows=5.0,
        draft_ms=1.0,
        draft_sequence_ms=0.1,
    )


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Way]:
    """A machine of two cores with a cache of its own, whose steps take what a latency model says. The ways that were
    measured, in order."""
    found: list[Way] = []

    def measure(folder: Path, way: Way, device: str, settings: Settings, path: Path) -> None:
        found.append(way)
        path.parent.mkdir(parents=True, exist_ok=True)
        setting = Setting(device=device, tp=way.tp, threads=way.threads, beside=way.beside)
        known = profile(setting=setting, **({"points": points(LATENCY[way.tp])} if way.tp in LATENCY else {}))
        drafting = tuple(drafts(name) for name in settings.get("speculation", ()))
        named = replace(known.model, name=str(folder), weight_bytes=10**6)
        write_profile(replace(known, model=named, drafting=drafting), path)

    load()  # what is compiled once for a machine stays where it is
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "native").symlink_to(cache_root() / "native")
    monkeypatch.setenv("SLIPSTREAM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stored_profiles, "_measure", measure)
    monkeypatch.setattr(by_targets, "topology_here", lambda on_cpu=False: of_cores(2, 8 * 10**9, 10.0))
    return found


def config(
    folder: Path, asked: Asked | None = None, file: Path | None = None, **flags: Any
) -> tuple[SlipstreamConfig, str]:
    """And what was said."""
    said: list[str] = []
    found = config_for(asked or Asked(SLO, lengths=LENGTHS), file, {"model": str(folder)} | flags, said.append)
    return found, "\n".join(said)


def test_the_layout_is_planned_predicted_and_fits_the_machine(folder: Path, measured: list[Way]) -> None:
    found, said = config(folder)
    assert found.model == str(folder)
    assert found.cluster.num_workers * (found.cluster.cpus_per_worker or 0) == 2
    assert "disaggregate or not: " in said
    assert "attainment " in said
    assert measured == [Way(1, 2, 0), Way(1, 1, 1)]


def test_the_configuration_of_the_model_is_read_once(
    folder: Path, measured: list[Way], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, from_folder = [], ModelConfig.from_folder
    monkeypatch.setattr(ModelConfig, "from_folder", lambda path: read.append(path) or from_folder(path))
    config(folder)
    assert read == [folder]


def test_what_means_nothing_without_hand_offs_is_no_reason_to_refuse_a_plan_without_them(
    folder: Path, measured: list[Way]
) -> None:
    found, said = config(folder, kv_codec="fp8")
    assert found.cluster.colocated == ("nothing is handed over in this layout, so kv_codec will do nothing" in said)
    assert (found.cluster.kv_codec == "fp8") != found.cluster.colocated


def test_what_was_measured_once_is_kept_until_something_changes(folder: Path, measured: list[Way], tmp_path) -> None:
    first, _ = config(folder)
    again, said = config(folder)
    assert first == again
    assert "measuring" not in said
    assert len(measured) == 2
    config(folder, dtype="float32")
    assert len(measured) == 4
    for file in (tmp_path / "cache" / "profiles").iterdir():
        file.write_text("{")
    _, said = config(folder)
    assert said.count("the stored profile is of no use: ") == 2
    assert len(measured) == 6


@pytest.mark.parametrize(("device", "serving"), [("cpu", True), ("H100", False)])
def test_what_serving_adds_is_measured_where_it_can_be(tmp_path: Path, device: str, serving: bool) -> None:
    settings = {"kv_cache_memory": ("1GiB",), "speculation_weights": ("a=/a", "b=/b")}
    arguments = profile_arguments(tmp_path, Way(2), device, settings, tmp_path / "profile.json")
    assert ("--serving" in arguments) is serving
    assert {"--quick", "--tensor-parallel-size", "--kv-cache-memory"} <= set(arguments)
    assert arguments[-4:] == ["--speculation-weights", "a=/a", "--speculation-weights", "b=/b"]


def test_a_profile_whose_fit_is_off_is_warned_of(folder: Path, measured: list[Way], monkeypatch) -> None:
    _, said = config(folder)
    assert "warning: the fit" not in said
    monkeypatch.setitem(globals(), "profile", disturbed)
    _, said = config(folder, Asked("ttft=5000,tpot=500", lengths=LENGTHS), dtype="float32")
    assert "warning: the fit of the profile with 1 cpu a stage is off by" in said


def test_another_model_or_version_has_a_profile_of_its_own(measured: list[Way], tmp_path: Path, monkeypatch) -> None:
    def ask(fingerprint: str) -> Path:
        return profile_of(tmp_path, "m", fingerprint, Way(1), "cpu", {}, lambda _: None).path

    paths = [ask("f00"), ask("f00"), ask("f01")]
    monkeypatch.setattr(machine, "version", lambda name: "99.0")
    paths.append(ask("f00"))
    assert (len(set(paths)), len(measured)) == (3, 3)


def test_a_rate_is_served_as_cheaply_as_it_can_be(folder: Path, measured: list[Way]) -> None:
    found, said = config(folder, Asked(SLO, lengths=LENGTHS, rate=1.0))
    assert "it is the cheapest that attains the targets at 1 requests/s" in said
    assert found.cluster.num_workers == 1


def test_without_a_workload_it_says_what_it_plans_for(folder: Path, measured: list[Way]) -> None:
    _, said = config(folder, Asked("ttft=5000,tpot=500"))
    assert "no --trace and no --lengths: planning for requests with prompt=512,output=128,cv=1" in said


def test_what_is_said_otherwise_stays_as_it_was_said(folder: Path, measured: list[Way], tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("engine: {max_num_seqs: 32}\ngateway: {port: 1234}")
    found, _ = config(folder, file=tmp_path / "more.yaml", dtype="float32", seed=7)
    assert (found.engine.max_num_seqs, found.gateway.port, found.gateway.seed) == (32, 1234, 7)
    assert found.engine.dtype == "float32"


def test_replanning_goes_by_the_same_targets_and_profile(folder: Path, measured: list[Way]) -> None:
    found, _ = config(folder, replan="advise")
    assert found.replan.slo == SLO
    assert found.replan.profile is not None
    assert Path(found.replan.profile).is_file()


def gpus(count: int) -> Topology:
    node = NodeKind(name="here", device="H100", devices=count, memory_gb=80)
    return Topology(nodes=(node,), links=(Wire(within="here", gb_per_s=450),))


def test_replanning_may_change_to_the_shapes_that_the_plan_knew_and_no_flag_is_needed(
    folder: Path, measured: list[Way], monkeypatch
) -> None:
    monkeypatch.setattr(by_targets, "topology_here", lambda on_cpu=False: gpus(4))
    found, said = config(folder, replan="on")
    shape = found.shape_of(Role.BOTH)
    assert found.replan.worker_shapes[0] == shape
    assert {*found.replan.worker_shapes} >= {WorkerShape(1, 1), WorkerShape(2, 1), WorkerShape(1, 2), WorkerShape(4, 1)}
    assert all(one.devices <= 4 for one in found.replan.worker_shapes)
    assert f"workers may change to {shape}, " in said
    assert found.replan.profile is not None
    own, *further = map(read_profile, (found.replan.profile, *found.replan.further_profiles))
    replanner = replanner_of(found, Grounds(own, gpus(4), (), tuple(further)))
    assert replanner.settings.shapes == found.replan.worker_shapes
    assert measured == [Way(1), Way(2), Way(4)]
    assert config(folder)[0].replan == ReplanSection()


def test_pipelines_are_tried_on_gpus_of_models_that_can_be_split(folder: Path) -> None:
    model, by_its_class = ModelConfig.from_folder(folder), cast("ModelConfig", SimpleNamespace(architecture="Other"))
    assert by_targets._stages(gpus(4), model) == (1, 2), "it has three layers"
    assert by_targets._stages(gpus(4), by_its_class) == (1,)
    assert by_targets._stages(of_cores(4, 8 * 10**9, 10.0), model) == (1,)


@pytest.mark.parametrize(("shapes", "known"), [("1x1", [Way(1)]), ("2x1,1x1", [Way(1), Way(2)]), ("1x2,1x1", [Way(1)])])
def test_shapes_that_are_named_limit_what_is_measured_planned_and_changed_to(
    folder: Path, measured: list[Way], monkeypatch, shapes: str, known: list[Way]
) -> None:
    monkeypatch.setattr(by_targets, "topology_here", lambda on_cpu=False: gpus(4))
    found, _ = config(folder, replan="on", replan_shapes=shapes)
    assert measured == known
    assert ",".join(found.replan.shapes) == shapes
    assert found.shape_of(Role.BOTH) in found.replan.worker_shapes
    with pytest.raises(ConfigError, match="--replan-shapes: --slo tries TP 1, 2, 4 here, and none of these is named"):
        config(folder, replan="on", replan_shapes="3x1")


def test_on_cores_workers_of_several_ranks_are_measured_where_some_may_change_to_them(
    folder: Path, measured: list[Way], monkeypatch
) -> None:
    monkeypatch.setattr(by_targets, "topology_here", lambda on_cpu=False: of_cores(4, 8 * 10**9, 10.0))
    found, _ = config(folder, replan="on", replan_max_workers=4)
    assert measured == ANY_OF_A_CORE, "and four workers have room of a core each only"
    assert (found.replan.shapes, found.cluster.cpus_per_worker) == (("1x1", "2x1"), 1.0)
    grounds = grounds_of(found, 1)
    assert grounds is not None
    replanner = replanner_of(found, grounds)
    assert (replanner.settings.shapes, replanner.settings.devices) == ((WorkerShape(1, 1), WorkerShape(2, 1)), 4)


@pytest.mark.asyncio
async def test_planned_by_targets_alone_it_changes_tp_when_traffic_drifts_and_no_request_is_lost(
    folder: Path, measured: list[Way], monkeypatch
) -> None:
    """By the profiles TP 1 does more short prompts, and TP 2 has longer ones in time."""
    for name in ("cluster.attendance.ANNOUNCE_PERIOD_S", "cluster.client.MEMBERS_PERIOD_S"):
        monkeypatch.setattr(name, 0.05)
    monkeypatch.setattr("cluster.replanning.LOOK_PERIOD_S", 0.1)
    decode = Coefficients(1.0, 0.0, 0.05)
    for tp, prompt in ((1, Coefficients(0.5, 0.0, 0.02)), (2, Coefficients(5.0, 0.1, 0.0))):
        monkeypatch.setitem(LATENCY, tp, StepLatency(prompt, decode, decode, 100))
    cores, model = of_cores(4, 8 * 10**9, 10.0), LlamaForCausalLM.from_pretrained(folder)
    monkeypatch.setattr(by_targets, "topology_here", lambda on_cpu=False: cores)
    asked = Asked("ttft=40,tpot=150", lengths="prompt=3,output=2")
    replan = {"replan": "on", "replan_max_workers": 4, "replan_interval": 0.2, "replan_horizon": 3600}
    sizes = {"dtype": "float32", "kv_cache_memory": "64MiB", "max_num_seqs": 8, "speculation": "none"}
    found, _ = config(folder, asked, **replan, **sizes)
    assert (found.cluster.num_workers, found.shape_of(Role.BOTH), measured) == (4, WorkerShape(1, 1), ANY_OF_A_CORE)
    paths = [found.replan.profile, *found.replan.further_profiles]
    own, *further = [read_profile(path) for path in paths if path is not None]
    replanner = replanner_of(found, Grounds(own, cores, (), tuple(further)))
    async with local_cluster(found, folder, replan=(replanner, "on")) as cluster:
        load = Load(cluster, at_once=1)
        await until(lambda: WorkerShape(2, 1) in map(cluster.shapes.get, cluster.nodes))
        await load.more()
        answers = await load.stop()
        await all_free(cluster)
    assert all(right(model, job(number), tokens) for number, tokens in answers.items())


@pytest.mark.parametrize("tokens", [1.0, 3.0])
def test_it_drafts_if_that_is_worth_it_and_says_so(folder: Path, measured: list[Way], monkeypatch, tokens) -> None:
    monkeypatch.setitem(TOKENS, "hybrid", tokens)
    found, said = config(folder)
    worth = tokens > 1.0
    assert found.speculation.drafter == (("hybrid",) if worth else ())
    assert f"with drafts or without: {'with' if worth else 'without'}: " in said
    assert f"a step brings {tokens:g} tokens for 5 rows" in said
    assert "about 20 s more" in said
    assert "--dataset takes" in said
    assert not worth or found.speculation.budget == 4


def test_who_says_who_drafts_is_heard(folder: Path, measured: list[Way]) -> None:
    found, said = config(folder, speculation="prompt_lookup", speculation_budget=3)
    assert (found.speculation.drafter, found.speculation.budget) == (("prompt_lookup",), 3)
    assert "with drafts or without" not in said
    found, said = config(folder, speculation="none")
    assert (found.speculation.drafter, "draft" in said) == ((), False)
    found, _ = config(folder, speculation="draft_model", speculation_weights=(f"draft_model={folder}",))
    assert found.speculation.weights == {"draft_model": str(folder)}
    with pytest.raises(ConfigError, match="--dataset: questions are for drafts, and there are to be none"):
        config(folder, Asked(SLO, lengths=LENGTHS, dataset=folder), speculation="none")


def test_drafts_are_measured_again_when_what_they_are_measured_with_has_changed(
    folder: Path, measured: list[Way], tmp_path: Path
) -> None:
    questions = tmp_path / "questions.jsonl"
    asked = Asked(SLO, lengths=LENGTHS, dataset=questions)
    with pytest.raises(ConfigError, match=r"questions\.jsonl can't be read: No such file"):
        config(folder, asked)
    questions.write_text("{}")
    _, said = config(folder, asked)
    assert "--dataset takes" not in said
    config(folder, asked)
    assert len(measured) == 2
    os.utime(questions, (0, 0))
    config(folder, asked)
    assert len(measured) == 4


def test_a_model_may_be_known_by_several_names_and_replanning_knows_it_by_the_one_that_is_served(
    folder: Path, measured: list[Way], tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(folder)
    for name in (folder, tmp_path / "link"):
        found, _ = config(name, Asked("ttft=5000,tpot=500", lengths=LENGTHS), device="cpu", replan="advise")
        grounds = grounds_of(found, round(found.cluster.cpus_per_worker or 0))
        assert grounds is not None
        assert grounds.profile.model.name == str(name)
    assert len(measured) == 2


def test_workers_that_replanning_may_start_have_room(folder: Path, measured: list[Way]) -> None:
    found, _ = config(folder, replan="on", replan_max_workers=2)
    assert (found.cluster.cpus_per_worker, measured) == (1, [Way(1, 1, 1)])
    with pytest.raises(ConfigError, match="--replan-max-workers 3: --slo plans for 2 workers here"):
        config(folder, replan="on", replan_max_workers=3)


@pytest.mark.parametrize(
    "flags",
    [
        {"prefill_replicas": 1},
        {"colocated": True},
        {"tensor_parallel_size": 1},
        {"max_num_batched_tokens": 512},
        {"ray_address": "auto"},
    ],
)
def test_what_the_targets_decide_cannot_be_given_too(folder: Path, measured: list[Way], flags: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"--slo decides {next(iter(flags))} by itself"):
        config(folder, **flags)
    assert measured == []


def test_percentiles_are_refused_beside_replanning_before_anything_is_measured(
    folder: Path, measured: list[Way]
) -> None:
    with pytest.raises(ConfigError, match="--slo: ttft has @p95: replanning has one share"):
        config(folder, Asked("ttft=500@p95,tpot=60", lengths=LENGTHS), replan="on")
    assert measured == []


def test_a_file_that_decides_is_refused_alike(folder: Path, measured: list[Way], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("cluster: {decode_replicas: 3}")
    with pytest.raises(ConfigError, match="--slo decides decode_replicas by itself"):
        config(folder, file=tmp_path / "c.yaml")


def test_a_model_that_fits_only_if_quantized_is_refused_only_if_not(folder: Path, measured: list[Way]) -> None:
    """Of 406 KB as it is stored, and 127 as int8."""
    room, one = of_cores(1, 300_000, 10.0), by_targets._Room(1, 1, ())
    model = ModelConfig.from_folder(folder)
    with pytest.raises(ConfigError, match=r"does not fit: 0\.000406 GB of weights, and there is room for 0\.\d+ GB"):
        by_targets._profiles(load_config(None, {"model": str(folder)}), folder, model, {}, room, one, False, str)
    quantized = load_config(None, {"model": str(folder), "quantization": "int8"})
    by_targets._profiles(quantized, folder, model, {}, room, one, False, str)
    assert measured == [Way(1, 1, 0)]


def test_prompts_of_a_trace_hit_no_more_than_the_machine_has_memory_for(folder, measured, tmp_path: Path) -> None:
    """Without hits they take 120 ms; two workers have memory for 6 of them."""
    few, many = (Asked("ttft=60,tpot=60", trace=by_turns(tmp_path, prompts)) for prompts in (4, 8))
    config(folder, few, kv_cache_memory="500000000")
    with pytest.raises(ConfigError, match="no layout attains ttft=60 ms"):
        config(folder, many, kv_cache_memory="500000000")


def test_targets_out_of_reach_are_answered_with_what_is_reachable(folder: Path, measured: list[Way]) -> None:
    with pytest.raises(ConfigError, match=r"ttft=1 ms and tpot=1 ms .* without load the best is TTFT [\d.]+ ms"):
        config(folder, Asked("ttft=1,tpot=1", lengths=LENGTHS))
    with pytest.raises(ConfigError, match="at 100000 requests/s: the most is "):
        config(folder, Asked(SLO, lengths=LENGTHS, rate=1e5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--rate", "2"), "--rate has no meaning without --slo"),
        (("--lengths", LENGTHS), "--lengths has no meaning without --slo"),
        (("--dataset", "q.jsonl"), "--dataset has no meaning without --slo"),
        (("--slo", SLO, "--plan", "p.json"), "--plan: it is a configuration too; give it, or --config, or --slo"),
        (("--slo", "ttft=1"), "--slo: 'ttft=1' has no tpot"),
        (("--slo", SLO, "--lengths", LENGTHS, "--trace", "t.csv"), "give a --trace, or --lengths"),
    ],
)
def test_options_that_do_not_go_together_are_refused_by_name(arguments, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(cli, ["serve", "demo", *arguments], catch_exceptions=False)


def test_cores_are_shared_out_among_few_workers_and_gpus_among_ranks() -> None:
    assert ways(of_cores(2, 10**9, 1.0)) == [Way(1, 2, 0), Way(1, 1, 1)]
    assert ways(of_cores(12, 10**9, 1.0)) == [Way(1, 12, 0), Way(1, 6, 1), Way(1, 3, 3)]
    assert ways(gpus(4)) == ways(gpus(4), replanning=True) == [Way(1), Way(2), Way(4)]
    assert ways(of_cores(2, 10**9, 1.0), replanning=True) == [Way(1, 2, 0), Way(1, 1, 1)]
    assert ways(of_cores(12, 10**9, 1.0), replanning=True)[3:] == [Way(2, 3, 1)]
    told = [Way(1, 12, 0), Way(1, 1, 1), Way(2, 3, 1), Way(2)]
    assert [*map(str, told)] == [
        "a worker of 12 cores",
        "2 workers of 1 core",
        "2 workers on 2 devices of 3 cores",
        "a worker on 2 devices",
    ]
