"""`python -m bench.links`."""

from __future__ import annotations

import json
import subprocess
import sys


def test_both_kinds_are_measured() -> None:
    command = [sys.executable, "-m", "bench.links", "--rounds", "20", "--runs", "1", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=120).stdout)
    for kind in ("link", "grpc"):
        assert 0 < found[kind]["round_us"] <= found[kind]["p99_us"]


def test_rounds_that_measure_nothing_are_refused() -> None:
    ran = subprocess.run([sys.executable, "-m", "bench.links", "--rounds", "1"], capture_output=True, text=True)
    assert ran.returncode == 2
    assert "--rounds must be 2 at least" in ran.stderr
