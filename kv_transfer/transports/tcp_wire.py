"""Frames of the TCP data plane: what opens a connection, what the taker asks over it, what the giver answers.

    taker   Greeting             once, with the token that the giver announced over the link
    taker   Request, transfer id one at a time
    giver   Reply                granted: `nbytes` of KV follow, the pieces one after the other in canonical order
                                 (messages.Piece) or as frames (kv_transfer.coding); refused: `nbytes` of text follow,
                                 the reason

A request names pieces and is answered once, or it stands, for all of a transfer from `first` on: then the giver
pushes them as it seals them, a grant for what is sealed by then, until the taker asks for something else or the
transfer ends, which the taker hears over the link. So nobody waits for a round trip where every one is in sight: after
the last piece has been computed.

All integers are little-endian and every frame says its own length, within bounds that a reader checks before it reads
on. A reply repeats the request it belongs to, or says how much of a standing one it brings. Whoever reads something
else than this raises TransferError and drops the connection.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from core.errors import TransferError

MAGIC = b"SSKV"
VERSION = 2
TOKEN_BYTES = 32
MAX_ID_BYTES = 1024
MAX_REASON_BYTES = 1024

_GREETING = struct.Struct(f"<4sHxx{TOKEN_BYTES}s")
_REQUEST = struct.Struct("<4sHHIIIQ")
_REPLY = struct.Struct("<4sHHIIIQ")
GREETING_BYTES, REQUEST_BYTES, REPLY_BYTES = _GREETING.size, _REQUEST.size, _REPLY.size

_GRANTED, _REFUSED = 0, 1


class Ask(NamedTuple):
    """The pieces `first` .. `last` - 1 of a transfer, together `nbytes`. `number` counts the requests of a
    connection. One that stands does not know the other two."""

    number: int
    first: int
    last: int = 0
    nbytes: int = 0

    @property
    def stands(self) -> bool:
        return self[2:] == (0, 0)


class Reply(NamedTuple):
    """The KV of `granted` follows, or `reason_bytes` of why not."""

    granted: Ask
    reason_bytes: int


class Request(NamedTuple):
    """`id_bytes` of transfer id, in UTF-8, follow."""

    ask: Ask
    id_bytes: int


def encode_greeting(token: bytes) -> bytes:
    return _GREETING.pack(MAGIC, VERSION, token)


def decode_greeting(frame: bytes) -> bytes:
    """The token."""
    magic, version, token = _GREETING.unpack(frame)
    _check_origin(magic, version)
    return bytes(token)


def encode_request(ask: Ask, transfer_id: str) -> bytes:
    """With the transfer id. Raises TransferError for what no frame can hold."""
    name = transfer_id.encode()
    _check_request(ask)
    if not 0 < len(name) <= MAX_ID_BYTES:
        raise TransferError(f"a transfer id of {len(name)} bytes cannot be asked for over TCP; {MAX_ID_BYTES} can")
    return _REQUEST.pack(MAGIC, VERSION, len(name), *ask) + name


def decode_request(frame: bytes) -> Request:
    """Of the first REQUEST_BYTES."""
    magic, version, id_bytes, *ask = _REQUEST.unpack(frame)
    _check_origin(magic, version)
    if not 0 < id_bytes <= MAX_ID_BYTES:
        raise TransferError(f"a request announces a transfer id of {id_bytes} bytes; {MAX_ID_BYTES} are allowed")
    request = Request(Ask(*ask), id_bytes)
    _check_request(request.ask)
    return request


def decode_transfer_id(name: bytes) -> str:
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise TransferError("a request names a transfer that is not UTF-8 text") from error


def encode_grant(ask: Ask) -> bytes:
    return _REPLY.pack(MAGIC, VERSION, _GRANTED, *ask)


def encode_refusal(ask: Ask, reason: str) -> bytes:
    """With the reason, cut to what a frame may hold."""
    text = reason.encode()[:MAX_REASON_BYTES]
    return _REPLY.pack(MAGIC, VERSION, _REFUSED, ask.number, ask.first, ask.last, len(text)) + text


def decode_reply(frame: bytes, ask: Ask) -> Reply:
    """To this request."""
    magic, version, status, *rest = _REPLY.unpack(frame)
    _check_origin(magic, version)
    told = Ask(*rest)
    if told[:2] != ask[:2] or (told.last != ask.last and not (ask.stands and status == _GRANTED)):
        raise TransferError(f"the giver answers request {told.number}, pieces {told.first} to {told.last}; {ask} was")
    if status == _GRANTED and (ask.stands or told.nbytes == ask.nbytes):
        _check_ask(told)
        return Reply(told, 0)
    if status == _REFUSED and 0 < told.nbytes <= MAX_REASON_BYTES:
        return Reply(ask, told.nbytes)
    raise TransferError(f"the giver announces {told.nbytes} bytes with status {status}; {ask.nbytes} were asked for")


def decode_reason(text: bytes) -> str:
    return text.decode(errors="replace")


def _check_origin(magic: bytes, version: int) -> None:
    if magic != MAGIC:
        raise TransferError("the other end of the connection does not speak this protocol")
    if version != VERSION:
        raise TransferError(f"the other end speaks version {version} of the TCP data plane, this one {VERSION}")


def _check_request(ask: Ask) -> None:
    """One that stands says nothing of what it may come to."""
    _check_ask(ask._replace(last=ask.first + 1, nbytes=1) if ask.stands else ask)


def _check_ask(ask: Ask) -> None:
    if not 0 <= ask.first < ask.last < 2**32 or not 0 < ask.nbytes < 2**63 or not 0 <= ask.number < 2**32:
        raise TransferError(f"no pieces of a transfer can be {ask}")
