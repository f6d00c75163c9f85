"""Hosts that are network namespaces: whoever makes them leaves none behind."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.hosts import shaped

MEASURING = """
import signal
import subprocess
from bench.hosts.shaped import two_hosts

signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
with two_hosts(1e9) as (one, other):
    subprocess.run(one.command("sh", "-c", "echo here; exec sleep 60"), check=False)
"""
"""Whatever the tests were started by has these signals ignored, as a shell does in the background."""


def namespaces_of(process: subprocess.Popen[str]) -> set[str]:
    return {path.name for path in Path("/run/netns").glob(f"slipstream-{process.pid}-*")}


@pytest.mark.skipif(bool(shaped.missing()), reason=f"two hosts on one machine: {shaped.missing()}")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_hosts_are_gone_as_soon_as_the_process_that_made_them_was_told_to_end(number: signal.Signals) -> None:
    command = [sys.executable, "-c", MEASURING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "here\n"
        assert len(namespaces_of(process)) == 2
        process.send_signal(number)
        process.send_signal(number)  # whoever is impatient changes nothing
        assert process.wait(30) != 0
        assert not namespaces_of(process)
        assert process.stdout.read() == ""  # nor does the process on the host live on, which would have it open
