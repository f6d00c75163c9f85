"""How fast transports move KV between two hosts, beside bare loops over the same link.

    python -m bench.transfer.over_link SPEC

runs on the host that takes (`Spec`, in JSON), and prints its result as JSON.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop
from msgspec import Struct, json

from bench.hosts.namespaces import Host
from bench.transfer.baselines import tcp_loop_rate
from bench.transfer.gloo_loop import gloo_loop_rate
from bench.transfer.lender import layout_of
from bench.transfer.links import Link, two_hosts
from bench.transfer.sides import two_sides
from bench.transfer.wire import Kind, measure_wire
from core.errors import InternalError
from engine.kv_layout import KVLayout
from kv_transfer.transports.names import TransportName

LOOPS: dict[TransportName, Callable[[int, int, Host, Host], float]] = {
    "tcp": tcp_loop_rate,
    "torch_distributed": gloo_loop_rate,
}
"""Bytes per second of the bare loop of what a transport is made of."""
BARE_S = 1.0
"""Of a bare loop, if that is neither too few rounds nor too many."""
KINDS = {"in_flight": Kind(), "one_at_a_time": Kind(at_once=1)}
MIN_ROUNDS, MAX_ROUNDS = 4, 100


class Spec(Struct, frozen=True):
    """Transfers of so many MiB, `rounds` of each, between two hosts with this link."""

    giver: Host
    taker: Host
    link: Link
    sizes_mib: list[float]
    rounds: int
    layout: KVLayout


def measure_links(
    links: dict[str, Link], sizes_mib: list[float], rounds: int, layout: KVLayout | None = None
) -> dict[str, Any]:
    """By link, transport and MiB: bytes per second of the transport alone, medians, with as many pulls in flight as
    rates.measure_rates has (`in_flight`) and with the next one asked for when the last has been verified
    (`one_at_a_time`); and those of the bare loop over as many bytes and the same link, right before and after. `layout`
    is the demo model's by default."""
    layout = layout or layout_of(30, 3, 64, "bfloat16")
    return {"links": {name: _measured(link, sizes_mib, rounds, layout) for name, link in links.items()}}


def _measured(link: Link, sizes_mib: list[float], rounds: int, layout: KVLayout) -> dict[str, Any]:
    with two_hosts(link) as (giver, taker):
        spec = json.encode(Spec(giver, taker, link, sizes_mib, rounds, layout)).decode()
        command = taker.command(sys.executable, "-m", "bench.transfer.over_link", spec)
        root = Path(__file__).parents[2]
        ended = subprocess.run(command, stdout=subprocess.PIPE, check=False, cwd=root)  # noqa: S603  our own module
    if ended.returncode:
        raise InternalError("the process that measures has ended with an error; see above")
    found = json.decode(ended.stdout)
    return {"bits_per_s": link.bits_per_s, "delay_ms": 1e3 * link.delay_s, "transports": found}


async def _measure_all(spec: Spec) -> dict[str, Any]:
    """On the taker's host. Nothing else is to happen on the loop while a bare loop runs."""
    sizes = {f"{mib:g}": max(1, int(mib * 2**20) // spec.layout.token_bytes) for mib in spec.sizes_mib}
    with two_sides(spec.layout, max(sizes.values()), spec.giver) as (lender, pool):

        async def measure(name: TransportName, num_tokens: int) -> dict[str, Any]:
            nbytes = num_tokens * spec.layout.token_bytes
            before = _bare_rate(spec, name, nbytes)
            took = await measure_wire(lender, pool, name, num_tokens, spec.rounds, KINDS)
            bare = statistics.mean((before, _bare_rate(spec, name, nbytes)))
            rates = {kind: _rate(nbytes, seconds, bare) for kind, seconds in took.items()}
            return {"bytes": nbytes, "bare_bytes_per_s": bare, **rates}

        return {name: {mib: await measure(name, tokens) for mib, tokens in sizes.items()} for name in LOOPS}


def _rate(nbytes: int, seconds: float, bare: float) -> dict[str, float]:
    return {"ms": 1e3 * seconds, "bytes_per_s": nbytes / seconds, "share": nbytes / seconds / bare}


def _bare_rate(spec: Spec, name: TransportName, nbytes: int) -> float:
    rounds = int(BARE_S * spec.link.bits_per_s / 8 / nbytes)
    return LOOPS[name](nbytes, min(max(rounds, MIN_ROUNDS), MAX_ROUNDS), spec.giver, spec.taker)


if __name__ == "__main__":
    print(json.encode(uvloop.run(_measure_all(json.decode(sys.argv[1], type=Spec)))).decode())
