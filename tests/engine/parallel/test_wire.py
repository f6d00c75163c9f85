"""Steps and what comes of them reach the other process as they were."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from core.types import PromptLogprobs, SamplingParams, TokenLogprobs
from engine.kv_layout import KVLayout
from engine.lora.checkpoint import Adapter, Module
from engine.parallel.split import Split
from engine.parallel.wire import Channel, Done, Run, Setup
from engine.plan import Plan
from engine.step import SamplingRow, ScoredRows, StepBatch, StepOutput


@pytest.fixture
def ends() -> Iterator[tuple[Channel, Channel]]:
    own, other = socket.socketpair()
    with own, other:
        yield Channel(own), Channel(other)


def same(got: Any, want: Any) -> bool:
    if isinstance(want, np.ndarray | torch.Tensor):
        return got.dtype == want.dtype and got.shape == want.shape and bool((got == want).all())
    if isinstance(want, tuple | list):
        return len(got) == len(want) and all(map(same, got, want))
    if isinstance(want, dict):
        return got.keys() == want.keys() and all(same(got[key], want[key]) for key in want)
    if isinstance(want, SamplingRow | ScoredRows | StepBatch | StepOutput):
        return all(same(getattr(got, f.name), getattr(want, f.name)) for f in fields(want))
    return bool(got == want)


def array(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


FULL_ROW = SamplingRow(
    SamplingParams(max_tokens=3, temperature=0.5, top_k=7, logit_bias={5: -1.5}, seed=2**63 - 1, stop_token_ids=(2,)),
    position=4,
    prompt_token_ids=[1, 2],
    output_token_ids=[3],
    forbidden=(9, 8),
    allowed=np.array([5, 2**32 - 1], np.uint32),
)
BATCH = StepBatch(
    token_ids=array(4, 5, 6),
    positions=array(0, 1, 9),
    slots=array(16, 17, 40),
    query_starts=array(0, 2, 3),
    context_lens=array(0, 9),
    block_tables=(array(1), array(2, 7)),
    logit_rows=array(1, 2),
    sampling=(FULL_ROW, None),
    tree_parents=array(-1, 0, -1),
    kv_moves=np.array([[1, 2], [3, 4]]),
    taps=(0, 3),
    publish=True,
    adapters=("", "sql"),
    scored=(ScoredRows(0, array(5), 2),),
    return_logits=True,
    num_top=4,
)


def test_a_step_arrives_with_every_field(ends: tuple[Channel, Channel]) -> None:
    default = {f.name: f.default for f in fields(StepBatch)}
    assert not [name for name in default if same_or_unset(getattr(BATCH, name), default[name])], "set every field above"
    ends[0].send(Run(7, BATCH))
    got = ends[1].receive_from_leader()
    assert isinstance(got, Run)
    assert got.step == 7
    assert same(got.batch, BATCH)
    assert got.batch.token_ids.flags.writeable  # torch.from_numpy asks for that


def same_or_unset(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, tuple) and not value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_step_brought_arrives_with_every_field(ends: tuple[Channel, Channel], dtype: torch.dtype) -> None:
    output = StepOutput(
        token_ids=array(3, -1),
        logprobs=(TokenLogprobs(-0.5, [(3, -0.5), (4, -1.5)]), None),
        prompt_logprobs=(PromptLogprobs(1, b"\0" * 4, b"\1" * 4, b"\2" * 4, b"\3" * 4),),
        logits=torch.arange(8, dtype=dtype).view(2, 4),
        top=(np.array([[7, 8]]), np.array([[-0.5, -1.5]], np.float32)),
        taps={0: torch.ones(3, 4, dtype=dtype), 3: torch.empty(0, 4, dtype=dtype)},
        seconds=0.25,
    )
    assert not [f.name for f in fields(StepOutput) if same_or_unset(getattr(output, f.name), f.default)]
    ends[0].send(Done.of(1, output))
    got = ends[1].receive_from_rank()
    assert isinstance(got, Done)
    assert same(got.output(), output)


def test_a_rank_is_told_what_to_load(ends: tuple[Channel, Channel]) -> None:
    layout = KVLayout(num_layers=2, num_kv_heads=1, head_size=8, dtype="float32", block_size=16, fingerprint="f")
    adapter = Adapter("sql", Path("/adapters/sql"), {"model.layers.0.mlp.up_proj": Module(8, 0.5, "A", "B")})
    setup = Setup(
        plan=Plan(Path("/model"), "cpu", layout, 10, "int8", (adapter,)),
        split=Split(2, 2, 1, 0),
        meeting="/tmp/meeting",
        threads=3,
        memory=11,
    )
    ends[0].send(setup)
    assert ends[1].receive_from_leader() == setup


def test_the_end_of_the_other_side_is_an_end_of_file(ends: tuple[Channel, Channel]) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        ends[1].receive_from_leader()
    with pytest.raises(EOFError):
        ends[1].send(Done(step=0, token_ids=array()))


def test_another_side_that_stands_still_times_out(ends: tuple[Channel, Channel]) -> None:
    ends[0].set_timeout(0.01)
    with pytest.raises(TimeoutError):
        ends[0].receive_from_rank()
