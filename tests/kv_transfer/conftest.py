"""Fixtures of the hand-off's tests."""

from __future__ import annotations

import pytest

from kv_transfer.transports import tcp_io


@pytest.fixture
def tcp_on_the_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """TCP sends from the pool, although the runs of these tests are short."""
    monkeypatch.setattr(tcp_io, "MIN_VECTOR_BYTES", 1)
