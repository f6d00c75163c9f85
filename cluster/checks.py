"""Whether this machine can serve what was asked for: looked at before anything is deployed, since Ray would wait for
resources that never come."""

from __future__ import annotations

import errno
import math
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cluster.config.engine import EngineSection
from cluster.config.tree import SlipstreamConfig
from cluster.groups import groups_of
from cluster.machine import available_memory
from core.errors import ConfigError
from core.types import Role
from engine.kv_layout import DTYPE_BYTES
from engine.lora.checkpoint import WEIGHTS
from engine.quantization.methods import is_quantized
from engine.weight_check import stored_tensors

PROCESS_BYTES = 600 * 2**20
"""Interpreter, torch and Ray in one worker, without weights and KV cache."""
RANK_BYTES = 400 * 2**20
"""Interpreter and torch in one process of a group, the same."""
RAY_BYTES = 900 * 2**20
"""Ray's own processes, the controller and the gateway."""
RAY_PORTS = frozenset({44217, 44227, 52365})
"""On which a Ray that starts later listens without looking: metrics of autoscaler and dashboard, dashboard agent."""


@contextmanager
def hold_port(host: str, port: int) -> Iterator[int]:
    """Keep a port for the gateways to come, one after the other; 0 takes a free one. Yields its number. Who listens on
    it is not hindered, if with SO_REUSEADDR. Raises ConfigError when the host is unknown, somebody listens there
    already, or the address is not ours."""
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot resolve --host {host}; give a name or an address of this machine") from error
    family, _, _, _, address = found[0]
    try:
        holder = _bound(family, address)
        while not port and holder.getsockname()[1] in RAY_PORTS:
            holder.close()
            holder = _bound(family, address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {_why(error)}") from error
    with holder:
        yield int(holder.getsockname()[1])


def _bound(family: int, address: tuple[Any, ...]) -> socket.socket:
    holder = socket.socket(family)
    try:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(address)
    except OSError:
        holder.close()
        raise
    return holder


def _why(error: OSError) -> str:
    if error.errno == errno.EADDRNOTAVAIL:
        return "the address is not one of this machine; choose another with --host"
    if error.errno == errno.EADDRINUSE:
        return "address already in use (another slipstream serve, perhaps); choose another with --port"
    return f"{(error.strerror or str(error)).lower()}; choose another with --port"


def check_kv_transport(config: SlipstreamConfig) -> None:
    """Raises ConfigError for one whose library is not here, and so hardly where the workers run."""
    if config.cluster.kv_transport == "nixl" and find_spec("nixl") is None:
        raise ConfigError("kv_transport nixl needs the nixl package; pip install 'slipstream[nixl]'")


def check_memory(config: SlipstreamConfig, folder: Path) -> str:
    """Raises ConfigError when the workers would not fit; returns what they need, for the checklist."""
    adapters = sum(Path(path, WEIGHTS).stat().st_size for path in config.engine.adapters.values())
    each = weight_bytes(config.engine, folder) + adapters + cache_bytes(config)
    processes = [group.most * process_bytes(group.config.engine.ranks) for group in groups_of(config)]
    # Where shapes change, workers of one give way to those of another.
    together = max(processes) if config.replan.shapes else sum(processes)
    needed = each * config.most_workers + together + _drafter_bytes(config) + RAY_BYTES
    available = available_memory()
    if needed > available:
        raise ConfigError(
            f"{config.most_workers} workers need about {_gib(needed)} of memory and {_gib(available)} are free; "
            "lower --kv-cache-memory, use fewer replicas, or --colocated"
        )
    return f"{_gib(needed)} of {_gib(available)} free memory"


def process_bytes(ranks: int) -> int:
    """Of one worker with so many, without weights and KV cache."""
    return PROCESS_BYTES + (RANK_BYTES * ranks if ranks > 1 else 0)


def cache_bytes(config: SlipstreamConfig) -> int:
    """Of one worker, in this machine's memory and not on a GPU."""
    return 0 if config.engine.device == "cuda" else config.engine.kv_cache_bytes or 0


def _drafter_bytes(config: SlipstreamConfig) -> int:
    """Of all workers that decode, and of those that only prefill what observes prompts for them."""
    settings = config.speculation.settings
    if settings is None:
        return 0
    prefilling = config.cluster.roles.get(Role.PREFILL, 0)
    return settings.max_memory_bytes * config.cluster.decode_replicas + settings.observing_bytes * prefilling


def weight_bytes(engine: EngineSection, folder: Path) -> int:
    """In memory. With dtype auto as many as are stored: it makes them smaller, and hardly anywhere larger."""
    quantized, size = engine.quantization is not None, DTYPE_BYTES.get(engine.dtype)
    if not quantized and size is None:
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    total = 0
    for name, stored in stored_tensors(folder).items():
        if quantized and is_quantized(name, stored.shape):
            total += math.prod(stored.shape)
        else:
            total += stored.end - stored.start if size is None else size * math.prod(stored.shape)
    return total


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
