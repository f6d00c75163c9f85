"""One HTTP request and its answer, over raw ASGI messages: streamed tokens pass no layer that costs per message."""

from __future__ import annotations

import asyncio
import logging
import math
import re
import time
import uuid
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import msgspec
from starlette.types import Receive, Scope, Send

from core.errors import Cancelled, DeadlineExceeded, InvalidRequest, PayloadTooLarge, SlipstreamError

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
FAREWELL_S = 5.0
"""How long a client that does not read is given to take the error that ends its stream."""

_JSON = (b"content-type", b"application/json")
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


def error_body(error: SlipstreamError) -> dict[str, Any]:
    """OpenAI's shape."""
    return {"error": {"message": error.message, "type": error.type, "param": error.param, "code": error.code}}


def event(payload: object) -> bytes:
    """A server-sent event."""
    return b"data: " + msgspec.json.encode(payload) + b"\n\n"


class Exchange:
    """Reads the body of a request and writes its answer. `streaming` once the answer's head is out."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.arrived = time.perf_counter()
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.receive = receive
        self.streaming = False
        self._send = send
        given = self.headers.get("x-request-id", "")
        self.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex

    async def read_body(self, limit: int) -> bytes:
        """Raises PayloadTooLarge as soon as the body is known to exceed `limit` bytes, Cancelled on disconnect."""
        too_large = PayloadTooLarge(f"the body is larger than {limit} bytes; send less", param="body")
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large
        body = bytearray()
        while True:
            message = await self.receive()
            if message["type"] == "http.disconnect":
                raise Cancelled("the client went away")
            body += message.get("body", b"")
            if len(body) > limit:
                raise too_large
            if not message.get("more_body", False):
                return bytes(body)

    def check_request_id(self) -> None:
        """Raises InvalidRequest if the client sent an x-request-id that cannot be echoed."""
        given = self.headers.get("x-request-id")
        if given is not None and given != self.request_id:
            raise InvalidRequest(
                "header x-request-id must be 1 to 128 printable ASCII characters without spaces", param="x-request-id"
            )

    # --- answers ---------------------------------------------------------------------------------------------------

    async def reply(self, payload: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        body = msgspec.json.encode(payload)
        head = [_JSON, (b"content-length", str(len(body)).encode()), self._id_header()]
        head += [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        await self._send({"type": "http.response.start", "status": status, "headers": head})
        await self._send({"type": "http.response.body", "body": body})

    async def refuse(self, error: SlipstreamError) -> None:
        """An error as the whole answer."""
        headers = {}
        if (retry_after := getattr(error, "retry_after", None)) is not None:
            headers["retry-after"] = str(math.ceil(retry_after))
        await self.reply(error_body(error), error.http_status, headers)

    async def write(self, data: bytes) -> None:
        """Part of a stream of events. The first one sends the head."""
        if not self.streaming:
            self.streaming = True
            headers = [*_STREAM_HEADERS, self._id_header()]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes = b"") -> None:
        """The last events of a stream."""
        await self._send({"type": "http.response.body", "body": data + DONE, "more_body": False})

    async def fail(self, error: SlipstreamError) -> None:
        """End with an error, in whatever state the answer is."""
        if not self.streaming:
            await self.refuse(error)
            return
        try:
            async with asyncio.timeout(FAREWELL_S):
                await self.end(event(error_body(error)))
        except TimeoutError:
            logger.warning("request %s: the client does not read; its stream was cut", self.request_id)

    def _id_header(self) -> tuple[bytes, bytes]:
        return b"x-request-id", self.request_id.encode()


class Guard:
    """Runs a body that may be ended from outside: `with Guard(...) as guard`, and `guard.end(error)` cancels what the
    body awaits and raises `error` where the body stood. Ends by itself when `timeout_s` is over or, after `watch`, when
    the client disconnects. Belongs to the task that enters it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._error: SlipstreamError | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._active = False

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None  # a coroutine that awaits runs in a task
        self._task, self._cancelling, self._active = task, task.cancelling(), True
        late = DeadlineExceeded(f"the request did not end within {self._timeout_s:g} s")
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self.end, late)
        return self

    def watch(self, receive: Receive) -> None:
        """From now on a disconnect ends the body with Cancelled. The request's body must have been read."""
        self._watcher = asyncio.create_task(self._wait_for_disconnect(receive))

    def end(self, error: SlipstreamError) -> None:
        """Only the first call counts, and none after the body is through."""
        if self._active and self._error is None:
            self._error = error
            self._task.cancel()

    def __exit__(self, kind: type[BaseException] | None, raised: BaseException | None, _: TracebackType | None) -> None:
        self._active = False
        self._timer.cancel()
        if self._watcher is not None:
            self._watcher.cancel()
        # As asyncio.timeout does: our own cancellation becomes the error, one from outside stays what it is.
        if self._error is not None and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise self._error from raised

    async def _wait_for_disconnect(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.end(Cancelled("the client went away"))
