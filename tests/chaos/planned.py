"""Two hosts as an operator would go about them: their topology with the link measured, a plan for it, the plan served,
and a split whose workers change their roles when its load turns out to be another.

    slipstream profile demo --threads 1 --beside 1 --out profile.json
    python -m tests.chaos.planned --profile profile.json

The hosts are network namespaces with a cable of --mbit between them, on one machine, whose processors they share. Needs
root, ip(8) and tc(8). Exit status 1 if something is not as it should be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

from bench.hosts.namespaces import Host
from bench.hosts.shaped import missing, two_hosts
from placement.topology import read_topology
from tests.chaos.hosts import END_S, START_S, ray_over, served, start
from tests.chaos.served import Gateway, until

COMMAND_S = 300.0
SPLIT = ("demo", "--prefill-replicas", "1", "--decode-replicas", "1", "--cpus-per-worker", "1")
_SMALL = ("--kv-cache-memory", "1GiB")
_LATE = ("--dataset-name", "random", "--random-input-len", "40", "--random-output-len", "200", "--ignore-eos")


def output_of(host: Host, log: Path, *command: str) -> str:
    """What `slipstream` prints there. Raises RuntimeError."""
    process = start(host, log, "cluster", *command)
    if process.wait(COMMAND_S):
        raise RuntimeError(f"{command[0]} failed: {log.read_text()[-2000:]}")
    return log.read_text()


async def _ready(url: str) -> bool:
    gateway = Gateway(url)
    try:
        return await until(gateway.is_healthy, START_S)
    finally:
        await gateway.close()


def until_ready(url: str) -> None:
    if not asyncio.run(_ready(url)):
        raise RuntimeError(f"nobody serves at {url}")


def answer(url: str) -> str:
    asked = {"model": "demo", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    replied = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60.0)
    return str(replied.raise_for_status().json()["choices"][0]["message"]["content"])


def change(url: str, load: subprocess.Popen[bytes]) -> dict[str, Any]:
    """What replanning shows when it has changed something, or when the load is over."""
    while True:
        running = load.poll() is None
        status: dict[str, Any] = httpx.get(f"{url}/replanning", timeout=10.0).json()
        if status["decisions"] or not running:
            return status
        time.sleep(1.0)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.planned", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--profile", required=True, help="of `demo`, one thread, on this machine")
    parser.add_argument("--mbit", type=float, default=1000.0, help="what the cable carries")
    parser.add_argument("--slo", default="ttft=1500,tpot=36")
    parser.add_argument("--rate", type=float, default=4.0, help="requests per second of 40 and 200 tokens")
    parser.add_argument("--seconds", type=float, default=75.0, help="of that load")
    given = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    found: dict[str, bool] = {}

    def note(what: str, is_so: bool, shown: object) -> None:
        found[what] = is_so
        print(f"{'ok' if is_so else 'NOT SO':<8}{what}: {shown}", flush=True)

    with (
        tempfile.TemporaryDirectory(prefix="sl-", ignore_cleanup_errors=True) as name,
        two_hosts(given.mbit * 1e6) as hosts,
    ):
        one, folder = hosts[0], Path(name)
        address = ray_over(hosts, folder)
        output_of(
            one, folder / "a.log", "topology", "--ray-address", address, "--measure", "--out", str(folder / "t.yaml")
        )
        measured = read_topology(folder / "t.yaml")
        rate = measured.links[0].gb_per_s * 8000
        note("link as measured, of what it carries", 0.8 < rate / given.mbit < 1.05, f"{rate / given.mbit:.2f}")
        planned = ("--profile", given.profile, "--topology", str(folder / "t.yaml"), "--slo", given.slo)
        lengths = ("--lengths", "prompt=200,output=60")
        plan = output_of(one, folder / "plan.json", "plan", "demo", *planned, *lengths, "--json")
        note("a plan for both hosts", json.loads(plan)["chosen"]["devices"] == 2, json.loads(plan)["chosen"]["name"])
        with one.entered():
            with served(one, folder / "planned.log", address, "--plan", str(folder / "plan.json")) as url:
                until_ready(url)
                note("the plan, served", bool(answer(url)), repr(answer(url)))
            targets = ("--replan-profile", given.profile, "--replan-slo", given.slo, "--replan-interval", "5")
            with served(one, folder / "split.log", address, *SPLIT, *_SMALL, "--replan", "on", *targets) as url:
                until_ready(url)
                count = str(int(given.rate * given.seconds))
                loading = ("--base-url", url, "--request-rate", str(given.rate), "--num-prompts", count)
                load = start(one, folder / "load.log", "cluster", "bench", "serve", *loading, *_LATE)
                began = time.monotonic()
                shown = change(url, load)
                took = f"after {time.monotonic() - began:.0f} s: {shown['arrangement']}"
                note("roles change", shown["arrangement"].startswith("2 of both"), took)
                load.wait(COMMAND_S + END_S)
                printed = (folder / "load.log").read_text()
                counted = dict(line.split(":", 1) for line in printed.splitlines() if line.count(":") == 1)
                served_all = counted.get("Successful requests", "").strip() == count
                note("nothing is lost", served_all, f"{count} requests" if served_all else printed[-2000:])
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
