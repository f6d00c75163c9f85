"""Giver and taker together, over a real link."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from sides import STATE, connected, tokens

pytestmark = pytest.mark.asyncio(loop_scope="module")  # gRPC's poller outlives a loop and would call into a closed one

TRANSPORTS = ["shared_memory", "torch_distributed"]


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("offer_first", [True, False])
async def test_the_kv_arrives_bit_for_bit_and_the_giver_is_free(transport: str, offer_first: bool) -> None:
    async with connected(transports=[transport]) as sides:
        theirs, ours = [5, 6, 9, 2], [60, 3, 4, 1]
        if offer_first:
            sides.giver.offer("t", theirs, 50, STATE)
            taking = asyncio.create_task(sides.take("t", ours, 50))
        else:
            taking = asyncio.create_task(sides.take("t", ours, 50))
            await asyncio.sleep(0)
            sides.giver.offer("t", theirs, 50, STATE)
        assert await taking == STATE
        np.testing.assert_array_equal(tokens(sides.taker_pool, ours, 0, 50), tokens(sides.giver_pool, theirs, 0, 50))
