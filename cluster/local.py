"""A cluster in one process, without Ray: real workers, links, hand-offs and dispatch. For tests, benchmarks and
machines that have no Ray."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import AsyncIterator
from pathlib import Path

from cluster.attendance import Attendance
from cluster.client import ClusterBackend
from cluster.config.tree import SlipstreamConfig
from cluster.groups import group_of
from cluster.local_fleet import LocalFleet
from cluster.membership import Member, Membership, Orders, Plan
from cluster.node import WorkerNode
from cluster.recorder import Report
from cluster.replanning import Replan, Replanning
from cluster.routes import Routes
from cluster.worker import load_runner, make_node
from core.replan_metrics import ReplanStatus
from core.types import Role
from placement.worker_shape import WorkerShape


class LocalCluster:
    """Workers by role, as `config.cluster` asks, and the backend over them. They announce themselves to a membership as
    those of a controller do, so a plan that is put there is followed within a second."""

    def __init__(
        self,
        config: SlipstreamConfig,
        folder: Path,
        threads: int = 1,
        replan: Replan | None = None,
    ) -> None:
        self._config = config
        self._folder = folder
        self._threads = threads
        self._attendances: dict[str, Attendance] = {}
        self._numbers = itertools.count()
        self.membership = Membership(Plan(wanted=config.cluster.roles, shapes=config.shapes))
        self.nodes: dict[str, WorkerNode] = {}
        self.shapes: dict[str, WorkerShape] = {}
        """Of whoever is here, or was."""
        self.stopping: set[str] = set()
        """They hold their devices yet."""
        self.fleet = LocalFleet(self)
        self.replanning = None if replan is None else Replanning(*replan, self.membership, self.scale, self.fleet)
        self.backend = ClusterBackend(
            self._list_members,
            routes=Routes.of(config),
            expected_workers=config.cluster.num_workers,
            report=None if self.replanning is None else self._report,
        )

    async def start(self) -> None:
        """Load, listen, connect; returns when a request would be served."""
        for role, count in self._config.cluster.roles.items():
            for index in range(count):
                await self.add_worker(f"{role}-{index}", role)
        await self.backend.start()
        await self.backend.wait_ready()
        if self.replanning is not None:
            await self.replanning.start()

    async def add_worker(self, worker_id: str, role: Role, shape: WorkerShape | None = None) -> WorkerNode:
        """Of that shape, or if none is named the one for that role, which may soon be another that the shape is for:
        the plan has the last word. When this is cancelled, the worker is gone by the time it ends."""
        starting = asyncio.create_task(self._start_worker(worker_id, role, shape))  # a thread that loads goes on
        try:
            return await asyncio.shield(starting)
        except asyncio.CancelledError:
            await asyncio.wait({starting})
            if starting.exception() is None:
                await self.remove_worker(worker_id)
            raise

    async def _start_worker(self, worker_id: str, role: Role, shape: WorkerShape | None) -> WorkerNode:
        began, group = time.monotonic(), group_of(self._config, role, shape)
        engine = group.config.engine
        runner = await asyncio.to_thread(
            load_runner, self._folder, engine, self._threads, self._config.speculation.settings
        )
        node = make_node(worker_id, role, runner, self._config, self._folder)
        address = await node.start("127.0.0.1")
        self.nodes[worker_id], self.shapes[worker_id] = node, group.shape
        member = Member(
            worker_id=worker_id,
            address=address,
            role=role,
            layout=runner.layout,
            roles=group.roles,
            shape=group.shape,
            startup_s=time.monotonic() - began,
        )
        self._attendances[worker_id] = Attendance(node, member, engine, self._announce)
        await self._attendances[worker_id].start()
        return node

    async def remove_worker(self, worker_id: str) -> None:
        """Stop a worker the hard way: its links close under whoever holds them."""
        await self._attendances.pop(worker_id).leave()
        self.membership.leave(worker_id)
        node = self.nodes.pop(worker_id)
        self.stopping.add(worker_id)
        try:
            await node.stop()
        finally:
            self.stopping.discard(worker_id)

    async def retire_worker(self, worker_id: str) -> None:
        """Let a worker end what it has, within drain_timeout_s, before it is stopped."""
        await self._attendances[worker_id].leave()
        self.membership.leave(worker_id)
        await self.nodes[worker_id].drain(self._config.gateway.drain_timeout_s)
        if worker_id in self._attendances:  # it may have died meanwhile
            await self.remove_worker(worker_id)

    async def scale(self, workers: int) -> None:
        """Have so many: new ones get what the plan lacks, and the newest go first, as with Ray Serve."""
        while len(self.nodes) < workers:
            worker_id = f"worker-{next(self._numbers)}"
            await self.add_worker(worker_id, self.membership.most_wanted())
        await asyncio.gather(*(self.retire_worker(worker_id) for worker_id in list(self.nodes)[workers:]))

    def address(self, worker_id: str) -> str:
        """At which a worker listens."""
        return self._attendances[worker_id].member.address

    async def stop(self) -> None:
        """Raises what has ended replanning, if something had."""
        if self.replanning is not None:
            await self.replanning.stop()
        await self.fleet.stop()
        await self.backend.stop()
        for worker_id in list(self.nodes):
            await self.remove_worker(worker_id)
        if self.replanning is not None:
            self.replanning.check_health()

    async def _announce(self, member: Member) -> Orders:
        return self.membership.announce(member, time.monotonic())

    async def _report(self, report: Report) -> ReplanStatus | None:
        assert self.replanning is not None
        return self.replanning.report(report, time.monotonic())

    async def _list_members(self) -> list[Member]:
        return self.membership.members()


@contextlib.asynccontextmanager
async def local_cluster(
    config: SlipstreamConfig,
    folder: Path,
    threads: int = 1,
    replan: Replan | None = None,
) -> AsyncIterator[LocalCluster]:
    cluster = LocalCluster(config, folder, threads, replan)
    try:
        await cluster.start()
        yield cluster
    finally:
        await cluster.stop()
