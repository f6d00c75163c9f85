"""A worker's place in the membership: it says every second that it is there, and becomes what it is told to be."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec

from cluster.config.engine import EngineSection
from cluster.membership import ANNOUNCE_PERIOD_S, Member, Orders
from cluster.node import WorkerNode
from core.errors import Unavailable

logger = logging.getLogger(__name__)

Announce = Callable[[Member], Awaitable[Orders]]
"""Raises Unavailable while there is no controller to hear it."""


class Attendance:
    """`await start()` when the node listens. Changes of role need no other weights: what the worker has under way goes
    on, and what comes is of its new role."""

    def __init__(self, node: WorkerNode, member: Member, engine: EngineSection, announce: Announce) -> None:
        self.member = member
        self._node = node
        self._engine = engine
        self._announce = announce
        self._going_on: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Raises Unavailable."""
        await self.announce()
        self._going_on = asyncio.create_task(self._go_on())

    async def announce(self) -> None:
        """Raises Unavailable."""
        orders = await self._announce(self.member)
        before, plan = self.member, orders.plan
        if (orders.role, plan) != (before.role, before.plan):
            if orders.role is not before.role:
                logger.warning("%s changes from %s to %s", before.worker_id, before.role, orders.role)
            self._node.set_role(orders.role, self._engine.batched_tokens(orders.role, plan.step_tokens))
        self.member = msgspec.structs.replace(before, role=orders.role, plan=plan)

    def check_health(self) -> None:
        """Raises what has ended it, if something has: nobody would give this worker another role."""
        if self._going_on is not None and self._going_on.done() and not self._going_on.cancelled():
            self._going_on.result()

    async def leave(self) -> None:
        """Announce nothing more."""
        if self._going_on is not None:
            self._going_on.cancel()
            await asyncio.wait({self._going_on})

    async def _go_on(self) -> None:
        while True:
            await asyncio.sleep(ANNOUNCE_PERIOD_S)
            try:
                await self.announce()
            except Unavailable as error:
                logger.warning("the controller does not answer, trying again: %s", error.message)
