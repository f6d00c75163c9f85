"""What the runner promises beside right logits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import ConfigError, InternalError
from core.types import SamplingParams
from engine.device import resolve_device, resolve_dtype
from engine.runner import ModelRunner
from engine.step import SamplingRow
from tests.engine.driver import BLOCK_SIZE, Driver, close, tokens

GREEDY = SamplingParams(max_tokens=1, temperature=0.0)


def test_a_step_returns_tokens_and_logits_of_the_rows_asked_for_only(driver: Driver) -> None:
    ids = tokens(9)
    everything = driver.run([(driver.new(9), ids)], logit_rows=np.arange(9)).logits

    some = driver.run([(driver.new(9), ids)], logit_rows=np.array([8, 2]), sampling=(SamplingRow(GREEDY, 0), None))

    assert everything is not None
    assert some.logits is not None
    assert close(some.logits, everything[[8, 2]])
    assert some.token_ids.tolist() == [int(everything[8].argmax()), -1]
    assert some.logprobs == ()
    assert some.seconds > 0


def test_a_step_may_want_no_logits_at_all(driver: Driver) -> None:
    output = driver.run([(driver.new(5), tokens(5))], logit_rows=np.empty(0, np.int64))
    assert output.token_ids.tolist() == []
    assert output.logits is None


def test_logits_come_back_only_when_asked(driver: Driver) -> None:
    rows, sampling = np.array([4]), (SamplingRow(SamplingParams(max_tokens=1, temperature=0.0, logprobs=1), 0),)
    output = driver.run([(driver.new(5), tokens(5))], logit_rows=rows, sampling=sampling, return_logits=False)
    assert output.logits is None
    assert output.logprobs[0] is not None
    assert output.logprobs[0].top[0][0] == output.token_ids[0]


def test_layers_are_published_in_order_each_with_its_kv_written(driver: Driver) -> None:
    stream, seen = driver.new(6), []
    slots = torch.from_numpy(stream.slots(6))
    cache = driver.runner.pool.data.flatten(2, 3)  # [layers, 2, slots, kv_heads, head_size]

    def sink(layer: int, batch: object) -> None:
        written = [bool(cache[index][:, slots].abs().sum(-1).all()) for index in range(3)]
        seen.append((layer, batch, written))

    driver.runner.kv_sink = sink
    batch = driver.batch([(stream, tokens(6))], publish=True)
    driver.runner.submit(batch).result()
    driver.run([(driver.new(3), tokens(3))])  # asks for no publishing

    assert [(layer, written) for layer, _, written in seen] == [
        (0, [True, False, False]),
        (1, [True, True, False]),
        (2, [True, True, True]),
    ]
    assert all(given is batch for _, given, _ in seen)


def test_moves_are_all_read_before_any_is_written(driver: Driver) -> None:
    stream = driver.new(4)
    driver.run([(stream, tokens(4))])
    first, second = stream.blocks[0] * BLOCK_SIZE, stream.blocks[0] * BLOCK_SIZE + 1
    slots = driver.runner.pool.data.flatten(2, 3)
    before = slots[:, :, [first, second]].clone()

    driver.run([(driver.new(1), tokens(1))], kv_moves=np.array([[first, second], [second, first]]))

    assert torch.equal(slots[:, :, [second, first]], before)


def test_a_step_that_fails_is_the_exception_of_its_future(driver: Driver) -> None:
    stream = driver.new(4)
    future = driver.runner.submit(driver.batch([(stream, [10**6])]))
    assert future.done()
    assert isinstance(future.exception(), IndexError)

    [after] = driver.logits([(stream, tokens(4))])
    assert after.isfinite().all()


def test_no_step_runs_after_shutdown(driver: Driver) -> None:
    driver.runner.shutdown()
    driver.runner.shutdown()
    future = driver.runner.submit(driver.batch([(driver.new(1), tokens(1))]))
    assert isinstance(future.exception(), InternalError)


def test_an_error_in_the_sink_fails_the_step(driver: Driver) -> None:
    def broken(layer: int, batch: object) -> None:
        raise OSError("the peer is gone")

    driver.runner.kv_sink = broken
    future = driver.runner.submit(driver.batch([(driver.new(4), tokens(4))], publish=True))
    assert isinstance(future.exception(), OSError)


def test_the_cache_has_as_many_blocks_as_fit_in_its_memory(make_checkpoint: Callable[..., Path]) -> None:
    block_bytes = 2 * 3 * 2 * 8 * 4 * BLOCK_SIZE
    load = {"dtype": "float32", "device": "cpu", "block_size": BLOCK_SIZE}
    runner = ModelRunner.load(make_checkpoint(), kv_cache_bytes=10 * block_bytes + 1, **load)
    assert runner.pool.num_blocks == 10
    with pytest.raises(ConfigError, match="raise --kv-cache-memory"):
        ModelRunner.load(make_checkpoint(), kv_cache_bytes=block_bytes - 1, **load)


def test_bfloat16_is_close_to_float32(make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]) -> None:
    ids, folder = tokens(40), make_checkpoint(attention_bias=True)
    exact, rough = load_driver(folder), load_driver(folder, dtype="bfloat16")
    [want] = exact.logits([(exact.new(40), ids)])
    stream = rough.new(40)
    got = torch.cat([*rough.logits([(stream, ids[:30])]), *rough.logits([(stream, ids[30:])])])
    assert (got - want).norm() < 0.03 * want.norm()
    assert rough.runner.layout.dtype == "bfloat16"


def test_warming_up_leaves_a_runner_that_computes_the_same(make_checkpoint, load_driver) -> None:
    cold, warm = load_driver(make_checkpoint()), load_driver(make_checkpoint())
    warm.runner.warm_up()
    ids = tokens(12)
    assert torch.equal(cold.logits([(cold.new(12), ids)])[0], warm.logits([(warm.new(12), ids)])[0])


@pytest.mark.parametrize("num_blocks", [4, 400])
def test_steps_that_verify_are_timed_while_it_warms_up(
    num_blocks: int, make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    """Of as many rows and as much context as there is room for."""
    folder = make_checkpoint(max_position_embeddings=600)
    cold, warm = load_driver(folder), load_driver(folder, num_blocks=num_blocks)
    size = warm.runner.layout.block_size
    warm.runner.warm_up(draft_tokens=70)
    times = warm.runner.row_times
    assert max(time.rows for time in times) == min(71, num_blocks * size)
    assert {time.context for time in times} == ({0, 512} if num_blocks * size >= 512 + 71 else {0})
    assert [time.rows for time in times[::2]] == [1] * (len(times) // 2)
    assert all(time.seconds > 0 for time in times)
    ids = tokens(12)
    assert torch.equal(cold.logits([(cold.new(12), ids)])[0], warm.logits([(warm.new(12), ids)])[0])


def test_auto_is_what_the_machine_has() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_dtype("auto", torch.device("cpu")) in ("bfloat16", "float32")
    assert resolve_dtype("float32", torch.device("cpu")) == "float32"


@pytest.mark.parametrize("name", ["gpu", "mps", "tpu:0"])
def test_a_device_that_is_not_here_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        resolve_device(name)
