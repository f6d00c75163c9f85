"""NIXL, where it is installed, and the word that it is not."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
from sides import STATE, Gate, Sides, connected, layout, pool_of_noise, tokens

from core.errors import ChecksumMismatch, ConfigError, TransferError
from kv_transfer.messages import Hello, NixlEndpoint
from kv_transfer.transports import nixl
from kv_transfer.transports.base import Unusable
from kv_transfer.transports.nixl import Nixl, NixlPool

INSTALLED = pytest.mark.skipif(not nixl.installed(), reason="needs the nixl package")
THEIRS, OURS, NUM_TOKENS = [5, 6, 9, 2], [60, 3, 4, 1], 50
ENDPOINT = NixlEndpoint(b"", 0, "DRAM", 0)


def arrived(sides: Sides) -> None:
    np.testing.assert_array_equal(
        tokens(sides.taker_pool, OURS, 0, NUM_TOKENS), tokens(sides.giver_pool, THEIRS, 0, NUM_TOKENS)
    )


async def test_without_the_package_it_cannot_be_used_and_cannot_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "installed", lambda: False)
    pool = pool_of_noise(layout(), 1)
    with pytest.raises(Unusable, match="nixl is not installed"):
        Nixl(Hello(layout=layout(), num_blocks=1, device="cpu", nixl=ENDPOINT), pool)
    with pytest.raises(ConfigError, match=r"pip install 'slipstream\[nixl\]'"):
        NixlPool(pool)


async def test_a_giver_that_does_not_offer_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "installed", lambda: True)
    with pytest.raises(Unusable, match="does not offer"):
        Nixl(Hello(layout=layout(), num_blocks=1, device="cpu"), pool_of_noise(layout(), 1))


@INSTALLED
async def test_the_kv_arrives_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    monkeypatch.setattr("kv_transfer.transports.batches.BATCH_BYTES", 2000)
    async with connected(transports=["nixl"], nixl=True) as sides:
        for transfer_id in ("t", "u"):
            sides.offer(transfer_id, THEIRS, NUM_TOKENS)
            assert await sides.take(transfer_id, OURS, NUM_TOKENS) == STATE
            assert await sides.end() == (transfer_id, "committed")
            arrived(sides)


@INSTALLED
async def test_a_cancel_waits_for_the_copy_and_the_next_transfer_has_a_new_agent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with connected(transports=["nixl"], nixl=True) as sides:
        gate = Gate(monkeypatch, nixl, "land")
        sides.offer("t", THEIRS, NUM_TOKENS)
        taking = asyncio.create_task(sides.take("t", OURS, NUM_TOKENS))
        await gate.reached.wait()
        taking.cancel()
        assert await sides.end() == ("t", "aborted")
        assert not taking.done()
        gate.opened.set()
        with pytest.raises(asyncio.CancelledError):
            await taking
        sides.offer("u", THEIRS, NUM_TOKENS)
        await sides.take("u", OURS, NUM_TOKENS)
        assert await sides.end() == ("u", "committed")
        arrived(sides)


@INSTALLED
async def test_kv_that_is_not_what_was_sealed_is_never_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(transports=["nixl"], nixl=True) as sides:

        def zeros(job: Any, batch: Any, buffer: Any) -> None:
            whole(job, batch, buffer * 0)

        whole = nixl.land
        monkeypatch.setattr(nixl, "land", zeros)
        sides.offer("t", THEIRS, NUM_TOKENS)
        with pytest.raises(ChecksumMismatch):
            await sides.take("t", OURS, NUM_TOKENS)
        assert (await sides.end())[0] == "t"


@INSTALLED
async def test_a_giver_that_is_not_there_is_a_transfer_error() -> None:
    async with connected(transports=["nixl"], nixl=True) as sides:
        assert sides.giver._nixl is not None
        sides.giver._nixl.endpoint = NixlEndpoint(b"no agent", 0, "DRAM", 0)
        sides.offer("t", THEIRS, NUM_TOKENS)
        with pytest.raises(TransferError, match="NIXL failed"):
            await sides.take("t", OURS, NUM_TOKENS)
        assert (await sides.end())[0] == "t"
