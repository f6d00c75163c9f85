"""The links between givers and takers: how they end, and what is remembered."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from sides import connected, layout, wanted

from core.errors import TransferError
from core.links import LinkServer
from kv_transfer import giver as giver_module
from kv_transfer.giving import GiverLink
from kv_transfer.messages import REVISION, SERVICE, Hello, ToGiver
from kv_transfer.taker import Withdrawn


async def test_a_link_that_breaks_ends_its_transfers_and_is_opened_anew() -> None:
    async with connected() as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.server.stop()
        with pytest.raises(TransferError, match=r"is gone"):
            await taking
        sides.offer("t", [5], 10)
        assert await sides.end() == ("t", "failed")

        server = LinkServer()
        server.add_service(SERVICE, ToGiver, sides.giver.on_link)
        host, port = sides.address.split(":")
        await server.start(host, int(port))
        sides.offer("u", [5], 10)
        await sides.take("u", [1], 10)
        assert await sides.end() == ("u", "committed")
        await sides.taker.close()
        await server.stop()


@pytest.mark.parametrize("changes", [{"block_size": 0}, {"tp_size": 0}, {"num_layers": -1}])
async def test_a_giver_that_announces_an_impossible_pool_fails_what_is_to_be_taken(changes: dict[str, int]) -> None:
    async def answer(link: GiverLink) -> None:
        link.send(Hello(revision=REVISION, layout=layout(**changes), num_blocks=4, device="cpu", lease_s=1.0))
        async for _ in link:
            pass

    server = LinkServer()
    server.add_service(SERVICE, ToGiver, answer)
    async with connected() as sides:
        sides.address = await server.start("127.0.0.1")
        with pytest.raises(TransferError, match=rf"malformed message.*`\$\.layout\.{next(iter(changes))}`"):
            await sides.take("t", [1], 10)
    await server.stop()


async def test_closing_the_giver_releases_everything_and_tells_the_taker() -> None:
    async with connected() as sides:
        sides.offer("held", [5], 10)
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.giver.close()
        with pytest.raises(TransferError, match="the prefill worker is stopping") as ended:
            await taking
        assert not isinstance(ended.value, Withdrawn), "the request must be served in another way"
        assert await sides.end() == ("held", "failed")


async def test_closing_the_taker_ends_what_it_takes() -> None:
    async with connected() as sides:
        taking = asyncio.create_task(sides.take("t", [1], 10))
        await wanted(sides, "t")
        await sides.taker.close()
        with pytest.raises(TransferError):
            await taking
        sides.offer("t", [5], 10)
        assert (await sides.end())[0] == "t"


async def test_the_memory_of_ended_transfers_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(giver_module, "MAX_REMEMBERED", 3)
    async with connected() as sides:
        for n in range(10):
            sides.giver.withdraw(f"t{n}", "gone")
        assert list(sides.giver._ended) == ["t7", "t8", "t9"]
        assert not sides.giver._live
        assert dataclasses.asdict(sides.giver.counters) == dataclasses.asdict(type(sides.giver.counters)())


async def test_what_is_remembered_of_an_ended_transfer_holds_no_state_of_drafters() -> None:
    async with connected() as sides:
        sides.offer("t", [5], 10)
        await sides.take("t", [1], 10)
        assert await sides.end() == ("t", "committed")
        assert sides.giver._ended["t"]._state is None
