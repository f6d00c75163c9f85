"""The arithmetic of a split: everything is somebody's, and what can't be split is refused by name."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import ConfigError
from engine.model_config import ModelConfig
from engine.parallel.split import Split, check_split

SIZES = st.sampled_from([1, 2, 3, 4, 8])


def config(**changes: Any) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 100,
            "hidden_size": 96,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "max_position_embeddings": 64,
        }
        | changes
    )


@given(tp_size=SIZES, pp_size=SIZES)
def test_ranks_are_counted_stage_by_stage(tp_size: int, pp_size: int) -> None:
    ranks = list(Split(tp_size, pp_size).all())
    assert [split.rank for split in ranks] == list(range(tp_size * pp_size))
    assert [split.pp_rank for split in ranks] == sorted(split.pp_rank for split in ranks)
    assert sum(split.first for split in ranks) == sum(split.last for split in ranks) == tp_size


@given(pp_size=SIZES, extra=st.integers(0, 50))
def test_stages_share_out_the_layers_in_order_and_evenly(pp_size: int, extra: int) -> None:
    count = pp_size + extra
    shares = [split.layers(count) for split in Split(pp_size=pp_size).all()]
    assert [layer for share in shares for layer in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert all(0 <= before - after <= 1 for before, after in pairwise(lengths))
    assert lengths[0] - lengths[-1] <= 1


@given(tp_size=SIZES, each=st.integers(1, 40))
def test_what_tp_divides_is_shared_out_evenly(tp_size: int, each: int) -> None:
    shares = [split.share(tp_size * each) for split in Split(tp_size).all()]
    assert [item for share in shares for item in share] == list(range(tp_size * each))
    assert {len(share) for share in shares} == {each}


@given(tp_size=SIZES, copies=SIZES)
def test_fewer_kv_heads_than_ranks_go_to_neighbours_in_common(tp_size: int, copies: int) -> None:
    heads = [list(split.kv_heads(tp_size)) for split in Split(tp_size * copies).all()]
    assert heads == [[rank // copies] for rank in range(tp_size * copies)]


@given(tp_size=SIZES, copies=SIZES, group=SIZES)
def test_query_heads_are_where_their_kv_head_is(tp_size: int, copies: int, group: int) -> None:
    kv_heads, ranks = tp_size, tp_size * copies
    heads = kv_heads * copies * group
    for split in Split(ranks).all():
        assert {head * kv_heads // heads for head in split.share(heads)} == set(split.kv_heads(kv_heads))


@given(tp_size=SIZES, count=st.integers(64, 300))
def test_every_row_of_the_vocabulary_is_one_ranks(tp_size: int, count: int) -> None:
    ranks = list(Split(tp_size).all())
    assert [row for split in ranks for row in split.vocabulary(count)] == list(range(count))
    assert all(len(split.vocabulary(count)) <= split.vocabulary_rows(count) for split in ranks)


@pytest.mark.parametrize(
    ("changes", "tp_size", "pp_size", "named"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 2}, 4, 1, "num_attention_heads 6; use 1, 2, 3 or 6"),
        ({"num_key_value_heads": 3}, 4, 1, "num_key_value_heads 3"),
        ({"num_key_value_heads": 4}, 6, 1, "num_key_value_heads 4"),
        ({"intermediate_size": 90}, 4, 1, "intermediate_size 90"),
        ({"vocab_size": 5}, 4, 1, "vocab_size 5"),
        ({}, 1, 4, "num_hidden_layers is 3"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_field(
    changes: dict[str, Any], tp_size: int, pp_size: int, named: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_split(config(**changes), tp_size, pp_size)
    assert named in caught.value.message
    assert ("--tensor-parallel-size" if tp_size > 1 else "--pipeline-parallel-size") in caught.value.message


def test_experts_are_split_by_their_inner_size() -> None:
    moe = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 2}
    with pytest.raises(ConfigError, match="intermediate_size 90"):
        check_split(config(**moe, intermediate_size=90), 4, 1)
    check_split(config(**moe), 4, 3)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (4, 3), (12, 1)])
def test_what_can_be_split_is_let_through(tp_size: int, pp_size: int) -> None:
    check_split(config(), tp_size, pp_size)
