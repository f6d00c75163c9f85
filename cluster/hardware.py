"""The topology of this machine: what nvidia-smi says where there are GPUs of NVIDIA's, else its cores."""

from __future__ import annotations

import subprocess
import time

import numpy as np

from cluster.machine import available_memory, usable_cores
from cluster.nvidia_topo import card_gb_s, parse_matrix
from core.errors import ConfigError
from placement.devices import kind_of
from placement.topology import NETWORK_GB_S, NodeKind, Topology, Wire

_COPY_BYTES = 2**26


def topology_here(*, on_cpu: bool = False) -> Topology:
    """With `on_cpu` its cores, even if there are GPUs. Raises ConfigError for GPUs that nvidia-smi doesn't describe."""
    if on_cpu:
        return of_cores(usable_cores(), available_memory(), copy_gb_s())
    try:
        listed = _nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return of_cores(usable_cores(), available_memory(), copy_gb_s())
    return of_gpus(listed, _nvidia_smi("topo", "-m"), card_gb_s())


def of_cores(cores: int, memory: int, gb_s: float) -> Topology:
    """Every core is a device; workers hand KV over through memory."""
    node = NodeKind(name="here", device="cpu", devices=cores, memory_gb=memory / cores / 1e9)
    links = (Wire(within="here", gb_per_s=gb_s, latency_us=200.0),) if cores > 1 else ()
    return Topology(nodes=(node,), links=links, source="the cores of this machine, a measured copy for a link")


def of_gpus(listed: str, matrix: str, card_gb_s: float | None = None) -> Topology:
    """From the two outputs of nvidia-smi. The slowest pair of devices counts for all. Where there are network cards,
    `card_gb_s` each, there is a link out of the node, for who plans with several of its kind."""
    rows = [line.rpartition(",") for line in listed.strip().splitlines()]
    names, megabytes = {name.strip() for name, _, _ in rows}, [size.strip() for _, _, size in rows]
    if len(names) != 1 or not all(size.isdigit() for size in megabytes):
        raise ConfigError(f"nvidia-smi names {', '.join(sorted(names)) or 'no GPU'}: write a topology file instead")
    node = NodeKind(
        name="here",
        device=kind_of(names.pop()),
        devices=len(rows),
        memory_gb=min(int(size) for size in megabytes) * 2**20 / 1e9,
    )
    found = parse_matrix(matrix)
    links = [Wire(within="here", gb_per_s=found.between, latency_us=10.0)] if len(rows) > 1 else []
    if found.out is not None:
        out = min(found.out, card_gb_s or NETWORK_GB_S)
        links.append(Wire(between=("here", "here"), gb_per_s=out, latency_us=20.0))
    return Topology(nodes=(node,), links=tuple(links), source="nvidia-smi, links as they are sold")


def copy_gb_s() -> float:
    """Of the fastest of some copies in memory."""
    source, target = np.ones(_COPY_BYTES, np.uint8), np.zeros(_COPY_BYTES, np.uint8)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        target[:] = source
        seconds.append(time.perf_counter() - started)
    return _COPY_BYTES / min(seconds) / 1e9


def _nvidia_smi(*arguments: str) -> str:
    """Raises FileNotFoundError where there is none, ConfigError where it fails."""
    try:
        done = subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=30, check=True)  # noqa: S603, S607
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"nvidia-smi {' '.join(arguments)}: {error}; write a topology file instead") from error
    return done.stdout
