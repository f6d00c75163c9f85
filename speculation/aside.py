"""Work that may never come back, on a thread beside the caller's, which costs some tens of microseconds."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import Generic, TypeVar, cast

T = TypeVar("T")

_LOOKS = 10
"""At what it waits for, in the time that it waits at most. Who was not run himself between two of them, because the
machine or this process stood still, has waited no longer for that."""


class Stalled(Exception):
    """It has not come back in time."""


class _Task(Generic[T]):
    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._done = threading.Lock()
        self._done.acquire()
        self._result: T | None = None
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            self._result = self._work()
        except Exception as error:  # noqa: BLE001 - it is raised where the work came from
            self._error = error
        finally:
            self._done.release()

    def wait(self, seconds: float) -> T:
        if not any(self._done.acquire(timeout=seconds / _LOOKS) for _ in range(_LOOKS)):
            raise Stalled
        if self._error is not None:
            raise self._error
        return cast("T", self._result)


class Aside:
    """Does one thing at a time. A thread that is late is left to itself, with what it works on, and what it may still
    bring is nobody's; the next work gets a new one. So whatever works here changes nothing but what is its own."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._tasks: SimpleQueue[_Task[object] | None] | None = None

    def run(self, work: Callable[[], T], seconds: float) -> T:
        """What `work` gives or raises. Raises Stalled if that takes longer."""
        task = _Task(work)
        if self._tasks is None:
            self._tasks = self._begin()
        self._tasks.put(cast("_Task[object]", task))
        try:
            return task.wait(seconds)
        except Stalled:
            self._tasks.put(None)
            self._tasks = None
            raise

    def _begin(self) -> SimpleQueue[_Task[object] | None]:
        tasks: SimpleQueue[_Task[object] | None] = SimpleQueue()
        threading.Thread(target=_work, args=(tasks,), name=self._name, daemon=True).start()
        weakref.finalize(self, tasks.put, None)
        return tasks


def _work(tasks: SimpleQueue[_Task[object] | None]) -> None:
    while (task := tasks.get()) is not None:
        task.run()
        del task  # what it holds is the caller's to keep
