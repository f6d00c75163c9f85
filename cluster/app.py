"""The Ray Serve application: controller, workers, gateway.

Serve owns their lifecycle, health, restarts and rollout. Requests and tokens don't pass through it: the gateway listens
on a port of its own and talks to the workers over links (core.links).
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec
import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from cluster.client import ClusterBackend
from cluster.config import SlipstreamConfig, on_device
from cluster.membership import ANNOUNCE_PERIOD_S, Member, Membership
from cluster.resources import Share
from cluster.routes import Routes
from core.tracing import export_spans
from core.types import Role
from engine.kv_layout import KVLayout

logger = logging.getLogger(__name__)

APP_NAME = "slipstream"
HEALTH: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
SHUTDOWN_SLACK_S = 5.0


class Controller:
    """Membership over Serve's calls: once a second per worker and gateway, never per request."""

    def __init__(self, wanted: dict[str, int]) -> None:
        self._membership = Membership({Role(role): count for role, count in wanted.items()})

    async def admit(self, worker_id: str, layout: KVLayout) -> Role:
        return self._membership.admit(worker_id, layout, time.monotonic())

    async def announce(self, member: Member) -> Role:
        return self._membership.announce(member, time.monotonic())

    async def members(self) -> list[Member]:
        self._membership.expire(time.monotonic())
        return self._membership.members()


class Worker:
    """One group of devices with one model on it. With more than one device, the replica leads a process for each."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: SlipstreamConfig, folder: str, threads: int, controller: DeploymentHandle
    ) -> None:
        from cluster.worker import drafter_bytes, load_runner, make_node  # torch is not needed to deploy

        self._config = config
        self._controller = controller
        worker_id = f"worker-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # the process, for who looks at a metric's label
        runner = await asyncio.to_thread(load_runner, Path(folder), config.engine, threads, drafter_bytes(config))
        _trace(config, "slipstream-worker", worker_id)
        role = await controller.admit.remote(worker_id, runner.layout)
        self._node = make_node(worker_id, role, runner, config, Path(folder))
        address = await self._node.start(_host(config))
        self._member = Member(worker_id=worker_id, address=address, role=role, layout=runner.layout)
        await self._announce_once()
        self._announcing = asyncio.ensure_future(self._announce())

    async def _announce(self) -> None:
        while True:
            await asyncio.sleep(ANNOUNCE_PERIOD_S)
            try:
                await self._announce_once()
            except (RayError, RayServeException) as error:
                logger.warning("the controller does not answer, trying again: %s", error)

    async def _announce_once(self) -> None:
        """Say that we are here and take the role that the controller wants filled."""
        role = await self._controller.announce.remote(self._member)
        if role is not self._node.role:
            logger.warning("%s changes from %s to %s", self._member.worker_id, self._node.role, role)
            await self._node.set_role(role, self._config.engine.batched_tokens(role))
            self._member = msgspec.structs.replace(self._member, role=role)

    async def check_health(self) -> None:
        self._node.check_health()

    async def __del__(self) -> None:
        if (announcing := getattr(self, "_announcing", None)) is not None:
            announcing.cancel()
        if (node := getattr(self, "_node", None)) is not None:
            await node.stop()


class Gateway:
    """The HTTP API on a port of its own, and the sessions to the workers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: SlipstreamConfig, folder: str, controller: DeploymentHandle, _workers: DeploymentHandle
    ) -> None:
        from cluster.front import Front

        async def list_members() -> list[Member]:
            try:
                members: list[Member] = await controller.members.remote()
            except (RayError, RayServeException) as error:
                logger.warning("the controller does not answer, keeping the workers known: %s", error)
                return []
            return members

        backend = ClusterBackend(
            list_members,
            routes=Routes.of(config),
            expected_workers=config.cluster.num_workers,
        )
        _trace(config, "slipstream-gateway", f"gateway-{os.getpid()}")
        self._front = Front(config, Path(folder), backend)
        await self._front.start()

    async def address(self) -> str:
        return self._front.url

    async def ready(self) -> tuple[bool, str]:
        """Whether a request would be served, and if not, why."""
        return self._front.ready()

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones, drain_timeout_s at most."""
        await self._front.drain()

    async def check_health(self) -> None:
        self._front.check_health()

    async def __del__(self) -> None:
        if (front := getattr(self, "_front", None)) is not None:
            await front.stop()


def _trace(config: SlipstreamConfig, service: str, instance: str) -> None:
    """Send the spans of this process to the collector, if there is one."""
    if config.cluster.otlp_traces_endpoint is not None:
        export_spans(config.cluster.otlp_traces_endpoint, service, instance)


def _host(config: SlipstreamConfig) -> str:
    """Where workers listen: on a cluster of our own nobody else has business there."""
    return ray.util.get_node_ip_address() if config.cluster.ray_address else "127.0.0.1"


def build(config: SlipstreamConfig, folder: str, share: Share) -> serve.Application:
    """The application for a model that is in `folder` on every node. `share` is what each worker gets."""
    config = on_device(config, "cuda" if share.gpus else "cpu")
    threads = max(1, int(share.cpus / config.engine.ranks))
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    drain_s = config.gateway.drain_timeout_s + SHUTDOWN_SLACK_S
    common: dict[str, Any] = {**HEALTH, "logging_config": quiet}
    controller = serve.deployment(
        Controller, name="controller", num_replicas=1, ray_actor_options={"num_cpus": 0}, **common
    ).bind({role.value: count for role, count in config.cluster.roles.items()})
    workers = serve.deployment(
        Worker,
        name=config.engine.group_name,
        num_replicas=config.cluster.num_workers,
        ray_actor_options={
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(threads)}},
        },
        placement_group_bundles=[share.bundle],
        placement_group_strategy="STRICT_PACK",
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=SHUTDOWN_SLACK_S,
        **common,
    ).bind(config, folder, threads, controller)
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_constructor_retry_count=2,
        graceful_shutdown_timeout_s=drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        **common,
    )
    return gateway.bind(config, folder, controller, workers)
