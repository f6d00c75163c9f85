"""What holds for every test, and for the processes that tests start."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator

import pytest

# Before NumPy or PyTorch is imported. The matrices here are small, and threads that wait for their part of one spin: a
# test of replanning took 5.7 s of processor time on two cores, and takes 2.6 s on one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIRST = ("tests/kv_transfer/", "tests/placement/", "tests/speculation/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whose files take long come first: where several processes share the tests, none is left with one at the end."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """What is imported and collected stays: a million objects, which the collector need look through neither as they
    come nor each time later."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
