"""`slipstream bench cost`: what serving costs beside the model's own arithmetic.

Starts a cluster of its own and measures start-up time, time to first token on an idle server beside the bare prefill of
the same prompt, CPU time per streamed token outside the engine (over what the same processes use when idle), and memory
per worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import httpx
import psutil

from core.errors import ConfigError
from core.wire import STATUS_PERIOD_S
from engine.engine import THREAD_NAME

START_TIMEOUT_S = 180.0
IDLE_S = 5.0
"""How long to watch an idle server."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The replicas of a running cluster, by the titles Ray gives them."""

    gateway: psutil.Process
    workers: list[psutil.Process]

    @classmethod
    def below(cls, launcher: psutil.Process) -> Processes:
        found: dict[str, list[psutil.Process]] = {"gateway": [], "worker": []}
        for process in launcher.children(recursive=True):
            title = " ".join(process.cmdline())
            for kind in found:
                if f"ServeReplica:slipstream:{kind}" in title:
                    found[kind].append(process)
        return cls(found["gateway"][0], found["worker"])

    def cpu_outside_engine(self) -> dict[str, float]:
        """CPU seconds so far: the gateway, and every worker thread that does not compute."""
        transport = 0.0
        for worker in self.workers:
            threads = [t for t in worker.threads() if _thread_name(worker.pid, t.id) != THREAD_NAME]
            transport += sum(t.user_time + t.system_time for t in threads)
        times = self.gateway.cpu_times()
        return {"gateway": times.user + times.system, "workers": transport}


def _thread_name(pid: int, thread: int) -> str:
    with contextlib.suppress(FileNotFoundError):  # it has just ended
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text(encoding="utf-8").strip()
    return ""


@contextlib.contextmanager
def running(model: str, flags: list[str]) -> Iterator[tuple[str, psutil.Process, float]]:
    """A server of our own: base URL, its launcher, seconds until /health said yes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "cluster", "serve", model, "--port", str(port), *flags]
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)  # noqa: S603  our own command line
    try:
        url = f"http://127.0.0.1:{port}"
        while not _healthy(url):
            if process.poll() is not None or time.monotonic() - started > START_TIMEOUT_S:
                raise ConfigError(f"the server did not start; run: {' '.join(command)}")
            time.sleep(0.05)
        yield url, psutil.Process(process.pid), time.monotonic() - started
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)


def _healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


def bare_prefill_ms(folder: Path, prompts: list[list[int]], threads: int) -> float:
    """Median time of one prefill step on an engine that does nothing else."""
    from cluster.config.engine import EngineSection
    from cluster.worker import load_runner
    from core.types import Request, SamplingParams
    from engine.batching import build_batch
    from engine.block_manager import BlockManager
    from engine.scheduler import Scheduler, SchedulerConfig
    from engine.sequence import Sequence

    runner = load_runner(folder, EngineSection(kv_cache_memory="64MiB"), threads)
    times = []
    for index, prompt in enumerate([prompts[0], *prompts]):
        scheduler = Scheduler(
            SchedulerConfig(max_num_seqs=1, max_num_batched_tokens=4096, max_model_len=2048),
            BlockManager(runner.pool.num_blocks, runner.layout.block_size),
        )
        sampling = SamplingParams(max_tokens=2, temperature=0.0)
        request = Request(request_id=str(index), prompt_token_ids=prompt, sampling=sampling, deadline=0.0)
        scheduler.add(Sequence(request))
        started = time.perf_counter()
        runner.submit(build_batch(scheduler.schedule())).result()
        times.append((time.perf_counter() - started) * 1e3)
    runner.shutdown()
    return statistics.median(times[1:])


async def idle_ttft_ms(url: str, model: str, prompts: list[list[int]]) -> tuple[float, float]:
    """Medians of the time to the first token, and of the part of it that was not the prefill step itself."""
    times: list[float] = []
    outside: list[float] = []
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        for prompt in [prompts[0][::-1], *prompts]:  # the first warms up
            before = await _prefill_step_seconds(client)
            first, _ = await _stream(client, model, prompt, 1)
            await asyncio.sleep(2 * STATUS_PERIOD_S)  # until the worker has told
            times.append(first * 1e3)
            outside.append((first - (await _prefill_step_seconds(client) - before)) * 1e3)
    return statistics.median(times[1:]), statistics.median(outside[1:])


async def _prefill_step_seconds(client: httpx.AsyncClient) -> float:
    """Seconds the workers that prefill have computed so far."""
    metrics = (await client.get("/metrics")).text
    found = re.findall(
        r'^slipstream:engine_step_seconds_total\{[^}]*role="(?:prefill|both)"[^}]*\} (\S+)$', metrics, re.MULTILINE
    )
    return sum(map(float, found))


async def streams(url: str, model: str, prompts: list[list[int]], max_tokens: int) -> int:
    """All prompts at once; returns the tokens received."""
    async with httpx.AsyncClient(base_url=url, timeout=600) as client:
        results = await asyncio.gather(*(_stream(client, model, prompt, max_tokens) for prompt in prompts))
    return sum(tokens for _, tokens in results)


async def _stream(client: httpx.AsyncClient, model: str, prompt: list[int], max_tokens: int) -> tuple[float, int]:
    """Seconds to the first event with text, and how many tokens the server says it made."""
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "stream": True}
    body |= {"temperature": 0, "ignore_eos": True, "stream_options": {"include_usage": True}}
    started, first, tokens = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter() - started
                if '"completion_tokens"' in line:
                    tokens = json.loads(line[6:])["usage"]["completion_tokens"]
    return first, tokens


def measure(model: str, folder: Path, flags: list[str], num_streams: int, max_tokens: int) -> dict[str, float]:
    rng = random.Random(0)

    def prompts(count: int, length: int) -> list[list[int]]:
        return [[rng.randrange(100, 40_000) for _ in range(length)] for _ in range(count)]

    idle = prompts(15, 128)
    with running(model, flags) as (url, launcher, start_s):
        processes = Processes.below(launcher)
        ttft, outside = asyncio.run(idle_ttft_ms(url, model, idle))
        asyncio.run(streams(url, model, prompts(num_streams, 32), 8))
        idle_per_s = _cpu_per_second(processes)
        before, started = processes.cpu_outside_engine(), time.monotonic()
        tokens = asyncio.run(streams(url, model, prompts(num_streams, 32), max_tokens))
        after, took = processes.cpu_outside_engine(), time.monotonic() - started
        memory = max(worker.memory_info().rss for worker in processes.workers)
        shared = max(_touched_pool_bytes(worker) for worker in processes.workers)
    threads = max(1, (psutil.cpu_count() or 1) // max(1, len(processes.workers)))
    bare = bare_prefill_ms(folder, idle, threads)
    return {
        "start_s": start_s,
        "idle_ttft_ms": ttft,
        "bare_prefill_ms": bare,
        "ttft_overhead_ms": ttft - bare,
        "ttft_outside_step_ms": outside,
        "tokens_per_s": tokens / took,
        **{f"{k}_cpu_ms_per_token": (after[k] - before[k] - idle_per_s[k] * took) * 1e3 / tokens for k in before},
        **{f"{k}_idle_cpu_ms_per_s": rate * 1e3 for k, rate in idle_per_s.items()},
        "worker_rss_mib": memory / 2**20,
        "worker_kv_touched_mib": shared / 2**20,
    }


def _cpu_per_second(processes: Processes) -> dict[str, float]:
    """What the replicas use when nobody asks for anything: Ray's health checks and metrics, our heartbeats."""
    before = processes.cpu_outside_engine()
    time.sleep(IDLE_S)
    return {kind: (after - before[kind]) / IDLE_S for kind, after in processes.cpu_outside_engine().items()}


def _touched_pool_bytes(process: psutil.Process) -> int:
    return sum(int(m.rss) for m in process.memory_maps(grouped=True) if "slipstream-kv" in m.path)


@click.command()
@click.option("--model", default="demo", help="As for serve.")
@click.option("--streams", "num_streams", default=16, type=click.IntRange(1), help="[default: 16]")
@click.option("--max-tokens", default=128, type=click.IntRange(1), help="[default: 128]")
@click.option("--colocated", is_flag=True, help="One worker for both phases.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cost(model: str, num_streams: int, max_tokens: int, colocated: bool, as_json: bool) -> None:
    """Measure what serving costs beside the model: start-up, idle TTFT, CPU per token, memory."""
    from engine.checkpoints import Silent, resolve

    flags = ["--colocated"] if colocated else []
    result = measure(model, resolve(model, progress=Silent()), flags, num_streams, max_tokens)
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        for name, value in result.items():
            click.echo(f"{name:<36}{value:10.2f}")
