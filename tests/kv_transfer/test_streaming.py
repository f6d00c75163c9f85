"""KV leaves while the prompt is still computed, and nothing that is not final ever does."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import numpy as np
import pytest
from sides import STATE, TIMEOUT_S, Sides, assert_same, connected, layout, wanted

from core.errors import TransferError
from kv_transfer.codecs.names import CodecName
from kv_transfer.counters import TransferCounters
from kv_transfer.giving import Giving
from kv_transfer.messages import Complete, Offer, Piece, Sealed, SequenceState
from kv_transfer.pieces import Frontier, rows_of, slots_of
from kv_transfer.sealing import Source
from kv_transfer.states import TakerTransfer
from kv_transfer.taker import Withdrawn
from kv_transfer.taking import Reservation, Taking
from kv_transfer.transports.shared_memory import SharedMemory

pytestmark = pytest.mark.usefixtures("tcp_on_the_pools")

EACH = pytest.mark.parametrize("transport", ["shared_memory", "tcp", "torch_distributed"])
LAYOUT = layout(num_layers=6)


class Prompt:
    """An engine that computes 50 tokens, or 40 after the 10 that it has cached, in chunks, layer by layer."""

    def __init__(self, sides: Sides, seed: int = 0) -> None:
        self.sides, self.blocks = sides, [5, 6, 9, 2]
        self.slots = slots_of(self.blocks, 16, 50)
        self.random = np.random.default_rng(seed)
        sides.giver.open("t", self.blocks, 50)

    def compute(self, start: int, stop: int, layer: int) -> None:
        rows = rows_of(self.sides.giver_pool)
        part = rows[layer][:, self.slots[start:stop]]
        rows[layer][:, self.slots[start:stop]] = self.random.integers(0, 256, part.shape, dtype=np.uint8)
        done = layer + 1 == LAYOUT.num_layers
        frontier = Frontier(stop) if done else Frontier(start, stop - start, layer + 1)
        self.sides.giver.written("t", frontier)

    async def chunk(self, start: int, stop: int, turns: int = 0) -> None:
        for layer in range(LAYOUT.num_layers):
            for _ in range(turns):
                await asyncio.sleep(0)
            self.compute(start, stop, layer)


async def verified(sides: Sides, count: int) -> None:
    """Returns when the taker has so many pieces of the transfer."""
    peer = await next(iter(sides.taker._peers.values()))
    while len(peer.recipients["t"]._machine.verified) < count:  # type: ignore[attr-defined]
        await asyncio.sleep(0)


@EACH
async def test_layers_and_chunks_leave_before_the_prompt_is_complete(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1)
    async with connected(LAYOUT, LAYOUT, transports=[transport]) as sides:
        taking = asyncio.create_task(sides.take("t", [1, 2, 3, 4], 50))
        await wanted(sides, "t")
        prompt = Prompt(sides)
        prompt.compute(0, 30, 0)
        await asyncio.wait_for(verified(sides, 30), TIMEOUT_S)  # the first layer of the first chunk, token by token
        for layer in range(1, 6):
            prompt.compute(0, 30, layer)
        await asyncio.wait_for(verified(sides, 6 * 30), TIMEOUT_S)
        assert not taking.done()
        await prompt.chunk(30, 50)
        sides.giver.complete("t", STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, prompt.blocks, [1, 2, 3, 4], 0, 50)
        counters = sides.taker.counters
        assert 0 < counters.overlap_seconds <= counters.wire_seconds
        assert counters.wait_seconds > 0


@EACH
@pytest.mark.parametrize("start", [0, 16, 48])
@pytest.mark.parametrize("asks", ["first", "between", "last"])
async def test_whenever_the_taker_asks_it_gets_what_is_final_and_no_more(
    transport: str, start: int, asks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The giver's blocks hold something else before they are computed."""
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 3000)
    async with connected(LAYOUT, LAYOUT, transports=[transport]) as sides:
        reserved, taking = sides.expect("t")
        await wanted(sides, "t")
        reservation = sides.taker.reservation([1, 2, 3, 4], start_token=start, num_tokens=50)
        prompt = Prompt(sides, seed=start)
        sides.giver.written("t", Frontier(10))  # of which the prefix cache had the KV
        if asks == "first":
            reserved.set_result(reservation)
        await prompt.chunk(10, 33, turns=3)
        if asks == "between":
            reserved.set_result(reservation)
        await prompt.chunk(33, 50, turns=7)
        sides.giver.complete("t", STATE)
        if asks == "last":
            reserved.set_result(reservation)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, prompt.blocks, [1, 2, 3, 4], start, 50)
        assert sides.taker.counters.bytes == (50 - start) * LAYOUT.token_bytes


async def test_the_last_pieces_are_named_with_the_word_that_they_are_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a request waits for is one message, and one piece less to wait for a thread."""
    sealed_in: list[tuple[int, bool]] = []
    said: list[Any] = []
    seal, send = Source.seal, Giving._send

    def sealing(source: Source, slots: Any, extents: Any, *rest: Any) -> Any:
        sealed_in.append((len(extents), threading.current_thread() is threading.main_thread()))
        return seal(source, slots, extents, *rest)

    def sending(giving: Giving, message: Any) -> None:
        said.append(message)
        send(giving, message)

    monkeypatch.setattr(Source, "seal", sealing)
    monkeypatch.setattr(Giving, "_send", sending)
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 30 * LAYOUT.token_bytes)
    async with connected(LAYOUT, LAYOUT) as sides:
        taking = asyncio.create_task(sides.take("t", [1, 2, 3, 4], 50))
        await wanted(sides, "t")
        prompt = Prompt(sides)
        await prompt.chunk(0, 30)
        await asyncio.wait_for(verified(sides, 1), TIMEOUT_S)
        await prompt.chunk(30, 50)
        sides.giver.complete("t", STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert_same(sides, prompt.blocks, [1, 2, 3, 4], 0, 50)
        sides.giver.open("whole", prompt.blocks, 50)
        sides.giver.complete("whole", STATE)
        await sides.take("whole", [1, 2, 3, 4], 50)
        assert await sides.end() == ("whole", "committed")
    named = [
        (type(message).__name__, len(getattr(message, "pieces", getattr(message, "last", ())))) for message in said
    ]
    assert named == [("Offer", 0), ("Sealed", 1), ("Complete", 1), ("Offer", 0), ("Complete", 2)]
    assert sealed_in == [(1, True), (1, True), (2, False)]


async def test_a_request_goes_on_before_its_hand_off_is_acknowledged_and_one_piece_needs_no_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[str] = []
    wrap_up = Taking._wrap_up

    def wrapping_up(taking: Taking) -> None:
        order.append("acknowledged")
        wrap_up(taking)

    monkeypatch.setattr(Taking, "_wrap_up", wrapping_up)
    monkeypatch.setattr(SharedMemory, "pull", None)  # which has threads
    async with connected(transports=["shared_memory"]) as sides:
        sides.offer("t", [1, 2], 20)
        assert await sides.take("t", [3, 4], 20) == STATE
        order.append("goes on")
        assert await sides.end() == ("t", "committed")
        assert sides.taker.counters.committed == 1
        assert_same(sides, [1, 2], [3, 4], 0, 20)
    assert order == ["goes on", "acknowledged"]


async def test_a_prompt_that_is_aborted_half_way_ends_the_transfer_and_frees_the_blocks_once() -> None:
    async with connected(LAYOUT, LAYOUT) as sides:
        taking = asyncio.create_task(sides.take("t", [1, 2, 3, 4], 50))
        await wanted(sides, "t")
        prompt = Prompt(sides)
        await prompt.chunk(0, 20)
        await asyncio.wait_for(verified(sides, 1), TIMEOUT_S)
        sides.giver.withdraw("t", "aborted")
        await prompt.chunk(20, 30)  # the engine had not heard yet
        with pytest.raises(Withdrawn, match="aborted"):
            await taking
        assert await sides.end() == ("t", "aborted")


async def test_a_taker_that_gives_up_half_way_frees_the_blocks_at_once() -> None:
    async with connected(LAYOUT, LAYOUT) as sides:
        taking = asyncio.create_task(sides.take("t", [1, 2, 3, 4], 50))
        await wanted(sides, "t")
        prompt = Prompt(sides)
        await prompt.chunk(0, 20)
        await asyncio.wait_for(verified(sides, 1), TIMEOUT_S)
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
        assert await sides.end() == ("t", "aborted")
        await prompt.chunk(20, 50)
        sides.giver.complete("t", STATE)


# --- what a giver says is not believed -------------------------------------------------------------------------------


class Silent:
    """A peer and its transport that do nothing, slowly."""

    def __init__(self, sides: Sides) -> None:
        self.address, self.giver, self.recipients = "nowhere", sides.giver._hello(None, {}), {}
        self.link = self.transport = self

    def next_codec(self) -> CodecName:
        return "none"

    def send(self, message: Any) -> None: ...

    def pull_at_once(self, job: Any) -> bool:
        return False

    async def pull(self, job: Any) -> None:
        await asyncio.Event().wait()

    def forget(self, transfer_id: str) -> None: ...


WHOLE = Piece(0, 20, 0, 6, checksum=0)


@pytest.mark.parametrize(
    ("offered", "said", "reason"),
    [
        ({"num_tokens": 21}, [], "disagree about the prompt"),
        ({"start_token": 1}, [], "disagree about the prompt"),
        ({"block_ids": [1]}, [], "does not fit the pool"),
        ({"block_ids": [1, 64]}, [], "does not fit the pool"),
        ({"block_ids": [1, -1]}, [], "does not fit the pool"),
        ({"layout": layout(8, num_layers=6)}, [], "does not fit the pool"),
        ({"codec": "int8"}, [], "is given in codec int8, none was asked for"),
        ({}, [[WHOLE, Piece(3, 1, 2, 1, checksum=0)]], "cover a part twice"),
        ({}, [[WHOLE], [WHOLE]], "cover a part twice"),
        ({}, [[Piece(0, 21, 0, 6, checksum=0)]], "or one it has not"),
        ({}, [[Piece(-1, 3, 0, 6, checksum=0)]], "or one it has not"),
        ({}, [[Piece(0, 20, 5, 2, checksum=0)]], "or one it has not"),
        ({}, [[Piece(0, 20, 0, 5, checksum=0)], None], "do not cover all of its KV"),
    ],
)
@pytest.mark.parametrize("with_the_last_word", [False, True])
async def test_what_does_not_fit_the_reservation_is_refused(
    offered: dict[str, Any], said: list[list[Piece] | None], reason: str, *, with_the_last_word: bool
) -> None:
    async with connected(LAYOUT, LAYOUT) as sides:
        pool = sides.taker_pool
        reserved: asyncio.Future[Reservation] = asyncio.get_running_loop().create_future()
        reserved.set_result(Reservation(pool, rows_of(pool), [7, 8], 0, 20))
        taking = Taking("t", Silent(sides), TakerTransfer(10, 10, 1e9), TransferCounters())  # type: ignore[arg-type]
        task = asyncio.create_task(taking.run(reserved))
        await asyncio.sleep(0)
        fields = {"layout": LAYOUT, "start_token": 0, "num_tokens": 20, "block_ids": [1, 2], "codec": "none"}
        taking.on_message(Offer(transfer_id="t", **fields | offered))
        num_pieces = 0
        state = SequenceState(token_ids=[1])
        for place, pieces in enumerate(said):
            if pieces is None:
                taking.on_message(Complete("t", num_pieces, state, 0.0))
                continue
            first, num_pieces = num_pieces, num_pieces + len(pieces)
            if with_the_last_word and said[place + 1 :] in ([], [None]):
                taking.on_message(Complete("t", num_pieces, state, 0.0, last=pieces))
            else:
                taking.on_message(Sealed("t", first, pieces))
        with pytest.raises(TransferError, match=reason):
            await asyncio.wait_for(task, TIMEOUT_S)
