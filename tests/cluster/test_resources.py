"""What a machine can't serve is said before anything starts."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest

from cluster.checks import check_memory, check_port
from cluster.config import load
from cluster.limits import max_model_len
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
    ],
)
def test_cores_and_gpus_are_shared_out_evenly(settings: dict[str, Any], cores: int, gpus: int, share: Share) -> None:
    assert share_out(load(None, settings), cores, gpus) == share


@pytest.mark.parametrize(
    ("settings", "gpus", "named"),
    [
        ({"cpus_per_worker": 2.0}, 0, "--cpus-per-worker"),
        ({"device": "cuda"}, 0, "need a GPU each and the cluster has 0"),
        ({}, 1, "--device cpu"),
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


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(ConfigError) as caught:
            check_port("127.0.0.1", other.getsockname()[1])
    assert "--port" in caught.value.message
    check_port("127.0.0.1", 0)


def test_an_address_that_is_not_ours_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"cannot listen on 203\.0\.113\.1"):
        check_port("203.0.113.1", 8000)


def test_too_little_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_memory(load(None, {"kv_cache_memory": "100000GiB"}), tmp_path)
    assert "--kv-cache-memory" in caught.value.message
    assert "GiB of memory" in caught.value.message


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


def test_a_length_beyond_that_is_refused() -> None:
    with pytest.raises(ConfigError, match="--max-model-len 5000 is above"):
        max_model_len(ModelConfig.from_dict(LLAMA), load(None, {"max_model_len": 5000}).engine)
