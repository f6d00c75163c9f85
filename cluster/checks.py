"""Whether this machine can serve what was asked for: looked at before anything is deployed, since Ray would wait for
resources that never come."""

from __future__ import annotations

import socket
from pathlib import Path

import psutil

from cluster.config import SlipstreamConfig, parse_bytes
from core.errors import ConfigError

PROCESS_BYTES = 600 * 2**20
"""Interpreter, torch and Ray in one worker, without weights and KV cache."""
RAY_BYTES = 900 * 2**20
"""Ray's own processes, the controller and the gateway."""


def check_port(host: str, port: int) -> None:
    """Raises ConfigError when somebody listens there already or the address is not ours."""
    if port == 0:
        return
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()} "
                "(another slipstream serve, perhaps); choose another with --port"
            ) from error


def check_memory(config: SlipstreamConfig, folder: Path) -> str:
    """Raises ConfigError when the workers would not fit; returns what they need, for the checklist."""
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    each = weights + parse_bytes(config.engine.kv_cache_memory) + PROCESS_BYTES
    needed = each * config.cluster.num_workers + RAY_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"{config.cluster.num_workers} workers need about {_gib(needed)} of memory and {_gib(available)} are free; "
            "lower --kv-cache-memory, use fewer replicas, or --colocated"
        )
    return f"{_gib(needed)} of {_gib(available)} free memory"


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"
