from __future__ import annotations

from pathlib import Path
from typing import Literal

import click
import pytest
from click.testing import CliRunner

from cluster.config.loading import load, of_plan, on_device
from cluster.config.tree import SlipstreamConfig, leaves
from cluster.groups import groups_of
from cluster.notation import parse_bytes
from cluster.options import config_options
from core.errors import ConfigError
from core.types import Role


def write(folder: Path, text: str) -> Path:
    path = folder / "serve.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_everything_can_be_left_out() -> None:
    assert load(None, {}) == SlipstreamConfig()


def test_flags_override_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "model: demo\ngateway: {port: 9000, host: 0.0.0.0}\n")
    config = load(path, {"port": 9001})
    assert (config.gateway.port, config.gateway.host) == (9001, "0.0.0.0")


def test_leaf_names_are_unique_over_the_tree() -> None:
    names = [leaf.name for leaf in leaves()]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gateway: {prot: 9000}", "unknown setting gateway.prot; did you mean port?"),
        ("modle: demo", "unknown setting modle; did you mean model?"),
        ("engine: {block_size: 7}", "engine.block_size"),
        ("engine: {kv_cache_memory: lots}", "is not a size"),
        ("cluster: {decode_replicas: 0}", "decode_replicas must be at least 1"),
        ("cluster: {prefill_replicas: 0}", "prefill_replicas must be at least 1"),
        ("gateway: 3", "must be mappings"),
        ("- a", "must be mappings"),
        ("a: [", "is not YAML"),
        ("a: 2024-99-99", "cannot be read"),
        ("engine: {kv_cache_memory: '" + "9" * 400 + "'}", "more than any machine has"),
        ("cluster: {colocated: true, prefill_replicas: 7}", "prefill_replicas 7 has no meaning with colocated"),
        *(
            (
                f"cluster: {{colocated: true, {setting}}}",
                f"{setting.split(':')[0]} has no meaning with colocated, where",
            )
            for setting in ("kv_codec: none", "kv_transport: tcp", "handoff_min_tokens: 8", "lease_s: 5")
        ),
        ("engine: {max_lora_rank: 32}", "max_lora_rank has no meaning without lora_modules; name some, or"),
        ("cluster: {kv_codec: int3}", "cluster.kv_codec"),
        ("cluster: {kv_codec: int8, kv_transport: nixl}", "kv_codec int8 has no meaning with kv_transport nixl"),
        ("cluster: {kv_codec: auto, kv_transport: shared_memory}", "use kv_transport tcp or torch_distributed"),
        ("engine: {max_num_batched_tokens: 8, max_num_seqs: 16}", "max_num_batched_tokens 8 is below max_num_seqs 16"),
        (
            "cluster: {colocated: true, prefill_tensor_parallel_size: 2}",
            "prefill_tensor_parallel_size has no meaning with colocated, where all workers do both and are alike",
        ),
        ("cluster: {prefill_cpus_per_worker: 2}", "prefill_cpus_per_worker needs cpus_per_worker"),
        ("cluster: {prefill_tensor_parallel_sise: 2}", "did you mean prefill_tensor_parallel_size?"),
        ("cluster: {prefill_pipeline_parallel_size: 0}", "cluster.prefill_pipeline_parallel_size: "),
        ("speculation: {dratfer: none}", "unknown setting speculation.dratfer; did you mean drafter?"),
        ("speculation: {drafter: [a, b, a]}", "speculation.drafter: a is there twice"),
        ("speculation: {budget: 8}", "speculation: budget has no meaning without a drafter"),
    ],
)
def test_a_bad_file_is_one_line_that_names_the_setting(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text), {})
    assert message in caught.value.message
    assert "\n" not in caught.value.message


def test_how_kv_goes_may_be_said_with_colocated_where_roles_may_change() -> None:
    given = {"replan": "advise", "replan_slo": "ttft=900,tpot=40", "replan_profile": "profile.json"}
    assert load(None, given | {"colocated": True, "kv_codec": "fp8", "lease_s": 5.0}).cluster.kv_codec == "fp8"


def test_what_means_nothing_in_a_planned_layout_is_left_out_and_named() -> None:
    tree = {"cluster": {"colocated": True, "decode_replicas": 2}}
    found, idle = of_plan(tree, {"kv_codec": "fp8", "lease_s": 5.0, "port": 1})
    assert (found.cluster.kv_codec, found.gateway.port, found.cluster.decode_replicas) == ("none", 1, 2)
    assert sorted(idle) == ["kv_codec", "lease_s"]
    assert of_plan({"cluster": {"prefill_replicas": 1}}, {"kv_codec": "fp8"})[1] == []
    replanned = {"replan": "on", "replan_slo": "ttft=900,tpot=40", "replan_profile": "profile.json"}
    assert of_plan(tree, {"kv_codec": "fp8"} | replanned)[0].cluster.kv_codec == "fp8"
    with pytest.raises(ConfigError, match="kv_codec has no meaning with colocated"):
        of_plan(tree, {"kv_codec": "fp8", "colocated": True})


def test_a_file_that_is_not_utf8_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_bytes(b"model: caf\xe9")
    with pytest.raises(ConfigError, match="is not UTF-8 text: byte 10 is 0xe9"):
        load(path, {})


def test_an_empty_section_leaves_the_defaults(tmp_path: Path) -> None:
    assert load(write(tmp_path, "engine:\n"), {"port": 9000}).gateway.port == 9000


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        load(tmp_path / "none.yaml", {})


def test_every_setting_has_a_flag_of_its_type() -> None:
    seen: dict[str, object] = {}

    @click.command()
    @config_options
    def command(**flags: object) -> None:
        seen.update({name: value for name, value in flags.items() if value is not None})

    arguments = ["--port", "9000", "--colocated", "--no-prefix-caching", "--dtype", "float32", "--block-size", "8"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert seen == {"port": 9000, "colocated": True, "prefix_caching": False, "dtype": "float32", "block_size": 8}
    assert load(None, seen).engine.block_size == 8


def test_an_unknown_flag_is_refused_with_the_nearest_known() -> None:
    @click.command()
    @config_options
    def command(**flags: object) -> None: ...

    result = CliRunner().invoke(command, ["--decode-replica", "2"])
    assert result.exit_code == 2
    assert "--decode-replicas" in result.output


def test_prefill_workers_are_as_decode_workers_but_for_what_is_said_of_them() -> None:
    alike = load(None, {"tensor_parallel_size": 2, "prefill_tensor_parallel_size": 2})
    assert [(group.name, group.workers) for group in groups_of(alike)] == [("worker-tp2-pp1", 2)]
    apart = load(None, {"cpus_per_worker": 4.0, "prefill_cpus_per_worker": 2.0, "prefill_pipeline_parallel_size": 2})
    found = {group.name: group.config for group in groups_of(apart)}
    assert list(found) == ["worker-tp1-pp2-prefill", "worker-tp1-pp1-decode"]
    assert [(own.engine.ranks, own.cluster.cpus_per_worker) for own in found.values()] == [(2, 2.0), (1, 4.0)]


def test_workers_that_differ_in_their_cores_only_are_two_deployments() -> None:
    config = load(None, {"cpus_per_worker": 1.0, "prefill_cpus_per_worker": 2.0, "decode_replicas": 3})
    groups = [(group.name, group.roles, group.workers) for group in groups_of(config)]
    assert groups == [("worker-tp1-pp1-prefill", (Role.PREFILL,), 1), ("worker-tp1-pp1-decode", (Role.DECODE,), 3)]


def test_prefill_workers_take_larger_chunks_unless_told_otherwise() -> None:
    engine = SlipstreamConfig().engine
    assert engine.batched_tokens(Role.PREFILL) > engine.batched_tokens(Role.DECODE)
    assert load(None, {"max_num_batched_tokens": 64}).engine.batched_tokens(Role.PREFILL) == 64


@pytest.mark.parametrize("role", list(Role))
@pytest.mark.parametrize(
    ("settings", "sequences"), [({}, 64), ({"max_num_batched_tokens": 8}, 8), ({"max_num_seqs": 3000}, 3000)]
)
def test_a_step_has_a_token_for_each_of_its_sequences(settings: dict[str, int], sequences: int, role: Role) -> None:
    engine = load(None, settings).engine
    assert engine.sequences == sequences
    assert engine.batched_tokens(role) >= sequences


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4G", 2**32),
        ("4g", 4 * 10**9),
        ("512MiB", 2**29),
        ("1GiB", 2**30),
        ("1.5 kb", 1500),
        ("77", 77),
        ("10TB", 10**13),
        ("1TiB", 2**40),
    ],
)
def test_sizes_take_the_usual_units(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("8192", 8192), ("8K", 8192), ("8k", 8000), ("25.6k", 25600), ("auto", None), ("-1", None)]
)
def test_token_counts_are_written_as_for_vllm(text: str, value: int | None, tmp_path: Path) -> None:
    assert load(None, {"max_model_len": text}).engine.max_model_len == value
    assert (
        load(write(tmp_path, f"engine: {{max_num_batched_tokens: {text}}}"), {}).engine.max_num_batched_tokens == value
    )


@pytest.mark.parametrize("text", ["many", "1.5", "8KiB", "", "-8"])
def test_a_count_that_is_none_is_refused_by_the_name_of_its_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine.max_model_len: .* is not a count; write a number such as 8192"):
        load(None, {"max_model_len": text})


@pytest.mark.parametrize(("short", "name"), [("half", "float16"), ("float", "float32"), ("bfloat16", "bfloat16")])
def test_dtypes_have_vllms_short_names_too(short: str, name: str) -> None:
    assert load(None, {"dtype": short}).engine.dtype == name


@pytest.mark.parametrize(
    ("settings", "device", "size"),
    [
        ({}, "cpu", 2**30),
        ({"kv_cache_memory": "auto"}, "cpu", 2**30),
        ({}, "cuda", None),
        ({"kv_cache_memory": "2GiB", "gpu_memory_utilization": 0.5}, "cuda", 2**31),
    ],
)
def test_the_cache_has_the_size_given_or_what_the_device_has(
    settings: dict[str, object], device: Literal["cpu", "cuda"], size: int | None
) -> None:
    assert on_device(load(None, settings), device).engine.kv_cache_bytes == size


def test_a_share_of_a_gpu_is_refused_on_the_cpu_as_soon_as_that_is_known() -> None:
    settings = {"gpu_memory_utilization": 0.5}
    with pytest.raises(ConfigError, match="gpu_memory_utilization has no meaning with device cpu"):
        load(None, settings | {"device": "cpu"})
    config = load(None, settings)
    with pytest.raises(ConfigError, match="gpu_memory_utilization has no meaning with device cpu"):
        on_device(config, "cpu")
    assert on_device(config, "cuda").engine.gpu_memory_utilization == 0.5


@pytest.mark.parametrize(
    "settings",
    [
        {"gpu_memory_utilization": 0},
        {"gpu_memory_utilization": 1.1},
        {"seed": -1},
        {"seed": 2**63},
        {"request_timeout_s": float("inf")},
        {"drain_timeout_s": float("nan")},
        {"cpus_per_worker": float("inf")},
        {"kv_cache_memory": "0"},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": "0.2"},
        {"max_body": "0MiB"},
        {"max_body": "100"},
        {"max_model_len": True},
        {"handoff_min_tokens": False},
        {"seed": True},
        {"block_size": True},
        {"lease_s": True},
        {"otlp_traces_endpoint": "collector:4318"},
        {"kv_cache_memory": True},
    ],
)
def test_values_out_of_range_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        load(None, settings)


def test_vllms_flags_arrive() -> None:
    seen: dict[str, object] = {}

    @click.command()
    @config_options
    def command(**flags: object) -> None:
        seen.update({name: value for name, value in flags.items() if value is not None})

    text = "--max-model-len 8K --max-num-batched-tokens auto --kv-cache-memory 4G --seed 7 --enforce-eager --dtype half"
    result = CliRunner().invoke(command, [*text.split(), "--gpu-memory-utilization", "0.5"])
    assert result.exit_code == 0, result.output
    config = load(None, seen)
    assert config.engine.model_dump(include={"max_model_len", "max_num_batched_tokens", "enforce_eager", "dtype"}) == {
        "max_model_len": 8192,
        "max_num_batched_tokens": None,
        "enforce_eager": True,
        "dtype": "float16",
    }
    assert (config.engine.kv_cache_bytes, config.gateway.seed) == (2**32, 7)
