"""A cluster in one process, without Ray: real workers, links, hand-offs and dispatch. For tests, benchmarks and
machines that have no Ray."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.client import ClusterBackend
from cluster.config import SlipstreamConfig
from cluster.membership import Member
from cluster.node import WorkerNode
from cluster.routes import Routes
from cluster.worker import drafter_bytes, load_runner, make_node
from core.types import Role


class LocalCluster:
    """Workers by role, as `config.cluster` asks, and the backend over them."""

    def __init__(self, config: SlipstreamConfig, folder: Path, threads: int = 1) -> None:
        self._config = config
        self._folder = folder
        self._threads = threads
        self._members: dict[str, Member] = {}
        self.nodes: dict[str, WorkerNode] = {}
        self.backend = ClusterBackend(
            self._list_members,
            routes=Routes.of(config),
            expected_workers=config.cluster.num_workers,
        )

    async def start(self) -> None:
        """Load, listen, connect; returns when a request would be served."""
        for role, count in self._config.cluster.roles.items():
            for index in range(count):
                await self.add_worker(f"{role}-{index}", role)
        await self.backend.start()
        await self.backend.wait_ready()

    async def add_worker(self, worker_id: str, role: Role) -> WorkerNode:
        runner = load_runner(self._folder, self._config.engine, self._threads, drafter_bytes(self._config))
        node = make_node(worker_id, role, runner, self._config, self._folder)
        address = await node.start("127.0.0.1")
        self.nodes[worker_id] = node
        self._members[worker_id] = Member(worker_id=worker_id, address=address, role=role, layout=runner.layout)
        return node

    async def remove_worker(self, worker_id: str) -> None:
        """Stop a worker the hard way: its links close under whoever holds them."""
        del self._members[worker_id]
        await self.nodes.pop(worker_id).stop()

    async def stop(self) -> None:
        await self.backend.stop()
        for worker_id in list(self.nodes):
            await self.remove_worker(worker_id)

    async def _list_members(self) -> list[Member]:
        return list(self._members.values())


@contextlib.asynccontextmanager
async def local_cluster(config: SlipstreamConfig, folder: Path, threads: int = 1) -> AsyncIterator[LocalCluster]:
    cluster = LocalCluster(config, folder, threads)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
