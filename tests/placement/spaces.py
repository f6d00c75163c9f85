"""Shapes of workers, and clusters to search for layouts of them."""

from __future__ import annotations

from itertools import combinations_with_replacement, product
from typing import Any

from placement.candidates import Fabric, Option, Space
from placement.latency import Coefficients, StepLatency
from placement.layout import Group, Link, Role


def option(tp: int, stages: int = 1, **changes: Any) -> Option:
    """Twice the devices are a little less than twice as fast."""
    speed = tp**0.8
    latency = StepLatency(
        Coefficients(6 + 9 / speed, 0.1 / speed, 7e-6 / speed),
        Coefficients(6 + 12 / speed, 0.0006 / speed, 0.04 / speed),
        Coefficients(4 + 6 / speed, 0.0006 / speed, 0.1 / speed),
        large_rows=95,
        shared_ms=6.0,
    )
    group = Group(Role.BOTH, latency, 60_000 * (2 * tp * stages - 1), stages=stages, hop_ms=0.5)
    return Option(**({"name": f"TP{tp} PP{stages}", "tp": tp, "group": group} | changes))


def alike(inside: Link, across: Link, pools: tuple[str, ...] = ("default",)) -> Fabric:
    """The same links for all of these pools."""
    pairs = combinations_with_replacement(pools, 2)
    return Fabric(dict.fromkeys(pools, inside), dict.fromkeys(map(frozenset, pairs), across))


def space(devices: int = 4, **changes: Any) -> Space:
    options = tuple(option(tp, stages) for tp, stages in product((1, 2), (1, 2)) if tp * stages <= devices)
    values = {"options": options, "nodes": {"default": (4,) * (devices // 4)}} | changes
    fabric = alike(Link(0.003, 0.1), Link(0.03, 0.5), tuple(values["nodes"]))
    return Space(**({"fabric": fabric} | values))
