"""The HTTP server: uvicorn inside a loop that is already running, on a port of its own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette

from core.errors import ConfigError, Unavailable
from gateway.admission import Admission

KEEP_ALIVE_S = 75
"""Idle connections live longer than a load balancer's usual 60 s, so that it is not we who close first."""
CLOSE_S = 5.0
"""For connections to close after their last answer; what is left then is cut."""
BACKLOG = 2048


class _Uvicorn(uvicorn.Server):
    """Leaves signals to the process that embeds it, and says when it accepts connections."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.accepting.set()


class HttpServer:
    """Serves `app` (gateway.app.create_app). `port` 0 takes a free one."""

    def __init__(self, app: Starlette, host: str = "127.0.0.1", port: int = 0) -> None:
        self._app = app
        self._host = host
        self._port = port
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> tuple[str, int]:
        """Listen; return host and port. Raises ConfigError if the address cannot be had."""
        bound = _bind(self._host, self._port)
        config = uvicorn.Config(
            self._app,
            loop="none",
            http="httptools",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(CLOSE_S),
            backlog=BACKLOG,
        )
        self._server = _Uvicorn(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[bound]))
        accepting = asyncio.create_task(self._server.accepting.wait())
        await asyncio.wait({self._task, accepting}, return_when=asyncio.FIRST_COMPLETED)
        accepting.cancel()
        if self._task.done():
            bound.close()
            await self._task
        return self._host, int(bound.getsockname()[1])

    @property
    def listening(self) -> bool:
        return self._task is not None and not self._task.done()

    async def stop(self, grace_s: float = 30.0) -> None:
        """Refuse new requests with 503, let running ones end within `grace_s`, end the others with an error, close."""
        if self._task is None:
            return
        admission: Admission = self._app.state.admission
        admission.close()
        try:
            async with asyncio.timeout(grace_s):
                await admission.idle()
        except TimeoutError:
            admission.end_all(Unavailable(f"the server shut down before the request ended (grace {grace_s:g} s)"))
        self._server.should_exit = True
        await self._task
        for connection in list(self._server.server_state.connections):
            if connection.transport is not None:  # a client that does not read what it was sent
                connection.transport.abort()
        self._task = None


def _bind(host: str, port: int) -> socket.socket:
    """A bound socket that a second server cannot share."""
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # without it a second server may bind the same port and fail only later
    except OSError as error:
        if bound is not None:
            bound.close()
        in_use = error.errno == errno.EADDRINUSE
        reason = "the port is in use; choose another" if in_use else (error.strerror or str(error))
        raise ConfigError(f"cannot listen on {host}:{port}: {reason}", param="port") from error
    bound.setblocking(False)
    return bound
