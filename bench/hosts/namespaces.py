"""Hosts that are network namespaces of this machine. Needs root."""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

_CLONE_NEWNET = 0x40000000
_pairs = itertools.count()
_ENDING = (signal.SIGTERM, signal.SIGHUP)
"""What ends a process on the spot, unlike SIGINT, which Python raises."""


@dataclass(frozen=True)
class Host:
    namespace: str
    """Empty: the one we are in."""
    address: str

    def command(self, *arguments: str) -> list[str]:
        """What runs these in the namespace."""
        return ["ip", "netns", "exec", self.namespace, *arguments] if self.namespace else list(arguments)

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The sockets and processes that this thread makes are on the host."""
        with (
            Path("/proc/thread-self/ns/net").open() as before,
            Path(f"/run/netns/{self.namespace}").open() as namespace,
        ):
            _set_namespace(namespace.fileno())
            try:
                yield
            finally:
                _set_namespace(before.fileno())


LOOPBACK = Host("", "127.0.0.1")


def missing() -> str:
    """Why namespaces can't be made here; empty if they can."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "needs root on Linux"
    if shutil.which("ip") is None:
        return "needs ip(8)"
    name = f"slipstream-{os.getpid()}-probe"
    if run("ip", "netns", "add", name).returncode:
        return "may not make network namespaces"
    must("ip", "netns", "del", name)
    return ""


@contextmanager
def two_namespaces() -> Iterator[tuple[Host, Host]]:
    """Without a link. Made, and removed in any case but SIGKILL, with every process that is still in them. There may be
    several pairs at a time, with the same addresses, none of which hears of another."""
    _remove_stale()
    pair = next(_pairs)
    one, other = (Host(f"slipstream-{os.getpid()}-{name}{pair}", f"10.199.0.{n}") for n, name in ((1, "a"), (2, "b")))
    with _signals(_ENDING, _end):
        try:
            for host in (one, other):
                must("ip", "netns", "add", host.namespace)
            yield one, other
        finally:
            late: list[int] = []
            with _signals((*_ENDING, signal.SIGINT), lambda number, _: late.append(number)):
                for host in (one, other):
                    _remove(host.namespace)
            for number in late:
                signal.raise_signal(number)


def device_name(host: Host) -> str:
    """Of a device that only this host has; at most 15 letters."""
    _, pid, pair = host.namespace.split("-")
    return f"sl{int(pid) % 10**6}{pair}"


def bring_up(host: Host, device: str) -> None:
    """The device becomes the host's, with its address."""
    must("ip", "link", "set", device, "netns", host.namespace)
    inside = ("-n", host.namespace)
    must("ip", *inside, "addr", "add", f"{host.address}/24", "dev", device)
    must("ip", *inside, "link", "set", device, "up")
    must("ip", *inside, "link", "set", "lo", "up")


def choose_congestion_control(host: Host, name: str) -> None:
    """For connections that are made on the host from now on. Raises OSError if the kernel has none of that name."""
    with host.entered():
        Path("/proc/sys/net/ipv4/tcp_congestion_control").write_text(name)


def must(*command: str) -> None:
    """Raises RuntimeError, with what the command says, if it fails."""
    if (ended := run(*command)).returncode:
        raise RuntimeError(f"{' '.join(command)}: {ended.stderr.strip()}")


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603  our own words


@contextmanager
def _signals(numbers: Sequence[int], handle: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Those that are not ignored go there. In another thread than the main one, which can't say so, nothing changes."""
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in numbers if main}
    told = {number: earlier for number, earlier in before.items() if earlier not in (signal.SIG_IGN, None)}
    try:
        for number in told:
            signal.signal(number, handle)
        yield
    finally:
        for number, earlier in told.items():
            signal.signal(number, earlier)


def _end(number: int, _: FrameType | None) -> NoReturn:
    """Through everything that cleans up; the status is a shell's for a process that the signal has ended."""
    raise SystemExit(128 + number)


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)  # os.setns came with Python 3.12
    if libc.setns(descriptor, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot enter the network namespace")


def _remove_stale() -> None:
    """Namespaces of a run that was killed."""
    for path in Path("/run/netns").glob("slipstream-*"):
        pid = path.name.split("-")[1]
        if not Path(f"/proc/{pid}").exists():
            _remove(path.name)


def _remove(namespace: str) -> None:
    if not Path(f"/run/netns/{namespace}").exists():
        return
    for pid in run("ip", "netns", "pids", namespace).stdout.split():
        with suppress(ProcessLookupError):
            os.kill(int(pid), signal.SIGKILL)
    must("ip", "netns", "del", namespace)
