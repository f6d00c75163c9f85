"""A Ray cluster over two hosts, in network namespaces, whose wire is cut, slow, narrow or lossy while it serves.

    python -m tests.chaos.hosts --seconds 60

One worker is on each host, the gateway beside one of them; KV goes over the wire by TCP, as do requests, tokens and all
that Ray has to say. The zeros are those of kill.py. Needs root, ip(8) and /dev/net/tun. Exit status 1 if one of them is
not zero.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.hosts.namespaces import Host
from bench.hosts.relay import Condition, Wire, missing, two_hosts
from tests.chaos.load import Load, Tally, cases
from tests.chaos.network import CONDITIONS, CUT, cut_now_and_then
from tests.chaos.served import MODEL, Gateway, save_sensitive_llama, shm_in_use, shm_names, until

RAY_PORT, PORT = 6399, 8123
START_S, QUIET_S, END_S = 240.0, 60.0, 60.0
_RAY = ("--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats")
_SERVE = ("--served-model-name", MODEL, "--dtype", "float32")
_SMALL = ("--kv-cache-memory", "1MiB", "--cpus-per-worker", "1", "--handoff-min-tokens", "0", "--kv-transport", "tcp")


def start(host: Host, log: Path, *command: str) -> subprocess.Popen[bytes]:
    """A process on the host; all of them end with the host."""
    root = str(Path(__file__).parents[2])
    env = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}
    with log.open("w") as output:
        arguments = host.command(sys.executable, "-m", *command)
        return subprocess.Popen(arguments, cwd=root, env=env, stdout=output, stderr=subprocess.STDOUT)


def ray_node(host: Host, log: Path, *flags: str) -> None:
    """Returns when it is up."""
    node = start(host, log, "ray.scripts.scripts", "start", "--node-ip-address", host.address, *flags, *_RAY)
    if node.wait(START_S):
        raise RuntimeError(f"Ray does not start on {host.address}: {log.read_text()[-2000:]}")


def ray_over(hosts: tuple[Host, Host], folder: Path) -> str:
    """The address of a Ray cluster that both hosts are nodes of, with one core each."""
    one, other = hosts
    address = f"{one.address}:{RAY_PORT}"
    head = ("--head", "--port", str(RAY_PORT), "--include-dashboard=false", "--temp-dir", str(folder / "ray"))
    ray_node(one, folder / "head.log", *head)
    ray_node(other, folder / "node.log", "--address", address)
    return address


@contextmanager
def served(host: Host, log: Path, address: str, *what: str) -> Iterator[str]:
    """`slipstream serve` with these arguments, on this host. The URL of its gateway, for who is there too."""
    listening = ("--host", "0.0.0.0", "--port", str(PORT))
    server = start(host, log, "cluster", "serve", *what, "--ray-address", address, *listening)
    try:
        yield f"http://{host.address}:{PORT}"
    except BaseException:
        print(log.read_text()[-2000:])
        raise
    finally:
        server.terminate()
        server.wait(END_S)


async def judge(
    wire: Wire, url: str, seconds: float, clients: int, timeout_s: float, seed: int
) -> dict[str, list[str]]:
    """Faults by name, after `seconds` of load under each condition. Runs on the host of the gateway."""
    gateway, load = Gateway(url), Load(url, timeout_s, cases(2, seed), seed)
    faults: dict[str, list[str]] = {"wrong tokens": [], "hung requests": [], "leaked blocks": []}
    try:
        if not await until(gateway.serves, START_S):
            raise AssertionError("the cluster does not come up")
        await load.learn()
        for name, condition in CONDITIONS.items():
            wire.condition = condition
            cutting = asyncio.create_task(cut_now_and_then(wire, seed)) if name == CUT else None
            load.tally, enough = Tally(), asyncio.Event()
            asyncio.get_running_loop().call_later(seconds, enough.set)
            await load.press(clients, enough)
            if cutting is not None:
                cutting.cancel()
            wire.condition = Condition()
            await gateway.workers()
            ends = ", ".join(f"{count} {ending}" for ending, count in load.tally.endings.items())
            print(f"{name:<18}{ends}, slowest {load.tally.slowest_s:.1f} s", flush=True)
            print(f"{'':<18}{gateway.handed_over} {dict(load.tally.reasons)}", flush=True)
            faults["wrong tokens"] += load.tally.wrong
            faults["hung requests"] += load.tally.hung

        async def quiet() -> bool:
            return await gateway.serves() and not await gateway.kv_in_use()

        if not await until(quiet, QUIET_S):
            faults["leaked blocks"] = [f"{await gateway.workers()}"]
    finally:
        load.close()
        await gateway.close()
    return faults


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.hosts", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0, help="of load over each wire")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds after which a request has hung")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if reason := missing():
        parser.error(reason)
    names = shm_names()
    with tempfile.TemporaryDirectory(prefix="sl-", ignore_cleanup_errors=True) as name, two_hosts(given.seed) as made:
        one, other, wire = made
        folder = Path(name)
        save_sensitive_llama(folder)
        address = ray_over((one, other), folder)
        with served(one, folder / "serve.log", address, name, *_SERVE, *_SMALL) as url, one.entered():
            faults = asyncio.run(judge(wire, url, given.seconds, given.clients, given.timeout, given.seed))
    faults["leftover shared memory"] = sorted(shm_names() - names - shm_in_use())
    for fault, found in faults.items():
        print(f"{len(found):>5}  {fault}")
        for text in found[:5]:
            print(f"       {text[:1000]}")
    return 1 if any(faults.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
