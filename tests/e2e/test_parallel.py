"""A worker whose model is split over processes, as `slipstream serve` starts it."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from tests.e2e.conftest import Server, alive, assert_drained, launch, served

pytestmark = pytest.mark.e2e
RECOVERY_S = 120.0


def ranks(server: Server) -> list[psutil.Process]:
    return server.titled("engine.parallel.rank")


def complete(server: Server, prompt: list[int]) -> list[int]:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{server.url}/v1/completions", json=body | {"return_token_ids": True}, timeout=60)
    token_ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return token_ids


def handed_over(server: Server) -> float:
    name = "slipstream:handoff_bytes_total{"
    return sum(float(line.rsplit(" ", 1)[1]) for line in server.metrics().splitlines() if line.startswith(name))


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + RECOVERY_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.1)


def test_workers_of_two_shapes_hand_over_and_are_replaced_as_a_whole_and_end_when_the_terminal_does(
    folder: Path,
) -> None:
    prompt = list(range(3, 60))
    model = LlamaForCausalLM.from_pretrained(folder)
    model.generation_config.eos_token_id = None
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0, len(prompt) :].tolist()
    shapes = {"prefill-tensor-parallel-size": 2, "prefill-pipeline-parallel-size": 1, "pipeline-parallel-size": 2}
    with served(folder, *(f"--{name}={size}" for name, size in shapes.items())) as server:
        for name in ("worker-tp2-pp1-prefill", "worker-tp1-pp2-decode"):
            assert name in "".join(server.output)
            assert len(server.replicas(name)) == 1
        started = ranks(server)
        assert len(started) == 4
        assert complete(server, prompt) == expected
        wait_until(lambda: handed_over(server) > 0)  # told by a heartbeat
        lost = [rank for rank in started if rank.parent() == started[0].parent()]
        lost[1].send_signal(signal.SIGKILL)
        assert alive(lost) == []
        wait_until(lambda: len(ranks(server)) == 4 and server.roles == ["decode", "prefill"])
        assert complete(server, prompt) == expected
        assert_drained(server, signal.SIGHUP)


def test_heads_that_do_not_divide_are_refused_before_anything_is_started(folder: Path) -> None:
    process = launch(folder, "--colocated", "--tensor-parallel-size", "3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--tensor-parallel-size 3 does not divide the model's num_attention_heads 4; use 1, 2 or 4" in output
    assert "✓ ray" not in output


def test_a_split_of_prefill_workers_alone_is_refused_by_its_own_flag(folder: Path) -> None:
    process = launch(folder, "--prefill-tensor-parallel-size", "3")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "--prefill-tensor-parallel-size 3 does not divide the model's num_attention_heads 4" in output
