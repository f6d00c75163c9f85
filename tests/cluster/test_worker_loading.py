"""How a worker's model is loaded."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cluster import worker
from cluster.config.engine import EngineSection
from core.errors import ConfigError
from engine.runner import ModelRunner
from speculation.settings import Settings
from tests.tiny import save_tiny_llama

TINY = EngineSection(device="cpu", dtype="float32", kv_cache_memory="1MiB")


def test_the_threads_that_load_computes_with_are_gone_before_a_worker_serves(tmp_path: Path, monkeypatch) -> None:
    save_tiny_llama(tmp_path)
    computed: list[threading.Thread] = []
    warm_up = ModelRunner.warm_up
    monkeypatch.setattr(
        ModelRunner, "warm_up", lambda self, *of: computed.append(threading.current_thread()) or warm_up(self, *of)
    )
    runner = worker.load_runner(tmp_path, TINY, 1)
    try:
        assert [thread.is_alive() for thread in computed] == [False]
    finally:
        runner.shutdown()
        runner.pool.close()


def test_a_worker_that_will_speculate_has_timed_its_steps(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    runner = worker.load_runner(
        tmp_path, TINY, 1, Settings(drafters=("prompt_lookup",), max_budget=6, max_memory_bytes=2**20)
    )
    try:
        assert max(time.rows for time in runner.row_times) == 7
    finally:
        runner.shutdown()
        runner.pool.close()


def test_what_is_wrong_with_a_model_is_said_as_if_it_were_loaded_here(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    with pytest.raises(ConfigError, match="KV cache of 1024 bytes holds no block"):
        worker.load_runner(tmp_path, TINY.model_copy(update={"kv_cache_memory": "1KiB"}), 1)


def test_nobody_but_workers_loads_torch() -> None:
    code = "import sys, cluster.launcher, cluster.app, cluster.front; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
