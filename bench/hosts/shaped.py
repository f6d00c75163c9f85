"""Two hosts with a virtual cable between them that carries a stated rate in either direction: veth and tbf of the
kernel, which cost the processors next to nothing, as a network card does. Needs root, ip(8) and tc(8)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from bench.hosts import namespaces
from bench.hosts.namespaces import Host, bring_up, device_name, must, two_namespaces

_BURST_BYTES, _QUEUE_BYTES = 256 << 10, 4 << 20
"""What may leave at once: several of the largest segments. What may wait, as in a switch: more is dropped."""


def missing() -> str:
    """Why there can be no such hosts here; empty if there can."""
    return namespaces.missing() or ("" if shutil.which("tc") else "needs tc(8)")


@contextmanager
def two_hosts(bits_per_s: float) -> Iterator[tuple[Host, Host]]:
    """Made, and removed in any case, with every process that is still in them."""
    with two_namespaces() as hosts:
        one, other = map(device_name, hosts)
        must(
            "ip", "link", "add", one, "type", "veth", "peer", "name", other
        )  # goes with the first namespace of the two
        shape = ["tbf", "rate", f"{bits_per_s:.0f}bit", "burst", f"{_BURST_BYTES}b", "limit", f"{_QUEUE_BYTES}b"]
        for host, device in zip(hosts, (one, other), strict=True):
            bring_up(host, device)
            must("tc", "-n", host.namespace, "qdisc", "add", "dev", device, "root", *shape)
        yield hosts
