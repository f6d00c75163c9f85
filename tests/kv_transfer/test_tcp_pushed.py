"""TCP where a transfer has more to come: what is sealed is sent before it is asked for."""

from __future__ import annotations

import asyncio
import socket
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from sides import STATE, TIMEOUT_S, Sides, connected
from tcp_ends import Answer, Taken, dialogue, false_giver, serving, stuffed, taking

from core.errors import ChecksumMismatch, TransferError
from kv_transfer.pieces import Frontier, layers_of
from kv_transfer.transports import tcp, tcp_server
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.base import PullJob
from kv_transfer.transports.lane import Lane
from kv_transfer.transports.tcp import Tcp
from kv_transfer.transports.tcp_server import TcpServer


@pytest.fixture
def requests(monkeypatch: pytest.MonkeyPatch) -> list[wire.Ask]:
    """Those that are made."""
    made: list[wire.Ask] = []

    def encoded(ask: wire.Ask, transfer_id: str) -> bytes:
        made.append(ask)
        return encode(ask, transfer_id)

    encode = wire.encode_request
    monkeypatch.setattr(wire, "encode_request", encoded)
    return made


def early(taken: Taken, last: int, first: int = 0) -> PullJob:
    """A job of some pieces, others of which are to come."""
    return replace(taken.job.part(first, last), more=True)


def seal(taken: Taken, server: TcpServer, num_sealed: int) -> None:
    taken.num_sealed = num_sealed
    server.look("t")


def content(taken: Taken, job: PullJob) -> bytes:
    """Of its pieces, as the giver has them."""
    return b"".join(
        np.ascontiguousarray(layers_of(taken.source, piece)[:, :, job.source(index)]).tobytes()
        for index, piece in enumerate(job.pieces)
    )


async def test_pieces_come_without_being_asked_for(taken: Taken, requests: list[wire.Ask]) -> None:
    taken.num_sealed = 2
    async with serving(taken) as (server, endpoint, reads), taking(endpoint) as transport:
        await transport.pull(early(taken, 2))
        await reads.over(2)
        seal(taken, server, 5)
        await reads.over(4)  # sent, and looked for more
        await transport.pull(early(taken, 5, first=2))
        seal(taken, server, len(taken.job.pieces))
        await transport.pull(taken.job.part(5))
        taken.assert_all_here()
        assert requests == [wire.Ask(1, 0)]


async def test_a_grant_may_go_beyond_a_job_or_end_before_it(taken: Taken) -> None:
    taken.num_sealed = 4
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(early(taken, 3))  # of a grant of 4
        pulling = asyncio.create_task(transport.pull(taken.job.part(3)))  # has one of it, and waits for the others
        while len(taken.verified) < 4:
            await asyncio.sleep(0.001)
        assert not pulling.done()
        seal(taken, server, len(taken.job.pieces))
        await pulling
        taken.assert_all_here()


async def test_the_connection_serves_other_jobs_after_the_last(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        for _ in range(3):
            await transport.pull(early(taken, 3))
            await transport.pull(taken.job.part(3))
            taken.assert_all_here()
            taken.verified.clear()
            await transport.pull(taken.job)  # by itself
            taken.assert_all_here()
            taken.verified.clear()
        assert len(server._connections) == 1
        assert not transport._pushed


async def test_a_transfer_that_is_forgotten_has_no_connection(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(early(taken, 3))
        transport.forget("another")
        assert server._connections
        transport.forget("t")
        async with asyncio.timeout(TIMEOUT_S):
            while server._connections:
                await asyncio.sleep(0.001)
        await transport.pull(taken.job)
        transport.forget("t")  # it has none any more
    assert taken.verified == [0, 1, 2, *range(len(taken.job.pieces))]


async def test_a_taker_that_closes_leaves_no_connection(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _):
        async with taking(endpoint) as transport:
            await transport.pull(early(taken, 3))
        async with asyncio.timeout(TIMEOUT_S):
            while server._connections:
                await asyncio.sleep(0.001)


async def test_a_connection_that_was_closed_between_jobs_is_replaced(taken: Taken) -> None:
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(early(taken, 3))
        (connection,), (idle,) = server._connections, transport._pushed.values()
        assert idle is not None
        while idle.fresh() and not _pushed_bytes(idle.socket):
            await asyncio.sleep(0.001)
        connection.cut()
        while server._connections:
            await asyncio.sleep(0.001)
        idle.socket.recv(1 << 20)  # what had come
        await transport.pull(taken.job.part(3))
        taken.assert_all_here()


def _pushed_bytes(end: socket.socket) -> bool:
    try:
        return bool(end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except BlockingIOError:
        return False


async def test_more_transfers_than_can_be_pushed_are_asked_for(
    taken: Taken, requests: list[wire.Ask], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp, "MAX_PUSHES", 1)
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(replace(early(taken, 1), transfer_id="t"))
        transport._pushed["another"] = transport._pushed.pop("t")
        await transport.pull(early(taken, 3))
        assert [ask.stands for ask in requests] == [True, False]
        assert len(server._connections) == 2


async def test_a_transfer_that_ends_while_a_request_stands_is_not_spoken_of(taken: Taken) -> None:
    """It may have been all that was to come: the connection can be asked for something else."""
    standing, whole = wire.Ask(1, 3), wire.Ask(2, 0, len(taken.job.pieces), taken.nbytes)
    async with serving(taken) as (server, endpoint, reads):
        taken.num_sealed = 3
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(wire.encode_greeting(endpoint.token) + wire.encode_request(standing, "t"))
        await reads.over(2)
        seal(taken, server, -1)
        while any(connection.standing for connection in server._connections):
            await asyncio.sleep(0.001)
        taken.num_sealed = None
        writer.write(wire.encode_request(whole, "t"))
        assert wire.decode_reply(await reader.readexactly(wire.REPLY_BYTES), whole).granted == whole
        writer.close()
        await writer.wait_closed()


async def test_another_request_ends_one_that_stands(taken: Taken) -> None:
    one = wire.Ask(2, 0, 1, taken.job.part(0, 1).nbytes)
    async with serving(taken) as (_, endpoint, reads):
        taken.num_sealed = 3
        reader, writer = await asyncio.open_connection("127.0.0.1", endpoint.port)
        writer.write(wire.encode_greeting(endpoint.token) + wire.encode_request(wire.Ask(1, 3), "t"))
        await reads.over(2)
        writer.write(wire.encode_request(one, "t"))
        assert wire.decode_reply(await reader.readexactly(wire.REPLY_BYTES), one).granted == one
        writer.close()
        await writer.wait_closed()


async def test_who_leaves_while_a_request_stands_is_let_go(taken: Taken) -> None:
    taken.num_sealed = 0
    async with serving(taken) as (server, endpoint, reads):
        said = wire.encode_greeting(endpoint.token) + wire.encode_request(wire.Ask(1, 0), "t")
        assert await dialogue(endpoint, said) == b""
        while server._connections:
            await asyncio.sleep(0.001)
        assert not reads.under_way


# --- what is small and here is taken at once -------------------------------------------------------------------------


async def until_pushed(transport: Tcp, nbytes: int) -> None:
    """So many bytes wait in the socket of the transfer's connection."""
    connection = transport._pushed["t"]
    assert connection is not None
    async with asyncio.timeout(TIMEOUT_S):
        while tcp._num_unread(connection.socket) < nbytes:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("room", [0, 1 << 20], ids=["by a thread", "at once"])
@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_what_is_here_is_pulled_without_a_thread(
    room: int, taken: Taken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_server, "QUICK_BYTES", room)
    taken.num_sealed, rest = 2, taken.job.part(4)
    async with serving(taken) as (server, endpoint, _reads), taking(endpoint) as transport:
        first = early(taken, 2)
        assert not transport.pull_at_once(first), "it has not been asked for"
        await transport.pull(first)
        middle = early(taken, 4, first=2)
        assert not transport.pull_at_once(middle), "it has not come"
        seal(taken, server, len(taken.job.pieces))
        await until_pushed(transport, wire.REPLY_BYTES + middle.nbytes + rest.nbytes)
        monkeypatch.setattr(tcp, "QUICK_BYTES", middle.nbytes - 1)
        assert not transport.pull_at_once(middle), "it is too much"
        monkeypatch.setattr(tcp, "QUICK_BYTES", taken.nbytes)
        monkeypatch.setattr(Lane, "run", None)
        assert transport.pull_at_once(middle)
        assert transport.pull_at_once(rest)
        taken.assert_all_here()
        assert not transport._pushed
        assert len(transport._idle) == 1


@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_a_job_of_several_grants_is_left_to_the_thread(taken: Taken) -> None:
    """The second might not have come."""
    taken.num_sealed = 2
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(early(taken, 2))
        middle, rest = taken.job.part(2, 4), taken.job.part(4)
        seal(taken, server, 4)
        await until_pushed(transport, wire.REPLY_BYTES + middle.nbytes)
        seal(taken, server, len(taken.job.pieces))
        await until_pushed(transport, 2 * wire.REPLY_BYTES + middle.nbytes + rest.nbytes)
        assert not transport.pull_at_once(taken.job.part(2))
        await transport.pull(taken.job.part(2))
        taken.assert_all_here()


@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_a_piece_that_is_not_what_was_sealed_is_seen_at_once(taken: Taken) -> None:
    taken.num_sealed = 2
    async with serving(taken) as (server, endpoint, _), taking(endpoint) as transport:
        await transport.pull(early(taken, 2))
        rest = taken.job.part(2)
        first, *others = rest.pieces
        wrong = replace(rest, pieces=[msgspec.structs.replace(first, checksum=first.checksum ^ 1), *others])
        seal(taken, server, len(taken.job.pieces))
        await until_pushed(transport, wire.REPLY_BYTES + rest.nbytes)
        with pytest.raises(ChecksumMismatch):
            transport.pull_at_once(wrong)
        assert not transport._pushed
        assert not transport._idle
    assert taken.verified == [0, 1]


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        (wire.encode_refusal(wire.Ask(1, 2), "not today"), "the giver refuses: not today"),
        (bytes(wire.REPLY_BYTES), "does not speak this protocol"),
        (wire.encode_grant(wire.Ask(1, 2, 9, 9)) + bytes(9), "the giver sends pieces 2 to 9 as 9 bytes"),
    ],
    ids=["a refusal", "nonsense", "something else"],
)
async def test_an_answer_that_brings_nothing_is_left_to_the_thread(second: bytes, reason: str, taken: Taken) -> None:
    """Which fails, so that another transport is tried."""

    def answer(ask: wire.Ask, taken: Taken) -> bytes:
        first = taken.job.part(0, 2)
        return wire.encode_grant(ask._replace(last=2, nbytes=first.nbytes)) + content(taken, first) + second

    async with false_giver(taken, answer, then_close=False) as transport:
        await transport.pull(early(taken, 2))
        await until_pushed(transport, len(second))
        job = early(taken, 3, first=2)
        assert not transport.pull_at_once(job)
        with pytest.raises(TransferError, match=reason):
            await transport.pull(job)
        assert not transport._pushed


@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_what_a_socket_has_no_room_for_is_sent_by_a_thread(taken: Taken) -> None:
    whole = wire.Ask(1, 0, len(taken.job.pieces), taken.nbytes)
    async with serving(taken) as (server, endpoint, reads), stuffed(server, endpoint, taken) as end:
        while not any(connection.transfer_id for connection in server._connections):
            await asyncio.sleep(0.001)
        assert reads.under_way
        answer = await asyncio.to_thread(end.recv, wire.REPLY_BYTES + taken.nbytes, socket.MSG_WAITALL)
    assert wire.decode_reply(answer[: wire.REPLY_BYTES], whole).granted == whole
    assert answer[wire.REPLY_BYTES :] == content(taken, taken.job)


# --- a giver that does not keep to it --------------------------------------------------------------------------------


def granted(ask: wire.Ask, taken: Taken, **changes: int) -> bytes:
    """Three pieces of it, announced as something else."""
    told = wire.Ask(ask.number, ask.first, 3, taken.job.part(0, 3).nbytes)
    return wire.encode_grant(told._replace(**changes)) + bytes(told.nbytes)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (lambda ask, taken: granted(ask, taken, nbytes=1), "the giver sends pieces 0 to 3 as 1 bytes"),
        (lambda ask, taken: granted(ask, taken, nbytes=2**60), "the giver sends pieces 0 to 3 as"),
        (lambda ask, taken: granted(ask, taken, last=2), "the giver sends pieces 0 to 2 as"),
        (lambda ask, taken: granted(ask, taken, last=4), "the giver sends pieces 0 to 4 as"),
        (lambda ask, taken: granted(ask, taken, first=1), "the giver answers request 1, pieces 1 to 3"),
        (lambda ask, taken: granted(ask, taken, number=9), "the giver answers request 9"),
        (lambda ask, taken: granted(ask, taken, last=0), "no pieces of a transfer can be"),
        (lambda ask, taken: wire.encode_refusal(ask, "not today"), "the giver refuses: not today"),
    ],
    ids=["too short", "too long", "too few", "too many", "later ones", "another request", "nothing", "a refusal"],
)
async def test_a_push_of_something_else_writes_no_byte(answer: Answer, reason: str, taken: Taken) -> None:
    before = taken.target.copy()
    async with false_giver(taken, answer) as transport:
        with pytest.raises(TransferError, match=reason):
            await transport.pull(early(taken, 3))
        assert not transport._pushed
    np.testing.assert_array_equal(taken.target, before)
    assert not taken.verified


# --- in a hand-off ---------------------------------------------------------------------------------------------------


def transport_of(sides: Sides) -> Tcp | None:
    """The taker's, once it is made."""
    for peer in sides.taker._peers.values():
        if peer.done() and isinstance(transport := peer.result().transport._made.get("tcp"), Tcp):
            return transport
    return None


@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_a_prompt_that_is_computed_bit_by_bit_is_asked_for_once(requests: list[wire.Ask]) -> None:
    theirs, ours, num_tokens = [5, 6, 9, 2], [60, 3, 4, 1], 50
    async with connected(transports=["tcp"]) as sides:
        sides.giver.open("t", theirs, num_tokens)
        pulling = asyncio.create_task(sides.take("t", ours, num_tokens))
        for written in range(10, num_tokens, 10):
            sides.giver.written("t", Frontier(written))
            await asyncio.sleep(0.01)
        sides.giver.complete("t", STATE)
        await asyncio.wait_for(pulling, TIMEOUT_S)
        await sides.end()
        assert requests == [wire.Ask(1, 0)]
        transport = transport_of(sides)
        assert transport is not None
        assert not transport._pushed


@pytest.mark.usefixtures("tcp_on_the_pools")
async def test_a_transfer_that_is_withdrawn_leaves_no_connection_behind() -> None:
    theirs, ours, num_tokens = [5, 6, 9, 2], [60, 3, 4, 1], 50
    async with connected(transports=["tcp"]) as sides:
        sides.giver.open("t", theirs, num_tokens)
        pulling = asyncio.create_task(sides.take("t", ours, num_tokens))
        sides.giver.written("t", Frontier(10))
        while (transport := transport_of(sides)) is None or not any(transport._pushed.values()):
            await asyncio.sleep(0.001)
        sides.giver.withdraw("t", "the prompt was aborted")
        with pytest.raises(TransferError, match="the prompt was aborted"):
            await pulling
        assert not transport._pushed
        assert await sides.end() == ("t", "aborted")
        async with asyncio.timeout(TIMEOUT_S):
            while sides.giver._tcp is not None and sides.giver._tcp._connections:
                await asyncio.sleep(0.001)
