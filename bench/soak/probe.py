"""What a server holds: memory, descriptors and threads of its processes, and what its /metrics say."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import psutil
from prometheus_client.parser import text_string_to_metric_families

from core.errors import ConfigError

KV_USAGE = "vllm:kv_cache_usage_perc"
RUNNING = "vllm:num_requests_running"
WAITING = "vllm:num_requests_waiting"
ENDED = "vllm:request_success_total"


@dataclass(frozen=True, slots=True)
class Sample:
    """At `minutes` since the start. Memory in bytes: `own` is what no file and no other process backs, so a cache that
    is shared and fills up is not in it; `rss` has everything."""

    minutes: float
    own: int
    rss: int
    fds: int
    threads: int
    processes: int


@dataclass
class ProcessTree:
    """The processes of a server: `roots` and all below them. `own` has each one's own memory over time, by its id, and
    `names` what it last called itself."""

    roots: list[int]
    own: dict[int, list[tuple[float, int]]] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def sample(self, minutes: float) -> Sample:
        own = rss = fds = threads = count = 0
        for process in self._processes():
            try:
                with process.oneshot():
                    memory, self.names[process.pid] = process.memory_info(), process.name()
                    fds, threads = fds + process.num_fds(), threads + process.num_threads()
            except psutil.NoSuchProcess:
                continue  # it has just ended
            mine = memory.rss - getattr(memory, "shared", 0)
            own, rss, count = own + mine, rss + memory.rss, count + 1
            self.own.setdefault(process.pid, []).append((minutes, mine))
        return Sample(minutes, own, rss, fds, threads, count)

    def _processes(self) -> dict[psutil.Process, None]:
        found: dict[psutil.Process, None] = {}
        for pid in self.roots:
            try:
                root = psutil.Process(pid)
                found |= dict.fromkeys([root, *root.children(recursive=True)])
            except psutil.NoSuchProcess:
                continue
        return found


def check_roots(pids: list[int]) -> list[int]:
    """Raises ConfigError for a process that is not there or can't be looked at."""
    for pid in pids:
        try:
            psutil.Process(pid).num_fds()
        except psutil.NoSuchProcess as error:
            raise ConfigError(f"--pid {pid}: there is no such process") from error
        except psutil.AccessDenied as error:
            raise ConfigError(f"--pid {pid}: it belongs to somebody else; run this as its user") from error
    return pids


def find_server(base_url: str) -> list[int]:
    """The process to begin at when the server is on this machine: the uppermost with the argument `serve` above whoever
    listens on the port, or that one itself. Empty if it can't be found."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if not _is_here(parts.hostname or ""):
        return []
    try:
        connections = psutil.net_connections("tcp")
    except psutil.AccessDenied:
        return []
    listening = [c for c in connections if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port]
    pid = next((c.pid for c in listening if c.pid), None)
    if pid is None:
        return []
    process = psutil.Process(pid)
    lineage = [process, *process.parents()]
    serving = [p.pid for p in lineage if "serve" in _arguments(p)]
    return [serving[-1] if serving else pid]


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def _is_here(host: str) -> bool:
    try:
        addresses = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except OSError:
        return False
    own = {address.address for card in psutil.net_if_addrs().values() for address in card}
    return any(address in own or str(address).startswith("127.") or address == "::1" for address in addresses)


def totals(metrics: str) -> dict[str, float]:
    """The sum over all labels of every sample of a /metrics page, by name."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found
