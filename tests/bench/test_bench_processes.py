"""Processes of our own that something is measured with."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest

from bench.processes import Module, running
from core.errors import ConfigError
from tests.children import children_with


def meeting(folder: Path, one: str, other: str) -> Module:
    return Module("tests.bench.meeting", f"{folder} {one} {other}", f"the {one}")


def children() -> list[psutil.Process]:
    return children_with("tests.bench.meeting")


def test_they_are_started_at_the_same_time_and_end_together(tmp_path: Path) -> None:
    with running([meeting(tmp_path, "a", "b"), meeting(tmp_path, "b", "a")]) as started:
        assert [process.ready for process in started] == ["a met b", "b met a"]
        there = children()
        assert len(there) == 2
    assert not any(process.is_running() for process in there)


def test_one_that_ends_too_soon_is_named_and_the_others_end(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match="the none ended before it was ready"),
        running([meeting(tmp_path, "a", "a"), Module("tests.bench.none", "", "the none")]),
    ):
        pytest.fail("it can't have been ready")
    assert children() == []


def test_one_that_does_not_end_is_killed(tmp_path: Path) -> None:
    with running([meeting(tmp_path, "a", "a")], end_s=0.0) as (process,):
        (there,) = children()
        process.signal(signal.SIGSTOP)
    assert not there.is_running()
