"""A plan for several nodes, on a Ray cluster that has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from placement.topology import read_topology

pytestmark = pytest.mark.e2e


def test_pairs_share_a_node_of_those_that_may_be_used(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.placed_on_nodes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert found["groups"] == ["a", "a", "b", "b"], "never on c, whose label is another"
    assert found["strategies"] == ["STRICT_PACK"]
    assert found["gateway"] == ["b"], "the node that was named, one of three"
    (tmp_path / "topology.yaml").write_text(found["topology"])
    measured = read_topology(tmp_path / "topology.yaml")
    assert measured.pools == {"cpu": 12}
    assert measured.source == "a Ray cluster, measured links"
    assert found["roles"] == [["a", "decode"], ["a", "prefill"], ["b", "decode"], ["b", "prefill"]]
