"""The nodes of a Ray cluster, as it describes them."""

from __future__ import annotations

import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError

_CONNECT_S = 5.0
_ACCELERATOR = "accelerator_type:"
"""Ray has a resource of this name and the device's on nodes with devices that it knows."""

CLIENT = "ray://"
"""Before the address of a cluster on none of whose nodes we are."""
ON_HEAD: dict[str, Any] = {"resources": {"node:__internal_head__": 0.001}}
"""Options of an actor: on the head node, which alone has that resource."""


def on_node(node_id: str) -> dict[str, Any]:
    """Options of an actor: on this node and no other."""
    return {"label_selector": {"ray.io/node-id": node_id}}


@dataclass(frozen=True, slots=True)
class RayNode:
    """`memory` in bytes; `accelerator`: the kind of its GPUs, where Ray knows it."""

    node_id: str
    address: str
    cpus: float
    gpus: float
    memory: int
    labels: Mapping[str, str]
    accelerator: str | None = None

    def has(self, labels: Mapping[str, str]) -> bool:
        return labels.items() <= self.labels.items()


def check_there(address: str) -> None:
    """Raises ConfigError where nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.removeprefix(CLIENT).rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(f"--ray-address {address}: nobody answers there: {error}", param="ray_address") from error


def nodes_of(listed: Iterable[Mapping[str, Any]]) -> list[RayNode]:
    """Those that are alive, from what `ray.nodes()` returns, in the order of their ids."""
    found = [_node(node) for node in listed if node["Alive"]]
    return sorted(found, key=lambda node: node.node_id)


def _node(listed: Mapping[str, Any]) -> RayNode:
    resources = listed["Resources"]
    kinds = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return RayNode(
        node_id=listed["NodeID"],
        address=listed["NodeManagerAddress"],
        cpus=float(resources.get("CPU", 0.0)),
        gpus=float(resources.get("GPU", 0.0)),
        memory=int(resources.get("memory", 0)),
        labels=dict(listed.get("Labels") or {}),
        accelerator=kinds[0] if kinds else None,
    )
