"""A group of processes: what it computes, and how it ends when one of them does not go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from core.errors import ConfigError, InternalError, ModelError
from core.types import SamplingParams
from engine.parallel.runner import GroupRunner
from engine.step import SamplingRow
from tests.engine.driver import BLOCK_SIZE, Driver, close, tokens

WAIT_S = 60.0
SHAPE = {"num_attention_heads": 4, "num_key_value_heads": 2}
OPTIONS = {"dtype": "float32", "device": "cpu", "num_blocks": 100, "block_size": BLOCK_SIZE}


@pytest.fixture
def load(make_checkpoint: Callable[..., Path]) -> Iterator[Callable[..., GroupRunner]]:
    with ExitStack() as stack:

        def load(tp_size: int, pp_size: int, **options: Any) -> GroupRunner:
            runner = GroupRunner.load(make_checkpoint(**SHAPE), tp_size=tp_size, pp_size=pp_size, **(OPTIONS | options))
            stack.callback(runner.pool.close)
            stack.callback(runner.shutdown)
            return runner

        yield load


def gone(pids: list[int]) -> bool:
    """Whether all end within WAIT_S."""
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.02)
    return False


def test_a_group_computes_and_draws_as_one_device_does(
    load: Callable[..., GroupRunner], make_checkpoint: Callable[..., Path], load_driver: Callable[..., Driver]
) -> None:
    """With several steps in flight: each stage works on one."""
    runner = load(2, 2)
    runner.warm_up(draft_tokens=4)
    assert {time.rows for time in runner.row_times} == {1, 2, 3, 5}
    whole, parted = load_driver(make_checkpoint(**SHAPE), num_blocks=100), Driver(runner)
    assert runner.layout == whole.runner.layout
    assert runner.pool.num_blocks == whole.runner.pool.num_blocks
    draw = SamplingRow(SamplingParams(max_tokens=1, temperature=1.0, seed=5, logprobs=2), 0)
    want, batches = [], []
    for seed in range(6):
        chunk = tokens(11, seed=seed)
        options = {"logit_rows": np.array([10]), "sampling": (draw,)}
        want.append(whole.run([(whole.new(11), chunk)], **options))
        batches.append(parted.batch([(parted.new(11), chunk)], **options))
    got = [future.result(WAIT_S) for future in [runner.submit(batch) for batch in batches]]
    for ours, theirs in zip(got, want, strict=True):
        assert ours.logits is not None
        assert theirs.logits is not None
        assert close(ours.logits, theirs.logits)
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.logprobs[0] is not None
        assert theirs.logprobs[0] is not None
        assert ours.logprobs[0].logprob == pytest.approx(theirs.logprobs[0].logprob, abs=1e-4)
        assert ours.seconds > 0
    runner.check_health()

    pids = runner.pids
    runner.shutdown()
    assert gone(pids)
    after = runner.submit(batches[0])
    assert isinstance(after.exception(), InternalError)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2)])
def test_who_reads_the_likeliest_tokens_is_sent_no_logits(
    tp_size: int, pp_size: int, load: Callable[..., GroupRunner]
) -> None:
    """A row of logits is as long as the vocabulary; who wants both has both from these."""
    driver, chunk = Driver(load(tp_size, pp_size)), tokens(11, seed=0)
    asked = {"logit_rows": np.array([8, 10]), "num_top": 3}
    top_only = driver.run([(driver.new(11), chunk)], return_logits=False, **asked)
    whole = driver.run([(driver.new(11), chunk)], return_logits=True, **asked)
    assert (top_only.logits, whole.top) == (None, None)
    assert top_only.top is not None
    assert whole.logits is not None
    ids, logprobs = top_only.top
    want = whole.logits.log_softmax(-1).topk(3)
    assert ids.tolist() == want.indices.tolist()
    assert close(torch.from_numpy(logprobs), want.values)


@pytest.mark.parametrize("idle", [False, True])
def test_a_rank_that_is_killed_ends_the_group(idle: bool, load: Callable[..., GroupRunner]) -> None:
    runner = load(2, 1)
    driver, pids = Driver(runner), runner.pids
    flying = []
    if not idle:
        os.kill(pids[1], signal.SIGSTOP)  # so that the steps are in flight when it dies
        flying = [runner.submit(driver.batch([(driver.new(4), tokens(4))])) for _ in range(3)]
    os.kill(pids[1], signal.SIGKILL)
    for future in flying:
        with pytest.raises(InternalError, match=r"rank 1 \(tp 1, pp 0\) was killed by signal 9"):
            future.result(WAIT_S)
    assert gone(pids)
    with pytest.raises(InternalError, match="rank 1"):
        wait_unhealthy(runner)
    with pytest.raises(InternalError, match="rank 1"):
        runner.submit(driver.batch([(driver.new(4), tokens(4))])).result(WAIT_S)


def wait_unhealthy(runner: GroupRunner) -> None:
    deadline = time.monotonic() + WAIT_S
    while time.monotonic() < deadline:
        runner.check_health()
        time.sleep(0.02)


def test_a_rank_that_hangs_is_given_up_after_the_step_timeout(load: Callable[..., GroupRunner]) -> None:
    runner = load(1, 2, step_timeout_s=1.0)
    driver, pids = Driver(runner), runner.pids
    os.kill(pids[1], signal.SIGSTOP)
    future = runner.submit(driver.batch([(driver.new(4), tokens(4))]))
    with pytest.raises(InternalError, match=r"rank 1 \(tp 0, pp 1\) did not finish a step within 1 s"):
        future.result(WAIT_S)
    assert gone(pids)


def test_a_step_that_fails_on_a_rank_is_told_and_ends_the_group(load: Callable[..., GroupRunner]) -> None:
    runner = load(2, 1)
    driver = Driver(runner)
    future = runner.submit(driver.batch([(driver.new(4), tokens(4))], taps=(0,), adapters=("unknown",)))
    with pytest.raises(InternalError, match="unknown"):
        future.result(WAIT_S)
    assert gone(runner.pids)


def test_ranks_do_not_outlive_a_leader_that_is_killed(make_checkpoint: Callable[..., Path]) -> None:
    code = (
        "import sys; from engine.parallel.runner import GroupRunner\n"
        f"r = GroupRunner.load({str(make_checkpoint(**SHAPE))!r}, tp_size=2, pp_size=1, num_blocks=4, device='cpu')\n"
        "print(*r.pids, flush=True); sys.stdin.read()"
    )
    leader = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
    )
    with leader:
        assert leader.stdout is not None
        pids = [int(pid) for pid in leader.stdout.readline().split()]
        assert len(pids) == 2
        leader.kill()
    assert gone(pids)


def test_what_a_rank_cannot_load_is_the_leaders_error(make_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_checkpoint(**SHAPE)
    (tmp_path / "config.json").write_text(
        (folder / "config.json").read_text().replace('"vocab_size": 97', '"vocab_size": 96')
    )
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    before = {child.pid for child in psutil.Process().children()}
    with pytest.raises(ModelError, match=r"model.embed_tokens.weight has shape \[97, 48\]"):
        GroupRunner.load(tmp_path, tp_size=2, pp_size=1, **OPTIONS)
    assert not {child.pid for child in psutil.Process().children()} - before


def test_a_split_that_does_not_divide_starts_nothing(make_checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ConfigError, match="num_attention_heads 4"):
        GroupRunner.load(make_checkpoint(**SHAPE), tp_size=3, pp_size=1, **OPTIONS)
