"""Frames of the TCP data plane: what is written is read, and nothing else is."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import TransferError
from kv_transfer.transports import tcp_wire as wire
from kv_transfer.transports.tcp_wire import Ask


@st.composite
def asks(draw: st.DrawFn) -> Ask:
    first = draw(st.integers(0, 2**32 - 2))
    last = draw(st.integers(first + 1, 2**32 - 1))
    return Ask(draw(st.integers(0, 2**32 - 1)), first, last, draw(st.integers(1, 2**63 - 1)))


standing = st.builds(Ask, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 2), st.just(0), st.just(0))
transfer_ids = st.text(st.characters(codec="utf-8"), min_size=1, max_size=wire.MAX_ID_BYTES // 4)


@given(asks() | standing, transfer_ids)
def test_a_request_says_what_was_asked(ask: Ask, transfer_id: str) -> None:
    frame = wire.encode_request(ask, transfer_id)
    request = wire.decode_request(frame[: wire.REQUEST_BYTES])
    assert request.ask == ask
    assert wire.REQUEST_BYTES + request.id_bytes == len(frame)
    assert wire.decode_transfer_id(frame[wire.REQUEST_BYTES :]) == transfer_id


@given(asks())
def test_a_grant_answers_the_request_it_was_made_for_and_no_other(ask: Ask) -> None:
    frame = wire.encode_grant(ask)
    assert wire.decode_reply(frame, ask) == wire.Reply(ask, 0)
    for field in ("number", "first", "last", "nbytes"):
        with pytest.raises(TransferError):
            wire.decode_reply(frame, ask._replace(**{field: getattr(ask, field) ^ 1}))


@given(asks())
def test_a_standing_request_is_granted_any_pieces_from_its_first_on(granted: Ask) -> None:
    ask = Ask(granted.number, granted.first)
    assert wire.decode_reply(wire.encode_grant(granted), ask) == wire.Reply(granted, 0)
    for field in ("number", "first"):
        with pytest.raises(TransferError, match="the giver answers request"):
            wire.decode_reply(wire.encode_grant(granted), ask._replace(**{field: getattr(ask, field) ^ 1}))
    for nothing in (granted._replace(last=granted.first), granted._replace(nbytes=0), ask):
        with pytest.raises(TransferError, match="no pieces of a transfer can be"):
            wire.decode_reply(wire.encode_grant(nothing), ask)


@given(asks() | standing, st.text(st.characters(codec="utf-8"), min_size=1, max_size=3000))
def test_a_refusal_brings_its_reason_as_far_as_that_fits(ask: Ask, reason: str) -> None:
    frame = wire.encode_refusal(ask, reason)
    told, nbytes = wire.decode_reply(frame[: wire.REPLY_BYTES], ask)
    assert told == ask
    assert nbytes == len(frame) - wire.REPLY_BYTES == min(len(reason.encode()), wire.MAX_REASON_BYTES)
    assert reason.startswith(wire.decode_reason(frame[wire.REPLY_BYTES :]).rstrip("�"))


@given(st.binary(min_size=wire.REQUEST_BYTES, max_size=wire.REQUEST_BYTES), asks())
def test_bytes_that_nobody_framed_are_refused(noise: bytes, ask: Ask) -> None:
    noise = b"\0" + noise[1:]  # else it might be a frame
    for decode in (wire.decode_request, lambda frame: wire.decode_reply(frame, ask)):
        with pytest.raises(TransferError, match="does not speak this protocol"):
            decode(noise)


@given(asks(), transfer_ids, st.integers(0, wire.REQUEST_BYTES - 1), st.integers(1, 255))
def test_a_damaged_request_is_refused_or_within_bounds(ask: Ask, transfer_id: str, at: int, flip: int) -> None:
    frame = bytearray(wire.encode_request(ask, transfer_id)[: wire.REQUEST_BYTES])
    frame[at] ^= flip
    try:
        request = wire.decode_request(bytes(frame))
    except TransferError:
        return
    assert 0 < request.id_bytes <= wire.MAX_ID_BYTES
    assert request.ask.stands or (request.ask.first < request.ask.last and request.ask.nbytes > 0)


def test_lengths_beyond_their_bounds_are_refused_before_anything_is_read() -> None:
    ask = Ask(1, 0, 1, 100)
    too_long = struct.pack("<4sHHIIIQ", wire.MAGIC, wire.VERSION, wire.MAX_ID_BYTES + 1, *ask)
    with pytest.raises(TransferError, match="announces a transfer id of 1025 bytes"):
        wire.decode_request(too_long)
    with pytest.raises(TransferError, match="cannot be asked for over TCP"):
        wire.encode_request(ask, "x" * (wire.MAX_ID_BYTES + 1))
    for nbytes in (0, 2**63):
        with pytest.raises(TransferError, match="no pieces of a transfer can be"):
            wire.encode_request(ask._replace(nbytes=nbytes), "t")
    with pytest.raises(TransferError, match="no pieces of a transfer can be"):
        wire.encode_request(ask._replace(last=0), "t")  # one that stands has no length
    with pytest.raises(TransferError, match="no pieces of a transfer can be"):
        wire.encode_request(ask._replace(last=0, nbytes=0, first=2**32 - 1), "t")


def test_another_version_is_named() -> None:
    frame = bytearray(wire.encode_greeting(bytes(wire.TOKEN_BYTES)))
    frame[4] += 1
    with pytest.raises(TransferError, match="speaks version 3 of the TCP data plane, this one 2"):
        wire.decode_greeting(bytes(frame))
