"""Kills processes of a cluster under load, with SIGKILL, at random moments, and demands four zeros.

    python -m tests.chaos.kill --kills 200 --prefill 2 --decode 2

Wrong tokens: whatever a client was given has to be the start of what an undisturbed run gave, and the whole of it if
the answer ended well. Hung requests: every request ends within its time, if only with an error; when the gateway dies
its connections break, which ends their requests. Leaked blocks: when the load is over no worker has a KV block in use.
Leftovers: no new name in /dev/shm, no KV pool of a dead worker mapped by a living process for longer than a lease, no
process that outlives the launcher. Exit status 1 if any of them is not zero, or the cluster did not become whole again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import psutil

from tests.chaos.load import Load, Tally, cases
from tests.chaos.served import KINDS, Cluster, save_sensitive_llama, shm_in_use, shm_names, until

LEASE_S = 10.0
QUIET_S = 30.0
"""How long blocks and mappings may take to go once nobody asks for anything: leases, heartbeats, and a slow machine."""
PASSING_S = 2.0
"""For how long a name may be between being made and being used, or being used no more and being gone."""


Say = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    kills: int
    kinds: tuple[str, ...]
    each_once: bool = False
    """Kill kind after kind rather than draw one: for few kills."""
    eager: bool = False
    """Kill again as soon as somebody serves, not only when the cluster is whole."""
    num_prefill: int = 1
    num_decode: int = 1
    clients: int = 12
    cases_each: int = 4
    calm_s: float = 5.0
    """Load without kills, first: what is wrong then is not for the kills to answer for."""
    pause_s: float = 2.0
    """A kill comes after a random part of it."""
    timeout_s: float = 60.0
    recovery_s: float = 120.0
    seed: int = 0


@dataclass
class Kill:
    kind: str
    pid: int
    recovered_s: float | None = None
    """Until the cluster was whole again, or served if the plan is eager. None: not in time."""
    state: str = ""
    """Of the cluster that is not whole."""


@dataclass
class Verdict:
    kills: list[Kill] = field(default_factory=list)
    seconds: float = 0.0
    """Of killing."""
    calm: Tally = field(default_factory=Tally)
    load: Tally = field(default_factory=Tally)
    handed_over: dict[str, float] = field(default_factory=dict)
    leaked_blocks: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def faults(self) -> dict[str, list[str]]:
        lost = [f"kill {index} ({k.kind}): {k.state}" for index, k in enumerate(self.kills) if k.recovered_s is None]
        return {
            "wrong tokens, undisturbed": self.calm.wrong + self.calm.hung,
            "wrong tokens": self.load.wrong,
            "hung requests": self.load.hung,
            "leaked blocks": self.leaked_blocks,
            "leftover shared memory and processes": self.leftovers,
            "not whole again": lost,
        }


async def torment(folder: Path, plan: Plan, flags: tuple[str, ...] = (), say: Say = print) -> Verdict:
    """Start a cluster of the model in `folder`, kill as planned, and look at what it did to the requests."""
    verdict, names = Verdict(), shm_names()
    cluster = Cluster(folder, plan.num_prefill, plan.num_decode, flags)
    load = Load(cluster.url, plan.timeout_s, cases(plan.cases_each, plan.seed), plan.seed)
    try:
        if not await until(cluster.is_whole, plan.recovery_s):
            raise AssertionError(f"the cluster is not whole: {await cluster.processes()}")
        await load.learn()
        verdict.calm = await _calm(load, plan)
        load.tally = verdict.load
        await cluster.gateway.workers()
        if not cluster.gateway.handed_over.get("handoff_bytes"):
            raise AssertionError(f"no KV is handed over: {cluster.gateway.handed_over}")
        await _kills(cluster, load, plan, verdict, say)
        await until(cluster.is_whole, plan.recovery_s)
        await _look_for_leaks(cluster, verdict)
        verdict.handed_over = cluster.gateway.handed_over
    finally:
        load.close()
        left = await cluster.stop()
    verdict.leftovers += [f"process {line}" for line in left] + await _names_left(names)
    return verdict


async def _names_left(before: set[str]) -> list[str]:
    """New ones in /dev/shm that nobody uses, and that stay: those of others come and go."""
    found: list[str] = []

    async def none() -> bool:
        found[:] = sorted(shm_names() - before - shm_in_use())
        return not found

    await until(none, PASSING_S)
    return found


async def _calm(load: Load, plan: Plan) -> Tally:
    tally, enough = load.tally, asyncio.Event()
    asyncio.get_running_loop().call_later(plan.calm_s, enough.set)
    await load.press(plan.clients, enough)
    return tally


async def _kills(cluster: Cluster, load: Load, plan: Plan, verdict: Verdict, say: Say) -> None:
    rng, enough = random.Random(plan.seed), asyncio.Event()
    pressing = asyncio.create_task(load.press(plan.clients, enough))
    started = time.monotonic()
    try:
        for index in range(plan.kills):
            await asyncio.sleep(rng.random() * plan.pause_s)
            kill = await _kill(cluster, plan, rng, index)
            verdict.kills.append(kill)
            say(f"{index + 1:4d}  {kill.kind:<10}  {kill.recovered_s or float('nan'):6.1f} s  {_short(verdict)}")
            if kill.recovered_s is None:
                break
    finally:
        verdict.seconds = time.monotonic() - started
        enough.set()
        await pressing


async def _kill(cluster: Cluster, plan: Plan, rng: random.Random, index: int) -> Kill:
    processes = await cluster.processes()
    there = [kind for kind in plan.kinds if processes[kind]]
    kinds = [there[index % len(there)]] if plan.each_once else there
    kind, victim = rng.choice([(kind, process) for kind in kinds for process in processes[kind]])
    killed = time.monotonic()
    victim.kill()
    await asyncio.to_thread(psutil.wait_procs, [victim], 10)
    recovered = await until(cluster.gateway.serves if plan.eager else cluster.is_whole, plan.recovery_s)
    if not recovered:
        return Kill(kind, victim.pid, state=await cluster.state())
    return Kill(kind, victim.pid, time.monotonic() - killed)


async def _look_for_leaks(cluster: Cluster, verdict: Verdict) -> None:
    async def nothing_held() -> bool:
        return (
            not await cluster.gateway.kv_in_use()
            and not cluster.foreign_memory()
            and bool(await cluster.gateway.workers())
        )

    if not await until(nothing_held, LEASE_S + QUIET_S):
        verdict.leaked_blocks = [
            f"{share:.1%} of worker {pid}" for pid, share in (await cluster.gateway.kv_in_use()).items()
        ]
        verdict.leftovers += cluster.foreign_memory()


def _short(verdict: Verdict) -> str:
    tally = verdict.load
    ends = ", ".join(f"{count} {ending}" for ending, count in sorted(tally.endings.items()))
    return f"{ends}; {len(tally.wrong)} wrong"


def table(verdict: Verdict) -> str:
    lines = ["", f"{'killed':<12}{'times':>6}{'back after (s): median':>25}{'longest':>10}"]
    for kind in KINDS:
        took = [k.recovered_s for k in verdict.kills if k.kind == kind and k.recovered_s is not None]
        if took:
            lines.append(f"{kind:<12}{len(took):>6}{statistics.median(took):>25.1f}{max(took):>10.1f}")
    tally = verdict.load
    lines += ["", f"{len(verdict.kills)} kills in {verdict.seconds:.0f} s, {_rate(verdict):.1f} a minute"]
    lines += [f"{tally.endings.total()} requests, {tally.tokens} tokens: {_short(verdict)}"]
    lines += [f"slowest request {tally.slowest_s:.1f} s; hand-offs, as both sides count them: {verdict.handed_over}"]
    lines += [f"  {count:>5} failed: {reason}" for reason, count in tally.reasons.most_common()]
    lines += ["", *(f"{len(faults):>5}  {name}" for name, faults in verdict.faults.items())]
    lines += [f"  {name}: {fault[:2000]}" for name, faults in verdict.faults.items() for fault in faults[:5]]
    return "\n".join(lines)


def _rate(verdict: Verdict) -> float:
    return 60 * len(verdict.kills) / max(1e-9, verdict.seconds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.kill", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kind", default="prefill,decode,gateway,controller,serve", help=f"of {', '.join(KINDS)}")
    parser.add_argument("--prefill", type=int, default=2, help="prefill workers")
    parser.add_argument("--decode", type=int, default=2, help="decode workers")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--eager", action="store_true", help="kill again as soon as a worker of each role serves")
    parser.add_argument("--pause", type=float, default=2.0, help="longest wait before a kill, seconds")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds after which a request has hung")
    parser.add_argument("--recovery", type=float, default=120.0, help="seconds in which the cluster has to be whole")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write everything there")
    parser.add_argument("flags", nargs="*", help="after --: further flags of slipstream serve")
    given = parser.parse_args()
    if unknown := set(given.kind.split(",")) - set(KINDS):
        parser.error(f"--kind: {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
    return given


def main() -> int:
    given = _arguments()
    plan = Plan(
        kills=given.kills,
        kinds=tuple(given.kind.split(",")),
        eager=given.eager,
        num_prefill=given.prefill,
        num_decode=given.decode,
        clients=given.clients,
        pause_s=given.pause,
        timeout_s=given.timeout,
        recovery_s=given.recovery,
        seed=given.seed,
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_sensitive_llama(folder)
        verdict = asyncio.run(torment(folder, plan, tuple(given.flags), lambda line: print(line, flush=True)))
    print(table(verdict))
    if given.json is not None:
        given.json.write_bytes(msgspec.json.encode({"plan": plan, "verdict": verdict, "faults": verdict.faults}))
    return 1 if any(verdict.faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
