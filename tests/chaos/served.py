"""A disaggregated cluster as it looks from outside: its processes by kind, what its gateway says, what it holds."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.e2e.conftest import Server, save_tokenizer, start

MODEL = "tiny"
TITLES = {
    "controller": "ServeReplica:slipstream:controller",
    "gateway": "ServeReplica:slipstream:gateway",
    "serve": "ray::ServeController",
    "rank": "engine.parallel.rank",
}
KINDS = ("prefill", "decode", *TITLES)
"""Processes that may be killed. `serve` is Ray Serve's own controller, `rank` one of a worker's group. Ray's raylet and
GCS are none of them: a cluster that `slipstream serve` starts lives and dies with them."""
_HANDED = re.compile(
    r'^slipstream:(handoffs_committed|handoff_(?:failures|expiries|bytes))_total\{.*replica="([\w-]+)".*\} (\S+)$',
    re.MULTILINE,
)
_WORKER = re.compile(r'^vllm:kv_cache_usage_perc\{.*replica="worker-(\d+)-\w+",role="(\w+)"\} (\S+)$', re.MULTILINE)


def save_sensitive_llama(folder: Path) -> None:
    """A random Llama whose greedy output hangs on every token of its prompt. That of tests/tiny.py repeats a token or
    two, whatever its KV cache holds."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, 0.3)
    model.save_pretrained(folder)
    save_tokenizer(folder)


@dataclass(frozen=True)
class Worker:
    pid: int
    role: str
    kv_usage: float


class Gateway:
    """What the gateway at `url` says of its workers; nothing while there is no gateway."""

    def __init__(self, url: str) -> None:
        self._http = httpx.AsyncClient(base_url=url, timeout=10)
        self._handed: dict[tuple[str, str], float] = {}  # counter and worker: the last that was read

    async def workers(self) -> list[Worker]:
        page = await self._page("/metrics")
        self._handed |= {(m[1], m[2]): float(m[3]) for m in _HANDED.finditer(page)}
        return [Worker(int(m[1]), m[2], float(m[3])) for m in _WORKER.finditer(page)]

    @property
    def handed_over(self) -> dict[str, float]:
        """What workers, dead ones too, had counted of hand-offs when they were last asked for. Each side counts how
        they end."""
        sums: Counter[str] = Counter()
        for (name, _), value in self._handed.items():
            sums[name] += value
        return dict(sums)

    async def kv_in_use(self) -> dict[int, float]:
        """By pid, the share of its KV blocks that a worker has in use, where there is one."""
        return {worker.pid: worker.kv_usage for worker in await self.workers() if worker.kv_usage}

    async def serves(self) -> bool:
        """Whether there is a worker of each role."""
        return {worker.role for worker in await self.workers()} >= {"prefill", "decode"} and await self.is_healthy()

    async def is_healthy(self) -> bool:
        return bool(await self._page("/health", empty="healthy"))

    async def close(self) -> None:
        await self._http.aclose()

    async def _page(self, path: str, empty: str = "") -> str:
        try:
            answer = await self._http.get(path)
        except httpx.TransportError:
            return ""
        return (answer.text or empty) if answer.status_code == 200 else ""


class Cluster:
    """`flags` are further ones of `slipstream serve`."""

    def __init__(self, folder: Path, num_prefill: int, num_decode: int, flags: tuple[str, ...] = ()) -> None:
        self._wanted = Counter(
            {"prefill": num_prefill, "decode": num_decode, "gateway": 1, "controller": 1, "serve": 1}
        )
        replicas = ("--prefill-replicas", str(num_prefill), "--decode-replicas", str(num_decode))
        small_cache = (
            "--kv-cache-memory",
            "1MiB",
        )  # prefixes are evicted, some sequences wait for blocks or are preempted
        everything = ("--handoff-min-tokens", "0")
        self.server: Server = start(folder, *replicas, *small_cache, *everything, *flags)
        self.url = self.server.url
        self.seen = set(self.server.tree)
        """Every process that the cluster was ever seen to have."""
        self._wanted["rank"] = len(self._titled("rank", self.seen))
        self.gateway = Gateway(self.url)

    async def processes(self) -> dict[str, list[psutil.Process]]:
        """By kind, the oldest first. Workers that no gateway knows are not among them."""
        tree = self._look()
        by_pid = {process.pid: process for process in tree}
        found = {kind: self._titled(kind, tree) for kind in TITLES}
        for role in ("prefill", "decode"):
            pids = [worker.pid for worker in await self.gateway.workers() if worker.role == role]
            found[role] = [by_pid[pid] for pid in sorted(pids) if pid in by_pid]
        return found

    async def is_whole(self) -> bool:
        """Everything that was started is there, or its successor is, and the gateway knows it."""
        found = await self.processes()
        counts = Counter({kind: len(processes) for kind, processes in found.items()})
        known = {process.pid for role in ("prefill", "decode") for process in found[role]}
        return (
            counts == +self._wanted
            and known == {w.pid for w in await self.gateway.workers()}
            and await self.gateway.is_healthy()
        )

    async def state(self) -> str:
        """For a message."""
        found = {kind: [process.pid for process in processes] for kind, processes in (await self.processes()).items()}
        titles = [f"{process.pid} {_title(process)}" for process in self._look() if "ray::" in _title(process)]
        return f"{found}, healthy: {await self.gateway.is_healthy()}, {await self.gateway.workers()}, {titles}"

    def foreign_memory(self) -> list[str]:
        """KV pools that a process of ours maps and whose owner is dead: an owner maps its pool for writing."""
        readers: dict[str, list[int]] = {}
        owned = set()
        for process in self._look():
            for access, inode in _pools(process.pid):
                if "w" in access:
                    owned.add(inode)
                else:
                    readers.setdefault(inode, []).append(process.pid)
        return [f"memfd {inode} mapped by {pids}" for inode, pids in readers.items() if inode not in owned]

    async def stop(self) -> list[str]:
        """The processes that the end of the launcher did not end. They are killed."""
        await self.gateway.close()
        self._look()
        try:
            self.server.stop()
        finally:
            _, alive = psutil.wait_procs(self.seen, timeout=20)
            left = [f"{process.pid} {_title(process)}" for process in alive]
            for process in alive:
                process.kill()
        return left

    def _look(self) -> list[psutil.Process]:
        tree = self.server.tree
        self.seen.update(tree)
        return tree

    def _titled(self, kind: str, tree: Iterable[psutil.Process]) -> list[psutil.Process]:
        return sorted((p for p in tree if TITLES[kind] in _title(p)), key=lambda p: p.pid)


def shm_names() -> set[str]:
    return {str(path) for path in Path("/dev/shm").iterdir()}


def shm_in_use() -> set[str]:
    """Names that a living process maps or has open: who else is on this machine makes some too."""
    found: set[str] = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is not for us to see
            found.update(re.findall(r"/dev/shm/\S+", (process / "maps").read_text()))
        with contextlib.suppress(OSError):
            found.update(str(link.readlink()) for link in (process / "fd").iterdir())
    return found


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()).strip()
    except psutil.Error:  # it has just ended
        return ""


def _pools(pid: int) -> list[tuple[str, str]]:
    """Access and inode of every KV pool that a process maps."""
    try:
        lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []
    fields = [line.split() for line in lines if "/memfd:slipstream-kv" in line]
    return [(field[1], field[4]) for field in fields]


async def until(condition: Callable[[], Awaitable[bool]], seconds: float) -> bool:
    """Whether a condition came true in time."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.1)
    return True
