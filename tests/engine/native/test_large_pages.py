"""Weights are gathered into large pages where they lie."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from engine.native.pages import LARGE, enlarge


def in_large_pages() -> int:
    """Bytes of this process."""
    return 1024 * int(re.findall(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())[0])


def test_numbers_stay_what_they_are_and_where_they_are() -> None:
    numbers = torch.arange(4 * LARGE // 4, dtype=torch.int32)
    address = numbers.data_ptr()

    gathered = enlarge([numbers])

    assert numbers.data_ptr() == address
    assert torch.equal(numbers, torch.arange(4 * LARGE // 4, dtype=torch.int32))
    assert gathered % LARGE == 0
    assert in_large_pages() >= gathered


def test_tensors_of_one_page_share_it() -> None:
    numbers = torch.zeros(4 * LARGE, dtype=torch.uint8)
    inside = -numbers.data_ptr() % LARGE + LARGE // 2
    parts = numbers[inside : inside + 10], numbers[inside + 20 : inside + 30]

    assert {enlarge(parts), enlarge(parts[:1])} <= {0, LARGE}  # the kernel may have no time for it just then


def test_memory_that_cannot_be_gathered_is_left_alone() -> None:
    assert enlarge([]) == 0
    assert enlarge([torch.empty(0)]) == 0
