"""Hands KV over between two hosts, in network namespaces, whose wire is cut, slow, narrow or lossy.

    python -m tests.chaos.network --transfers 200

Giver and taker are the real ones, each in a process on its host. Four zeros are demanded: KV that was committed and is
not what was given, bit for bit; transfers that don't end within their deadline; blocks that the giver never got back,
or twice; blocks that are written to when nothing holds them. Needs root, ip(8) and /dev/net/tun. Exit status 1 if any
is not zero, or nothing was committed.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from bench.hosts.namespaces import Host, choose_congestion_control
from bench.hosts.relay import Condition, Wire, missing, two_hosts

CUT = "cut now and then"
TRANSPORTS = ("tcp", "torch_distributed")
CONDITIONS = {
    "whole": Condition(),
    "delayed 100 ms": Condition(delay_s=0.1),
    "throttled 5 MB/s": Condition(bytes_per_s=5e6),
    "dropping 5 %": Condition(loss=0.05),
    CUT: Condition(bytes_per_s=5e6),  # narrow, so that a cut meets transfers half done
}
LEASE_S, DEADLINE_S = 4.0, 20.0
SLACK_S, START_S = 25.0, 120.0
"""For a slow machine."""
AT_ONCE, MAX_TRIES = 3, 5
CONGESTION_CONTROL = "reno"
"""Every Linux has it. With BBR a connection that knew the wire before it was delayed sends as if it were not, what fits
into 0.1 ms in every 200 ms, until it looks again after ten seconds: a piece may come too late."""


@dataclass
class Result:
    """Of one condition under one transport."""

    seconds: list[float] = field(default_factory=list)
    """Of transfers that were committed."""
    endings: Counter[str] = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    """Of those that were not."""
    wrong: list[str] = field(default_factory=list)
    hung: list[str] = field(default_factory=list)
    leaked: list[str] = field(default_factory=list)

    @property
    def committed(self) -> int:
        return len(self.seconds)

    @property
    def good(self) -> bool:
        return bool(self.committed) and not (self.wrong or self.hung or self.leaked)


class Side:
    """A process of side.py on a host. What it reports of a transfer is the result of that transfer's future."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.twice: list[int] = []
        self._reading = asyncio.create_task(self._read())
        self.address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def order(self, number: int, **fields: Any) -> asyncio.Future[dict[str, Any]]:
        assert self._process.stdin is not None
        self._pending[number] = asyncio.get_running_loop().create_future()
        self._process.stdin.write(json.dumps({"id": number} | fields).encode() + b"\n")
        return self._pending[number]

    async def end(self) -> None:
        self._process.kill()
        await self._process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            said = json.loads(line)
            if "address" in said:
                self.address.set_result(said["address"])
            elif (ended := self._pending[said["id"]]).done():
                self.twice.append(said["id"])
            else:
                ended.set_result(said)
        if not self.address.done():
            self.address.set_exception(RuntimeError("the process has ended before it listened; see its output"))
            self.address.exception()  # who waits for it is told; nobody does of a taker


@asynccontextmanager
async def side(host: Host, *arguments: str) -> AsyncIterator[Side]:
    root = Path(__file__).parents[2]
    started = Side(
        await asyncio.create_subprocess_exec(
            *host.command(sys.executable, "-m", "tests.chaos.side", *arguments),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "GRPC_VERBOSITY": "ERROR"},
        )
    )
    try:
        yield started
    finally:
        await started.end()


class Pair:
    """A giver and a taker on two hosts, with the wire between them."""

    def __init__(self, wire: Wire, giver: Side, taker: Side, address: str) -> None:
        self._wire = wire
        self._giver = giver
        self._taker = taker
        self._address = address
        self._numbers = itertools.count()

    @classmethod
    @asynccontextmanager
    async def join(cls, wire: Wire, hosts: tuple[Host, Host], transport: str) -> AsyncIterator[Pair]:
        one, other = hosts
        for host in hosts:
            choose_congestion_control(host, CONGESTION_CONTROL)
        async with side(one, "giver", one.address, str(LEASE_S)) as giver, side(other, "taker", transport) as taker:
            pair = cls(wire, giver, taker, await asyncio.wait_for(giver.address, START_S))
            await pair._transfer(Result())  # first use of everything
            yield pair

    async def hand_over(self, name: str, count: int, seed: int) -> Result:
        """`count` transfers, a few at a time, over a wire in that condition, and then over one that is whole again."""
        result, todo = Result(), iter(range(count))
        self._wire.condition = CONDITIONS[name]
        cutting = asyncio.create_task(cut_now_and_then(self._wire, seed)) if name == CUT else None

        async def one_after_another() -> None:
            for _ in todo:
                await self._transfer(result)

        try:
            await asyncio.gather(*(one_after_another() for _ in range(AT_ONCE)))
        finally:
            if cutting is not None:
                cutting.cancel()
            self._wire.condition = Condition()
        await self._recovers(result)
        result.leaked += [f"transfer {number} was released twice" for number in self._giver.twice]
        self._giver.twice.clear()
        return result

    async def _transfer(self, result: Result) -> str:
        number, started = next(self._numbers), time.monotonic()
        released = self._giver.order(number)
        taken = self._taker.order(number, address=self._address, deadline_s=DEADLINE_S)
        try:
            said = await asyncio.wait_for(taken, DEADLINE_S + SLACK_S)
        except TimeoutError:
            result.hung.append(f"transfer {number} at the taker")
            return "hung"
        outcome = str(said["outcome"])
        if outcome == "committed":
            result.seconds.append(time.monotonic() - started)
        else:
            result.reasons.append(outcome)
        result.endings[outcome.split(": ")[0]] += 1
        if said["fault"]:
            result.wrong.append(f"transfer {number}: {said['fault']}")
        try:
            await asyncio.wait_for(released, LEASE_S + SLACK_S)
        except TimeoutError:
            result.leaked.append(f"transfer {number}, {outcome}, was not released")
        return outcome

    async def _recovers(self, result: Result) -> None:
        """Transfers succeed again, within a few tries."""
        outcomes: list[str] = []
        while not outcomes or outcomes[-1] != "committed":
            if len(outcomes) == MAX_TRIES:
                result.hung.append(f"over a wire that is whole again: {outcomes}")
                return
            outcomes.append(await self._transfer(Result()))


async def cut_now_and_then(wire: Wire, seed: int) -> None:
    """For a moment, or for longer than a lease, until it is cancelled."""
    rng = random.Random(seed)
    while True:
        await asyncio.sleep(rng.random() * 1.5)
        wire.condition = replace(wire.condition, cut=True)
        try:
            await asyncio.sleep(rng.choice([0.05, 0.5, 2.0, 1.5 * LEASE_S]))
        finally:
            wire.condition = replace(wire.condition, cut=False)


def row(transport: str, name: str, result: Result) -> str:
    median = statistics.median(result.seconds) if result.seconds else float("nan")
    longest = max(result.seconds, default=float("nan"))
    zeros = f"{len(result.wrong):>6}{len(result.hung):>6}{len(result.leaked):>8}"
    others = ", ".join(f"{count} {how}" for how, count in result.endings.items() if how != "committed")
    return f"{transport:<19}{name:<18}{result.committed:>10}{median:>9.2f}{longest:>9.2f}{zeros}  {others}"


HEAD = f"{'transport':<19}{'wire':<18}{'committed':>10}{'median':>9}{'longest':>9}{'wrong':>6}{'hung':>6}{'leaked':>8}"


async def _measure(wire: Wire, hosts: tuple[Host, Host], given: argparse.Namespace) -> dict[str, dict[str, Result]]:
    results: dict[str, dict[str, Result]] = {}
    for transport in given.transport or TRANSPORTS:
        async with Pair.join(wire, hosts, transport) as pair:
            for name in given.wire or CONDITIONS:
                result = await pair.hand_over(name, given.transfers, given.seed)
                results.setdefault(transport, {})[name] = result
                print(row(transport, name, result), flush=True)
                for fault in (result.wrong + result.hung + result.leaked)[:5]:
                    print(f"    {fault[:300]}")
    return results


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.network", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--transfers", type=int, default=200, help="of each transport in each condition")
    parser.add_argument("--transport", action="append", choices=TRANSPORTS, help="may be repeated; default: all")
    parser.add_argument("--wire", action="append", choices=list(CONDITIONS), help="may be repeated; default: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything there")
    given = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    print(HEAD)
    with two_hosts(given.seed) as (one, other, wire):
        results = asyncio.run(_measure(wire, (one, other), given))
    if given.json is not None:
        given.json.write_bytes(msgspec.json.encode(results))
    return 0 if all(result.good for by_name in results.values() for result in by_name.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
