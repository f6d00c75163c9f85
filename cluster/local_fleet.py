"""The workers of a cluster in one process, by shape: started and stopped as Ray Serve does its replicas."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from core.errors import SlipstreamError
from placement.moving import Held
from placement.worker_shape import WorkerShape

if TYPE_CHECKING:
    from cluster.local import LocalCluster

logger = logging.getLogger(__name__)


class LocalFleet:
    """A cluster.moving.Fleet. A worker that died is replaced when it has given its devices back."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster
        self._numbers = itertools.count()
        self._starting: dict[asyncio.Task[None], WorkerShape] = {}
        """Named as their workers."""
        self._leaving: dict[str, asyncio.Task[None]] = {}

    async def held(self) -> Mapping[WorkerShape, Held]:
        serving = Counter(self._cluster.shapes[name] for name in self._serving())
        leaving = Counter(self._cluster.shapes[name] for name in {*self._leaving, *self._cluster.stopping})
        starting = Counter(self._starting.values())
        return {
            shape: Held(serving=serving[shape], starting=starting[shape], leaving=leaving[shape])
            for shape in serving | leaving | starting
        }

    async def ask(self, counts: Mapping[WorkerShape, int]) -> None:
        for shape, count in counts.items():
            serving = [name for name in self._serving() if self._cluster.shapes[name] == shape]
            starting = [task for task, of in self._starting.items() if of == shape]
            dying = [name for name in self._cluster.stopping - {*self._leaving} if self._cluster.shapes[name] == shape]
            for _ in range(count - len(serving) - len(starting) - len(dying)):
                name = f"worker-{shape}-{next(self._numbers)}"
                task = asyncio.create_task(self._start(name, shape), name=name)
                self._starting[task] = shape
                task.add_done_callback(self._started)
            for task in starting[max(0, count - len(serving)) :]:
                task.cancel()
            for name in serving[count:]:
                self._leaving[name] = asyncio.create_task(self._retire(name))

    async def stop(self) -> None:
        """What starts or leaves is waited for, and goes with the cluster."""
        for task in self._starting:
            task.cancel()
        if tasks := [*self._starting, *self._leaving.values()]:
            await asyncio.wait(tasks)

    def _serving(self) -> list[str]:
        starting = {task.get_name() for task in self._starting}
        return [name for name in self._cluster.nodes if name not in self._leaving and name not in starting]

    async def _start(self, name: str, shape: WorkerShape) -> None:
        role = self._cluster.membership.most_wanted(shape=shape)
        await self._cluster.add_worker(name, role, shape)

    def _started(self, task: asyncio.Task[None]) -> None:
        del self._starting[task]
        if not task.cancelled() and isinstance(error := task.exception(), SlipstreamError):
            logger.error("a worker does not start: %s", error.message)

    async def _retire(self, name: str) -> None:
        try:
            if name in self._cluster.nodes:
                await self._cluster.retire_worker(name)
        finally:
            del self._leaving[name]
