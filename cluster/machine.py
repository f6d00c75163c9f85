"""What this process may use of the machine: affinity and the limits of its cgroup count, not what the hardware has."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import psutil

CGROUP_ROOT = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def usable_cores(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> int:
    """Whole cores this process may use, at least 1: its affinity, or the quota of its cgroup where that is lower."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.floor(min([affinity, *_quotas(root, own)])))


def available_memory(root: Path = CGROUP_ROOT, own: Path = OWN_CGROUP) -> int:
    """Bytes that can be had: what the machine has free, or what the cgroup leaves where that is lower."""
    return min([psutil.virtual_memory().available, *_headrooms(root, own)])


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """As the kernel has it, or the name of the architecture where it does not say."""
    for line in _read(info).splitlines():
        field, _, value = line.partition(":")
        if field.strip() == "model name":
            return value.strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Of the software that says how fast steps are."""
    return {name: version(name) for name in ("slipstream", "torch")}


def has_gpu(devices: Path = Path("/dev")) -> bool:
    """Whether a GPU may be here: told without loading torch, and without a driver's word that it can be used."""
    return any(devices.glob("nvidia[0-9]*")) or (devices / "dxg").exists()


def _quotas(root: Path, own: Path) -> Iterator[float]:
    for group in _groups(root, own):
        quota, _, period = _read(group / "cpu.max").partition(" ")
        if quota.isdigit() and period.isdigit():
            yield int(quota) / int(period)


def _headrooms(root: Path, own: Path) -> Iterator[int]:
    for group in _groups(root, own):
        limit, current = _read(group / "memory.max"), _read(group / "memory.current")
        if limit.isdigit() and current.isdigit():
            yield max(0, int(limit) - int(current) + _reclaimable(group))


def _reclaimable(group: Path) -> int:
    """Page cache the kernel drops when memory is short; it counts as used."""
    for line in _read(group / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name == "inactive_file":
            return int(value)
    return 0


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The cgroup (version 2) of this process and those it lies in: each one's limits hold."""
    for line in _read(own).splitlines():
        if line.startswith("0::"):
            inside = Path(line.removeprefix("0::").lstrip("/"))
            yield root / inside
            yield from (root / parent for parent in inside.parents)


def _read(path: Path) -> str:
    """Empty where there is no such file: another system, cgroup version 1, or the root group, which has no limits."""
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:
        return ""
