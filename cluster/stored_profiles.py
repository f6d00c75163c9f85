"""Profiles of this machine, kept in the cache: measured when first asked for, and again when model, hardware or
software have changed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
from msgspec.structs import replace

from cluster.machine import cpu_name, usable_cores, versions
from cluster.planned_shapes import Stored
from cluster.planning import TENSOR_PARALLEL_SIZES
from core.compiler import cache_root
from core.errors import ConfigError
from placement.grid import QUICK_DRAFTING_S
from placement.profile import Profile, read_profile, write_profile
from placement.topology import Topology

_WORKERS = (1, 2, 4)
"""Among so many the cores of a machine are shared out; each way is profiled by itself."""


Settings = Mapping[str, tuple[str, ...]]
"""Values of settings, by name."""
_OF_FILES = ("dataset", "speculation_weights")


@dataclass(frozen=True)
class Way:
    """How workers share a machine: ranks of `threads` cores, and `beside` others at the same time."""

    tp: int
    threads: int = 1
    beside: int = 0

    def __str__(self) -> str:
        cores = f"{self.threads} core{'s' * (self.threads > 1)}"
        if self.tp > 1:
            each = f" of {cores}" if self.threads > 1 or self.beside else ""
            return f"{_counted(self.beside)} on {self.tp} devices{each}"
        return f"{_counted(self.beside)} of {cores}"


def ways(topology: Topology, *, replanning: bool = False) -> list[Way]:
    """Those that are worth a look on one machine. With `replanning` cores are shared out among ranks too, where workers
    of several may take the cores of others and one at least serves meanwhile: threads stay as they are."""
    (node,) = topology.nodes
    if node.device != "cpu":
        return [Way(tp) for tp in TENSOR_PARALLEL_SIZES if tp <= node.devices]
    found = [Way(1, node.devices // count, count - 1) for count in _WORKERS if count <= node.devices]
    if not replanning:
        return found
    split = [(way, tp) for way in found for tp in TENSOR_PARALLEL_SIZES[1:] if tp <= way.beside]
    return found + [Way(tp, way.threads, (1 + way.beside) // tp - 1) for way, tp in split]


def _counted(beside: int) -> str:
    return f"{beside + 1} workers" if beside else "a worker"


def profile_of(
    folder: Path, model: str, fingerprint: str, way: Way, device: str, settings: Settings, say: Callable[[str], None]
) -> Stored:
    """From the cache, or measured quickly and kept there, by the name `model`. `settings`: those of serve that it
    depends on, as flags of `slipstream profile`; `device`: as the topology names it. Raises ConfigError if it can't be
    measured."""
    path = cache_root() / "profiles" / f"{_key(fingerprint, way, device, settings)}.json"
    if path.is_file():
        try:
            return _named(read_profile(path), path, model)
        except ConfigError as error:  # cut off, or of another version of ours
            say(f"the stored profile is of no use: {error.message}")
    say(f"measuring {way}, once; it takes minutes{_of_drafts(settings)}")
    _measure(folder, way, device, settings, path)
    return _named(read_profile(path), path, model)


def _of_drafts(settings: Settings) -> str:
    if "speculation" not in settings:
        return ""
    return f", and for drafts by {','.join(settings['speculation'])} about {QUICK_DRAFTING_S:g} s more"


def _named(profile: Profile, path: Path, model: str) -> Stored:
    """Serving knows the model by another name than that of the folder that was profiled."""
    if profile.model.name != model:
        profile = replace(profile, model=replace(profile.model, name=model))
        write_profile(profile, path)
    return Stored(profile, path)


def _key(fingerprint: str, way: Way, device: str, settings: Settings) -> str:
    hardware = f"{cpu_name()} {usable_cores()}" if device == "cpu" else device
    software = [f"{name} {number}" for name, number in versions().items()]
    told = msgspec.json.encode([fingerprint, way, hardware, software, sorted(settings.items()), _written(settings)])
    return hashlib.blake2b(told, digest_size=12).hexdigest()


def _written(settings: Settings) -> list[int]:
    """When each file was that drafts depend on. Raises ConfigError for one that can't be read."""
    paths = [Path(value.rpartition("=")[2]) for name in _OF_FILES for value in settings.get(name, ())]
    try:
        return [file.stat().st_mtime_ns for path in paths for file in [path, *sorted(path.glob("*"))]]
    except OSError as error:
        raise ConfigError(f"{error.filename} can't be read: {error.strerror}", param="dataset") from error


def _measure(folder: Path, way: Way, device: str, settings: Settings, path: Path) -> None:
    """In a process of its own, whose progress is seen here and whose memory is gone when workers start."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cluster", "profile", *profile_arguments(folder, way, device, settings, path)]
    done = subprocess.run(command, stdout=subprocess.DEVNULL, check=False)  # noqa: S603
    if done.returncode:
        raise ConfigError(
            f"--slo: {way} could not be profiled, for the reason above; or measure with slipstream profile by hand, "
            "and give that to slipstream plan",
            param="slo",
        )


def profile_arguments(folder: Path, way: Way, device: str, settings: Settings, path: Path) -> list[str]:
    """Of `slipstream profile`, which knows what serving adds on a CPU only."""
    flags = {"threads": (way.threads,), "beside": (way.beside,), "tensor-parallel-size": (way.tp,)}
    named = {name.replace("_", "-"): values for name, values in settings.items()}
    given = [part for name, values in (flags | named).items() for value in values for part in (f"--{name}", str(value))]
    return [str(folder), "--quick", *(["--serving"] if device == "cpu" else []), "--out", str(path), *given]
