"""Fixtures of the hand-off's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import uvloop
from sides import pool_of_noise
from tcp_ends import LAYOUT, Taken

from kv_transfer.pieces import rows_of
from kv_transfer.transports import tcp, tcp_io, tcp_server


@pytest.fixture
def tcp_on_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP sends from the pool, although the runs of these tests are short."""
    monkeypatch.setattr(tcp_io, "MIN_VECTOR_BYTES", 1)


@pytest.fixture
def tcp_by_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """However little there is to send or to receive."""
    for end in (tcp, tcp_server):
        monkeypatch.setattr(end, "QUICK_BYTES", 0)


@pytest.fixture
def taken() -> Taken:
    """A transfer to be, between pools of noise."""
    return Taken(rows_of(pool_of_noise(LAYOUT, seed=1)), rows_of(pool_of_noise(LAYOUT, seed=2)))


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """The loop that workers have: Ray takes uvloop's where it is installed."""
    return {"uvloop": uvloop.new_event_loop}
