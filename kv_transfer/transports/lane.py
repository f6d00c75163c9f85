"""A thread that does one piece of work after another for an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")


class Lane:
    """Made on a running event loop, and used from it. Beside a ThreadPoolExecutor, a wake-up less at either end of a
    pull: idle threads of an executor wake each other, and its futures have to be told to the loop's."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._todo: SimpleQueue[tuple[Callable[[], Any], asyncio.Future[Any]] | None] = SimpleQueue()
        self._closed = False
        # What blocks in it ends by itself, so an interpreter that ends need not wait for it.
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)

    def run(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """What comes of it, after what was asked for before. Whoever cancels the future does not stop the work."""
        assert not self._closed
        if self._thread.ident is None:  # a connection of a stranger's never has one
            self._thread.start()
        future: asyncio.Future[T] = self._loop.create_future()
        self._todo.put((work, future))
        return future

    def close(self) -> None:
        """The thread ends when it has done what was asked for. May be called again."""
        if not self._closed:
            self._closed = True
            self._todo.put(None)

    def _work(self) -> None:
        while (todo := self._todo.get()) is not None:
            work, future = todo
            result, error = None, None
            try:
                result = work()
            except BaseException as raised:  # noqa: BLE001  whoever awaits it is told
                error = raised
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                self._loop.call_soon_threadsafe(_settle, future, result, error)
            del todo, work, future, result, error  # while nothing is to do, nothing is held


def _settle(future: asyncio.Future[Any], result: object, error: BaseException | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
