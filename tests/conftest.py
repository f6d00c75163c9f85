"""What holds for every test, and for the processes that tests start."""

from __future__ import annotations

import gc
import os

import pytest

# Before NumPy or PyTorch is imported. The matrices here are small, and threads that wait for their part of one spin: a
# test of replanning took 5.7 s of processor time on two cores, and takes 2.6 s on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

CLUSTERS = ("tests/e2e/", "tests/chaos/")
FIRST = ("tests/kv_transfer/", "tests/placement/", "tests/speculation/")
BETWEEN = 4


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes share the tests: whose files take long come first, so that none is left with one at the
    end, and between any BETWEEN of them one that starts a cluster, which waits for it half of the time."""
    files: dict[str, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.nodeid.split("::")[0], []).append(item)
    clusters = [file for file in files if file.startswith(CLUSTERS)]
    others = sorted((file for file in files if file not in clusters), key=lambda file: not file.startswith(FIRST))
    items.clear()
    while clusters or others:
        for file in (*clusters[:1], *others[:BETWEEN]):
            items += files[file]
        del clusters[:1], others[:BETWEEN]


def pytest_collection_finish() -> None:
    """What was imported and collected stays: a million objects, which the collector need not look through each time."""
    gc.collect()
    gc.freeze()
