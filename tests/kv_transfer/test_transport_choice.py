"""Which transport a link gets, and what becomes of one that misbehaves."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from sides import Sides, assert_same, connected

from core.errors import TransferError
from kv_transfer.transports import torch_distributed


def _another_token(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, token=b"somebody else")


def _another_host(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, host="elsewhere")


def _no_such_process(sides: Sides) -> None:
    probe = sides.giver._probe
    assert probe is not None
    probe.shared_pool = msgspec.structs.replace(probe.shared_pool, pid=2**22 + 1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_another_token, "is not the giver"),
        (_another_host, "on another host"),
        (_no_such_process, "No such file"),
    ],
)
async def test_a_pool_that_cannot_be_mapped_is_taken_by_the_next_transport(
    spoil: Callable[[Sides], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with connected() as sides:
        spoil(sides)
        sides.offer("t", [5], 10)
        with caplog.at_level(logging.WARNING, "kv_transfer"):
            await sides.take("t", [1], 10)
        assert await sides.end() == ("t", "committed")
        assert_same(sides, [5], [1], 0, 10)
        assert sides.taker.counters.fallbacks == 1
        assert reason in caplog.text


async def test_no_usable_transport_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["shared_memory"]) as sides:
        _another_host(sides)
        with pytest.raises(
            TransferError, match=r"no transport reaches the giver at .*: shared_memory: .* another host"
        ):
            await sides.take("t", [1], 10)


async def test_a_pull_of_something_else_than_agreed_breaks_the_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = torch_distributed.batches

    def short(*arguments: Any) -> list[Any]:
        return [batch._replace(nbytes=batch.nbytes - 1) for batch in honest(*arguments)]

    async with connected(transports=["torch_distributed"]) as sides:
        sides.offer("t", [5], 10)
        monkeypatch.setattr(torch_distributed, "batches", short)
        with pytest.raises(TransferError, match="the giver dropped the pair: these are no pieces of transfer t"):
            await sides.take("t", [1], 10)
        assert await sides.end() == ("t", "aborted")
