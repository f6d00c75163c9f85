"""The topology of this machine: what nvidia-smi says where there are GPUs of NVIDIA's, else its cores."""

from __future__ import annotations

import re
import subprocess
import time

import numpy as np

from cluster.machine import available_memory, usable_cores
from core.errors import ConfigError
from placement.devices import kind_of
from placement.topology import NodeKind, Topology, Wire

_NVLINK_GB_S = 25.0
"""One way, of each of the links that `nvidia-smi topo -m` counts: of the third and fourth generation alike."""
_PCIE_GB_S = {"PIX": 25.0, "PXB": 25.0, "PHB": 20.0, "NODE": 15.0, "SYS": 12.0}
"""By how far apart they are on the bus; about what copies reach between devices of the fourth generation."""
_COPY_BYTES = 2**26


def topology_here() -> Topology:
    """Raises ConfigError for GPUs that nvidia-smi does not describe."""
    try:
        listed = _nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
    except FileNotFoundError:
        return of_cores(usable_cores(), available_memory(), copy_gb_s())
    return of_gpus(listed, _nvidia_smi("topo", "-m"))


def of_cores(cores: int, memory: int, gb_s: float) -> Topology:
    """Every core is a device; workers hand KV over through memory."""
    node = NodeKind(name="here", device="cpu", devices=cores, memory_gb=memory / cores / 1e9)
    links = (Wire(within="here", gb_per_s=gb_s, latency_us=200.0),) if cores > 1 else ()
    return Topology(nodes=(node,), links=links, source="the cores of this machine, a measured copy for a link")


def of_gpus(listed: str, matrix: str) -> Topology:
    """From the two outputs of nvidia-smi. The slowest pair of devices counts for all."""
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
    links = (Wire(within="here", gb_per_s=_slowest(matrix, len(rows)), latency_us=10.0),) if len(rows) > 1 else ()
    return Topology(nodes=(node,), links=links, source="nvidia-smi, links as they are sold")


def _slowest(matrix: str, gpus: int) -> float:
    """GB/s of the slowest pair in the matrix of `nvidia-smi topo -m`."""
    cells = [line.split()[1 : 1 + gpus] for line in matrix.splitlines() if re.match(r"GPU\d+\s", line)]
    kinds = {kind for row in cells for kind in row} - {"X"}
    unknown = {kind for kind in kinds if kind not in _PCIE_GB_S and not re.fullmatch(r"NV\d+", kind)}
    if unknown or not kinds:
        raise ConfigError(f"nvidia-smi topo -m has links {sorted(unknown)}: write a topology file instead")
    return min(_PCIE_GB_S.get(kind) or _NVLINK_GB_S * int(kind[2:]) for kind in kinds)


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
