"""Hand-offs in a codec: what arrives, over which transports, in which codec, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sides import STATE, Gate, Sides, connected, layout, tokens, wanted
from test_codecs import LOSSY
from test_unlike_groups import layout as split_layout
from test_unlike_groups import split_rows

from core.errors import ChecksumMismatch, TransferError
from kv_transfer import frames, giving
from kv_transfer.codecs.bandwidth import LinkBandwidth
from kv_transfer.codecs.base import PieceShape
from kv_transfer.codecs.choice import CodecSpeed
from kv_transfer.codecs.names import CodecName
from kv_transfer.codecs.registry import CODECS
from kv_transfer.codecs.speeds import CodecSpeeds
from kv_transfer.coding import Coding
from kv_transfer.pieces import Extent, Frontier
from kv_transfer.taker import Withdrawn
from kv_transfer.transports import batches, pair_server, tcp_io, tcp_server, torch_distributed
from kv_transfer.transports.names import TransportName

EACH = pytest.mark.parametrize("transport", ["tcp", "torch_distributed"])
THEIRS, OURS, NUM_TOKENS = [5, 6, 9, 2], [60, 3, 4, 1], 50


def filled(sides: Sides) -> None:
    """The giver's pool holds numbers, as the model's does."""
    noise = torch.randn(sides.giver_pool.data.shape, generator=torch.Generator().manual_seed(3))
    sides.giver_pool.data.copy_(noise)


def values(rows: Any) -> torch.Tensor:
    return torch.from_numpy(rows).view(torch.bfloat16).double()


def error(sides: Sides, theirs: list[int], ours: list[int], start: int, stop: int) -> float:
    """Root mean square of the difference, relative to what was given."""
    given = values(tokens(sides.giver_pool, theirs, start, stop))
    taken = values(tokens(sides.taker_pool, ours, start, stop))
    return float((taken - given).norm() / given.norm())


def arrived(sides: Sides, codec: str) -> None:
    assert 0 < error(sides, THEIRS, OURS, 0, NUM_TOKENS) < LOSSY[codec]


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1500)
    monkeypatch.setattr(batches, "BATCH_BYTES", 2000)
    monkeypatch.setattr(batches, "MESSAGE_BYTES", 1000)
    monkeypatch.setattr(tcp_io, "BATCH_BYTES", 2000)


# --- what arrives ----------------------------------------------------------------------------------------------------


@EACH
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(("theirs", "ours", "start"), [(16, 8, 0), (8, 32, 32)])
async def test_the_kv_is_as_near_as_the_codec_brings_it_whatever_the_block_sizes(
    transport: str, codec: CodecName, theirs: int, ours: int, start: int
) -> None:
    async with connected(layout(theirs), layout(ours), transports=[transport], codec=codec) as sides:
        filled(sides)
        theirs_table, ours_table = list(range(40, 40 + 128 // theirs)), list(range(20, 20 - 128 // ours, -1))
        before = tokens(sides.taker_pool, ours_table, 0, start)
        sides.offer("t", theirs_table, 117)
        assert await sides.take("t", ours_table, 117, start=start) == STATE
        assert await sides.end() == ("t", "committed")
        lost = error(sides, theirs_table, ours_table, start, 117)
        assert lost == 0 if codec == "none" else 0 < lost < LOSSY[codec]
        np.testing.assert_array_equal(tokens(sides.taker_pool, ours_table, 0, start), before)
        given, taken = sides.giver.counters, sides.taker.counters
        assert sides.exact == [codec == "none"]
        assert taken.bytes == (117 - start) * sides.giver_pool.layout.token_bytes
        assert set(taken.wire_bytes) == {codec}
        assert (taken.wire_bytes[codec] < taken.bytes) == (codec != "none")
        assert (given.encode_seconds > 0) == (codec != "none")
        assert (0 < taken.decode_seconds < taken.wire_seconds) == (codec != "none")


@EACH
@pytest.mark.usefixtures("small_pieces")
async def test_a_piece_that_a_frame_would_make_larger_comes_as_it_is(transport: str) -> None:
    async with connected(transports=[transport], codec="int8") as sides:
        filled(sides)
        taking = asyncio.create_task(sides.take("t", OURS, NUM_TOKENS))
        await wanted(sides, "t")
        sides.giver.open("t", THEIRS, NUM_TOKENS)
        sides.giver.written("t", Frontier(1))  # of one token a scale for each channel is larger than the channels
        while not sides.giver._live["t"]._pieces:
            await asyncio.sleep(0)
        sides.giver.complete("t", STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert error(sides, THEIRS, OURS, 0, 1) == 0
        arrived(sides, "int8")


@EACH
async def test_kv_that_no_frame_made_smaller_is_exact(transport: str) -> None:
    async with connected(transports=[transport], codec="int8") as sides:
        filled(sides)
        sides.offer("t", [5], 1)
        await sides.take("t", [7], 1)
        assert await sides.end() == ("t", "committed")
        assert sides.exact == [True]
        assert error(sides, [5], [7], 0, 1) == 0


@EACH
@pytest.mark.usefixtures("small_pieces")
async def test_layers_leave_in_a_codec_while_the_prompt_is_computed(transport: str) -> None:
    async with connected(transports=[transport], codec="fp8") as sides:
        filled(sides)
        taking = asyncio.create_task(sides.take("t", OURS, NUM_TOKENS))
        await wanted(sides, "t")
        sides.giver.open("t", THEIRS, NUM_TOKENS)
        for start, stop in ((0, 30), (30, NUM_TOKENS)):
            for layer in range(3):
                sides.giver.written("t", Frontier(start, stop - start, layer + 1) if layer < 2 else Frontier(stop))
                await asyncio.sleep(0)
        sides.giver.complete("t", STATE)
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        arrived(sides, "fp8")


# --- what is refused -------------------------------------------------------------------------------------------------


def flipped(whole: Callable[..., Any]) -> Callable[..., Any]:
    """A way of sending frames that changes a bit of them."""

    def send(*arguments: Any) -> Any:
        *others, last = arguments
        wrong = [frame.clone() for frame in (last if isinstance(last, list) else [last])]
        wrong[0][-1] ^= 1
        return whole(*others, wrong if isinstance(last, list) else wrong[0])

    return send


@pytest.mark.parametrize(
    ("transport", "module", "sends"),
    [("tcp", tcp_server, "vectors_of"), ("torch_distributed", pair_server, "pack_frames")],
)
async def test_a_frame_that_was_changed_on_its_way_is_not_even_decoded(
    transport: str, module: Any, sends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, sends, flipped(getattr(module, sends)))
    async with connected(transports=[transport], codec="int8") as sides:
        before = tokens(sides.taker_pool, OURS, 0, NUM_TOKENS)
        filled(sides)
        sides.offer("t", THEIRS, NUM_TOKENS)
        with pytest.raises(ChecksumMismatch, match=r"piece 0 of transfer t .* is not what the giver sealed"):
            await sides.take("t", OURS, NUM_TOKENS)
        assert await sides.end() == ("t", "aborted")
        np.testing.assert_array_equal(tokens(sides.taker_pool, OURS, 0, NUM_TOKENS), before)
        assert not sides.taker.counters.wire_bytes
        assert sides.giver.counters.encode_seconds == 0


@EACH
async def test_what_the_giver_takes_for_a_frame_and_is_none_fails_the_transfer(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        giving.Coding, "encode", lambda self, *_: torch.zeros(self.wire_bytes(_[-1]), dtype=torch.uint8)
    )
    async with connected(transports=[transport], codec="int8") as sides:
        sides.offer("t", THEIRS, NUM_TOKENS)
        with pytest.raises(TransferError, match="no encoded piece at all"):
            await sides.take("t", OURS, NUM_TOKENS)
        assert await sides.end() == ("t", "aborted")


# --- over which transport --------------------------------------------------------------------------------------------


async def test_a_codec_that_is_forced_is_used_on_one_host_too() -> None:
    async with connected(codec="int8") as sides:
        filled(sides)
        sides.offer("t", THEIRS, NUM_TOKENS)
        await sides.take("t", OURS, NUM_TOKENS)
        assert await sides.end() == ("t", "committed")
        arrived(sides, "int8")
        assert set(sides.taker.counters.wire_bytes) == {"int8"}


async def test_a_codec_that_is_forced_leaves_no_choice_where_only_shared_memory_may_be_used() -> None:
    async with connected(transports=["shared_memory"], codec="int8") as sides:
        with pytest.raises(TransferError, match="no transport reaches the giver"):
            await sides.take("t", OURS, NUM_TOKENS)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("codec", ["none", "int8"])
async def test_another_transport_takes_over_in_the_same_codec(
    codec: CodecName, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = tcp_io.receive, []

    def breaks(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 4:  # the reply and two batches have come
            raise TransferError("cable cut")
        original(*arguments)

    for module in ("tcp_io", "tcp"):
        monkeypatch.setattr(f"kv_transfer.transports.{module}.receive", breaks)
    async with connected(transports=["tcp", "torch_distributed"], codec=codec) as sides:
        filled(sides)
        sides.offer("t", THEIRS, NUM_TOKENS)
        assert await sides.take("t", OURS, NUM_TOKENS) == STATE
        assert await sides.end() == ("t", "committed")
        assert sides.taker.counters.fallbacks == 1
        lost = error(sides, THEIRS, OURS, 0, NUM_TOKENS)
        assert lost == 0 if codec == "none" else 0 < lost < LOSSY[codec]


# --- in which codec --------------------------------------------------------------------------------------------------


@pytest.fixture
def known_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Worth it below 0.5 GB/s."""
    speeds = {"int8": CodecSpeed(1e9, 1e9, 0.5), "fp8": CodecSpeed(2e9, 2e9, 0.5)}
    monkeypatch.setattr(CodecSpeeds, "_measure", lambda _, name: speeds[name])


@pytest.mark.parametrize(("transport", "is_evidence"), [("shared_memory", False), ("tcp", True)])
async def test_what_was_here_already_is_no_evidence_of_the_bandwidth_of_a_link(
    transport: TransportName, is_evidence: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As what TCP was pushed: it is copied as fast as memory."""
    observed: list[int] = []
    monkeypatch.setattr(LinkBandwidth, "observe", lambda _, nbytes, seconds: observed.append(nbytes))
    async with connected(transports=[transport]) as sides:
        sides.offer("t", [5], 10)
        await sides.take("t", [1], 10)
        await sides.end()
    assert bool(observed) == is_evidence


async def take_at(sides: Sides, name: str, bandwidth: float | None) -> str:
    """The codec of a transfer over a link that is known to be so fast."""
    if bandwidth is not None:
        peer = await next(iter(sides.taker._peers.values()))
        peer.codec.bandwidth = LinkBandwidth()
        peer.codec.bandwidth.observe(1 << 24, (1 << 24) / bandwidth)
    before = dict(sides.taker.counters.wire_bytes)
    sides.offer(name, THEIRS, NUM_TOKENS)
    await sides.take(name, OURS, NUM_TOKENS)
    assert await sides.end() == (name, "committed")
    (codec,) = [codec for codec, count in sides.taker.counters.wire_bytes.items() if count != before.get(codec)]
    return codec


@EACH
@pytest.mark.usefixtures("known_speeds")
async def test_auto_encodes_for_a_slow_link_and_not_for_a_fast_or_an_unknown_one(transport: str) -> None:
    async with connected(transports=[transport], codec="auto") as sides:
        filled(sides)
        found = [await take_at(sides, f"t{speed}", speed) for speed in (None, 1e8, 1e11, 4e8, 6e8)]
        assert found == ["none", "fp8", "none", "fp8", "none"]
        assert sides.exact == [codec == "none" for codec in found]


@pytest.mark.usefixtures("known_speeds")
async def test_auto_encodes_nothing_that_is_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    async with connected(codec="auto") as sides:
        filled(sides)
        assert [await take_at(sides, f"t{speed}", speed) for speed in (None, 1e6)] == ["none", "none"]
        peer = await next(iter(sides.taker._peers.values()))
        assert peer.transport.in_place


async def test_a_committed_transfer_tells_how_fast_the_link_is_and_one_that_failed_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    large = layout(num_layers=4, num_kv_heads=4, head_size=64)
    async with connected(large, large, transports=["tcp"], codec="int8") as sides:
        filled(sides)
        blocks = list(range(64))
        with monkeypatch.context() as broken:
            broken.setattr(tcp_server, "vectors_of", flipped(tcp_server.vectors_of))
            sides.offer("t", blocks, 1024)
            with pytest.raises(ChecksumMismatch):
                await sides.take("t", blocks, 1024)
            assert await sides.end() == ("t", "aborted")
        peer = await next(iter(sides.taker._peers.values()))
        assert peer.codec.bandwidth.bytes_per_second is None
        sides.offer("u", blocks, 1024)
        await sides.take("u", blocks, 1024)
        assert await sides.end() == ("u", "committed")
        counters = sides.taker.counters
        bandwidth = peer.codec.bandwidth.bytes_per_second
        assert bandwidth is not None
        assert bandwidth > counters.wire_bytes["int8"] / counters.wire_seconds  # decoding is not the link's


async def test_speeds_are_measured_only_where_there_is_a_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CodecSpeeds, "_measure", lambda *_: pytest.fail("measured"))
    for codec in ("none", "int8"):
        async with connected(transports=["tcp"], codec=codec) as sides:
            filled(sides)
            assert await take_at(sides, codec, None) == codec


# --- memory of the giver ---------------------------------------------------------------------------------------------


async def test_frames_are_made_only_as_far_ahead_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    monkeypatch.setattr(frames, "MAX_BYTES", 2000)
    most = []
    put = frames.Frames.put

    def watched(self: frames.Frames, place: int, frame: torch.Tensor) -> None:
        put(self, place, frame)
        most.append(self._nbytes)

    monkeypatch.setattr(frames.Frames, "put", watched)
    async with connected(transports=["torch_distributed"], codec="int8") as sides:
        filled(sides)
        gate = Gate(monkeypatch, torch_distributed, "land")
        blocks = list(range(16))
        sides.offer("t", blocks, 250)
        taking = asyncio.create_task(sides.take("t", blocks, 250))
        await gate.reached.wait()
        sealing = sides.giver._live["t"]
        await settled_waiting(sealing)
        gate.opened.set()
        assert await taking == STATE
        assert await sides.end() == ("t", "committed")
        assert 0 < error(sides, blocks, blocks, 0, 250) < LOSSY["int8"]
        assert max(most) < 2000 + giving.SEALED_AT_ONCE * 1000 < sides.taker.counters.wire_bytes["int8"] / 3
        assert not sealing._frames._held


async def settled_waiting(sealing: giving.Giving) -> None:
    """Returns when the seal waits for room."""
    while sealing._frames._may_go_on.is_set() or not sealing._machine.sealing:
        await asyncio.sleep(0)


async def test_a_transfer_that_ends_while_it_waits_for_room_gives_its_blocks_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("kv_transfer.pieces.PIECE_BYTES", 1000)
    monkeypatch.setattr(frames, "MAX_BYTES", 1)
    async with connected(transports=["tcp"], codec="int8") as sides:
        filled(sides)
        monkeypatch.setattr(frames.Frames, "drop", lambda *_: None)
        sides.offer("t", THEIRS, NUM_TOKENS)
        taking = asyncio.create_task(sides.take("t", OURS, NUM_TOKENS))
        await wanted(sides, "t")
        await settled_waiting(sides.giver._live["t"])
        sides.giver.withdraw("t", "dropped")
        with pytest.raises(Withdrawn):
            await taking
        assert await sides.end() == ("t", "aborted")


async def test_a_frame_that_was_said_to_be_there_is_not_to_be_had_again() -> None:
    held = frames.Frames()
    for place in (0, 2, 3):
        held.put(place, torch.zeros(4, dtype=torch.uint8))
    held.drop(3)
    assert [frame.numel() for frame in held.read(3, 4)] == [4]
    with pytest.raises(TransferError, match="piece 2 is asked for, and was said to be there before"):
        held.read(2, 4)


# --- the coding ------------------------------------------------------------------------------------------------------


async def test_what_is_larger_as_a_frame_goes_as_it_lies_and_in_none_that_is_everything() -> None:
    for codec in CODECS:
        coding = Coding(codec, layout(head_size=64))
        for piece in (Extent(0, 400, 0, 3), Extent(7, 1, 0, 3)):
            frame, raw = CODECS[codec].encoded_bytes(PieceShape(3, piece.num_tokens, 2, 64, torch.bfloat16)), 1536
            assert coding.is_framed(piece) == (frame < raw * piece.num_tokens)
            assert coding.wire_bytes(piece) == min(frame, raw * piece.num_tokens)
        assert coding.is_framed(Extent(0, 400, 0, 3)) == (codec != "none")


@pytest.mark.parametrize("kind", [np.ndarray, torch.Tensor])
@pytest.mark.parametrize("codec", LOSSY)
async def test_groups_that_are_split_unlike_see_the_same_frames_and_the_same_kv(codec: CodecName, kind: type) -> None:
    one, giver, taker = (split_layout(4, 16, split) for split in ((1, 1), (4, 2), (2, 1)))
    raw = torch.randn(5, 2, 256, 4, 2, generator=torch.Generator().manual_seed(1)).bfloat16().view(torch.uint8).numpy()
    coding, slots = Coding(codec, one), np.arange(3, 78)
    for piece in (Extent(0, 75, 0, 5), Extent(0, 75, 1, 3)):
        frame = coding.encode(split_rows(giver, raw, kind), slots, piece)
        assert torch.equal(frame, coding.encode(raw.reshape(5, 2, 256, 16), slots, piece))
        ours, whole = split_rows(taker, raw * 0, kind), np.zeros((5, 2, 256, 16), np.uint8)
        coding.decode(frame, ours, slots[::-1].copy(), piece)
        coding.decode(frame, whole, slots[::-1].copy(), piece)
        assert whole.any()
        wanted_shares = split_rows(taker, whole.reshape(raw.shape), np.ndarray)._shares
        for got, want in zip(ours._shares, wanted_shares, strict=True):
            np.testing.assert_array_equal(np.asarray(got.rows), want.rows)
