"""A few hand-offs over every wire. The long version is `python -m tests.chaos.network`."""

from __future__ import annotations

import asyncio

import pytest

from bench.hosts import relay
from tests.chaos.network import CONDITIONS, CUT, TRANSPORTS, Pair

pytestmark = pytest.mark.skipif(bool(relay.missing()), reason=f"two hosts on one machine: {relay.missing()}")


async def test_over_a_bad_wire_every_transfer_ends_and_what_is_committed_is_right() -> None:
    """Each transport over a wire of its own, all at the same time: most of it is waiting."""
    async with asyncio.TaskGroup() as group:
        for transport in TRANSPORTS:
            group.create_task(over_bad_wires(transport))


async def over_bad_wires(transport: str) -> None:
    with relay.two_hosts() as (one, other, between):
        async with Pair.join(between, (one, other), transport) as pair:
            for name in CONDITIONS:
                result = await pair.hand_over(name, count=3, seed=1)
                assert result.wrong == result.hung == result.leaked == [], (transport, name)
                # What was made for another wire may be too slow for this: a pair of torch's whose ends meet too late, a
                # connection that is older than the delay. It is given up; elsewhere another transport has its turn.
                assert name == CUT or result.committed >= 2, (transport, name, result.reasons)
