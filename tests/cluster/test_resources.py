"""What a machine can't serve is said before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import check_kv_transport, check_memory, hold_port
from cluster.config.loading import load
from cluster.limits import max_model_len
from cluster.machine import available_memory, has_gpu, usable_cores
from cluster.resources import Share, share_out
from core.errors import ConfigError
from engine.model_config import ModelConfig


@pytest.mark.parametrize(
    ("settings", "cores", "gpus", "share"),
    [
        ({}, 2, 0, Share(1.0)),
        ({"colocated": True}, 2, 0, Share(2.0)),
        ({"decode_replicas": 2}, 8, 0, Share(2.0)),
        ({"decode_replicas": 3}, 2, 0, Share(0.5)),
        ({"cpus_per_worker": 0.5}, 8, 0, Share(0.5)),
        ({}, 16, 2, Share(8.0, 1)),
        ({"device": "cpu"}, 16, 2, Share(8.0)),
        ({"colocated": True, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, 16, 4, Share(16.0, 4)),
        ({"tensor_parallel_size": 2}, 16, 0, Share(8.0)),
        ({"tensor_parallel_size": 2}, 16, 4, Share(8.0, 2)),
    ],
)
def test_cores_and_gpus_are_shared_out_evenly(settings: dict[str, Any], cores: int, gpus: int, share: Share) -> None:
    assert share_out(load(None, settings), cores, gpus) == [share]


APART = {"prefill_tensor_parallel_size": 2, "decode_replicas": 2}


@pytest.mark.parametrize(
    ("settings", "cores", "gpus", "shares"),
    [
        (APART, 8, 0, [Share(4.0), Share(2.0)]),
        (APART, 2, 0, [Share(1.0), Share(0.5)]),
        (APART, 8, 4, [Share(4.0, 2), Share(2.0, 1)]),
        ({"prefill_cpus_per_worker": 3.0, "cpus_per_worker": 1.0}, 4, 0, [Share(3.0), Share(1.0)]),
    ],
)
def test_workers_of_two_shapes_get_a_share_for_each_of_their_ranks(
    settings: dict[str, Any], cores: int, gpus: int, shares: list[Share]
) -> None:
    assert share_out(load(None, settings), cores, gpus) == shares


@pytest.mark.parametrize(
    ("settings", "gpus", "named"),
    [
        ({"cpus_per_worker": 2.0}, 0, "--cpus-per-worker"),
        ({"device": "cuda"}, 0, "there is no GPU here"),
        ({}, 1, "--device cpu"),
        ({"colocated": True, "tensor_parallel_size": 2}, 1, "1 workers need 2 GPUs each"),
        (APART, 3, "1 workers need 2 GPUs each, 2 workers need a GPU each and the cluster has 3"),
        (
            {"prefill_cpus_per_worker": 2.0, "cpus_per_worker": 1.0},
            0,
            "1 workers of 2 CPUs each and 1 workers of 1 CPUs each do not fit on 2",
        ),
    ],
)
def test_resources_that_do_not_go_round_are_refused_with_the_numbers(
    settings: dict[str, Any], gpus: int, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        share_out(load(None, settings), 2, gpus)
    assert named in caught.value.message


def test_a_bundle_names_no_resource_it_has_none_of() -> None:
    assert Share(1.0).bundle == {"CPU": 1.0}
    assert Share(1.0, 1).bundle == {"CPU": 1.0, "GPU": 1.0}


def hold(host: str, port: int) -> None:
    with hold_port(host, port):
        pass


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError) as caught:
            hold("127.0.0.1", other.getsockname()[1])
    assert "--port" in caught.value.message
    hold("127.0.0.1", 0)


def test_a_free_port_is_none_that_ray_will_listen_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held or not, Ray listens there: the gateway would find it taken."""
    drawn: list[int] = []

    class First:
        def __contains__(self, port: int) -> bool:
            drawn.append(port)
            return port == drawn[0]

    monkeypatch.setattr("cluster.checks.RAY_PORTS", First())
    with hold_port("127.0.0.1", 0) as port:
        assert port == drawn[-1] != drawn[0]
    with hold_port("127.0.0.1", drawn[0]) as asked:  # who asks for one by its number gets it
        assert asked == drawn[0]


def test_one_gateway_after_the_other_listens_on_a_port_that_is_held() -> None:
    with hold_port("127.0.0.1", 0) as port:
        for _ in range(2):
            with socket.create_server(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
                pass


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        hold("203.0.113.1", 8000)


def test_a_host_nobody_knows_is_said_to_be_unknown() -> None:
    with pytest.raises(ConfigError, match="cannot resolve --host no-such-host"):
        hold("no-such-host.invalid", 0)


def cgroup(folder: Path, **files: str) -> tuple[Path, Path]:
    """A cgroup /outer/inner with these files in outer; the root and what /proc/self/cgroup says."""
    (folder / "outer" / "inner").mkdir(parents=True)
    for name, text in files.items():
        (folder / "outer" / name.replace("_", ".", 1)).write_text(text)
    (folder / "self").write_text("0::/outer/inner\n")
    return folder, folder / "self"


@pytest.mark.parametrize(("quota", "most"), [("100000 100000\n", 1), ("50000 100000\n", 1), ("max 100000\n", 10**6)])
def test_the_quota_of_a_cgroup_limits_the_cores(tmp_path: Path, quota: str, most: int) -> None:
    affinity = usable_cores(tmp_path, tmp_path / "none")
    assert usable_cores(*cgroup(tmp_path, cpu_max=quota)) == min(affinity, most)


def test_a_cgroup_leaves_the_memory_below_its_limit_that_is_not_page_cache(tmp_path: Path) -> None:
    where = cgroup(tmp_path, memory_max="5000\n", memory_current="3000\n", memory_stat="anon 1\ninactive_file 500\n")
    assert available_memory(*where) == 2500


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    assert available_memory(*cgroup(tmp_path, memory_max="max\n", memory_current="3000\n")) > 2**20


def test_too_little_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(load(None, {"kv_cache_memory": "100000GiB"}), tmp_path)
    assert "--kv-cache-memory" in caught.value.message
    assert "GiB of memory" in caught.value.message


def test_the_ranks_of_both_shapes_take_memory(tmp_path: Path) -> None:
    needed = [
        float(check_memory(load(None, {"device": "cpu"} | settings), tmp_path).split()[0])
        for settings in ({}, {"prefill_tensor_parallel_size": 4}, {"tensor_parallel_size": 4})
    ]
    assert needed[0] < needed[1] < needed[2]


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "hidden_size": 32,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "intermediate_size": 8,
    "vocab_size": 8,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


@pytest.mark.parametrize(
    ("settings", "length"),
    [
        ({}, 4096),
        ({"max_model_len": 100}, 100),
        ({"kv_cache_memory": "1MiB"}, 2048),
        ({"kv_cache_memory": "1MiB", "dtype": "float32"}, 1024),
    ],
)
def test_the_longest_sequence_is_what_model_and_cache_allow(settings: dict[str, Any], length: int) -> None:
    assert max_model_len(ModelConfig.from_dict(LLAMA), load(None, settings).engine) == length


def test_a_cache_below_one_block_is_told_by_its_own_flag() -> None:
    with pytest.raises(ConfigError, match="--kv-cache-memory 1KB holds no block: 16 tokens of this model need"):
        max_model_len(ModelConfig.from_dict(LLAMA), load(None, {"kv_cache_memory": "1KB"}).engine)


def test_a_length_beyond_that_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 5000 is above"):
        max_model_len(ModelConfig.from_dict(LLAMA), load(None, {"max_model_len": 5000}).engine)


def test_a_worker_goes_by_the_cache_it_has() -> None:
    model, engine = ModelConfig.from_dict(LLAMA), load(None, {"device": "cuda"}).engine
    assert max_model_len(model, engine) == 4096  # who has no GPU can't tell
    assert max_model_len(model, engine, cache_tokens=640) == 640
    with pytest.raises(ConfigError, match=r"the KV cache \(--gpu-memory-utilization\) holds 640"):
        max_model_len(model, load(None, {"device": "cuda", "max_model_len": 1000}).engine, cache_tokens=640)


def test_a_gpu_is_seen_by_its_device_file(tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    assert not has_gpu(tmp_path)
    (tmp_path / "nvidia0").touch()
    assert has_gpu(tmp_path)


def test_a_transport_whose_library_is_missing_is_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cluster.checks.find_spec", lambda name: None)
    check_kv_transport(load(None, {}))
    check_kv_transport(load(None, {"kv_transport": "tcp"}))
    with pytest.raises(ConfigError, match="kv_transport nixl needs the nixl package; pip install"):
        check_kv_transport(load(None, {"kv_transport": "nixl"}))
