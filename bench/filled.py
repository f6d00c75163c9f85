"""KV caches to measure steps over."""

from __future__ import annotations

from engine.kv_cache import KVPool


def fill(pool: KVPool) -> None:
    """As KV would, of which no two values are alike: a GPU takes less power for zeros, and its clock is higher then. A
    CPU's steps take as long over the zeros that are there, and random numbers would take it seconds for each GiB."""
    if pool.device.type != "cpu":
        pool.data.normal_()
