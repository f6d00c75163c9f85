"""The links that `bench transfer --link` measures over. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from msgspec import Struct

from bench.hosts import relay, shaped
from bench.hosts.namespaces import Host
from core.errors import ConfigError

JUMBO = 65_000
"""Bytes of a packet through the relay, whose work is by the packet. The kernel's own link has packets of 1,500."""
_UNITS = {"mbit": 1e6, "gbit": 1e9}
_MIN_BITS_PER_S, _MAX_BITS_PER_S = 10e6, 100e9


class Link(Struct, frozen=True):
    bits_per_s: float
    delay_s: float
    """In each direction."""


def parse_links(text: str, delay_ms: float) -> dict[str, Link]:
    """ "1gbit,500mbit" -> the links by these names. Raises ConfigError."""
    links = {}
    for name in text.split(","):
        found = re.fullmatch(r"(\d{1,6}(?:\.\d{1,3})?)(mbit|gbit)", name, re.ASCII)
        bits_per_s = float(found[1]) * _UNITS[found[2]] if found else 0.0
        if not _MIN_BITS_PER_S <= bits_per_s <= _MAX_BITS_PER_S:
            raise ConfigError(f"--link: {name!r} is no rate from 10mbit to 100gbit; write something like 1gbit,10gbit")
        links[name] = Link(bits_per_s, delay_ms / 1e3)
    return links


def check_hosts(delay_ms: float) -> None:
    """Raises ConfigError where hosts with such a link between them can't be made."""
    if reason := relay.missing() if delay_ms else shaped.missing():
        raise ConfigError(f"--link: two hosts can't be made on this machine: {reason}")


@contextmanager
def two_hosts(link: Link) -> Iterator[tuple[Host, Host]]:
    """With the link between them: of the kernel's, or through a relay if it has a delay."""
    if not link.delay_s:
        with shaped.two_hosts(link.bits_per_s) as hosts:
            yield hosts
        return
    with relay.two_hosts(mtu=JUMBO) as (one, other, wire):
        wire.condition = relay.Condition(delay_s=link.delay_s, bytes_per_s=link.bits_per_s / 8)
        yield one, other
