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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import JSONResponse

from cluster.at_hand import at_hand
from cluster.client import ClusterBackend
from cluster.config.loading import on_device
from cluster.config.tree import SlipstreamConfig
from cluster.groups import Group, groups_of
from cluster.membership import Member, Membership, Orders, Plan
from cluster.recorder import Report
from cluster.replan_setup import Grounds, grounds_of, replanner_of
from cluster.replanning import Replanning
from cluster.resources import Share
from cluster.routes import Routes
from cluster.serve_scale import ServeFleet, none_at_first, scale_deployment
from cluster.traffic_log import TrafficLog
from core.errors import Unavailable
from core.replan_metrics import Decided, ReplanStatus
from core.tracing import export_spans
from core.types import Role
from engine.kv_layout import KVLayout
from placement.worker_shape import WorkerShape

logger = logging.getLogger(__name__)

APP_NAME = "slipstream"
HEALTH: dict[str, Any] = {"health_check_period_s": 1.0, "health_check_timeout_s": 5.0}
SHUTDOWN_SLACK_S = 5.0
LEAVE_TIMEOUT_S = 0.5
"""Serve's handles wait for a deployment that is gone, so when everything ends this is what its end takes."""


class Controller:
    """Membership over Serve's calls: once a second per worker and gateway, never per request."""

    async def __init__(self, config: SlipstreamConfig, grounds: Grounds | None) -> None:  # type: ignore[misc]
        self._membership = Membership(Plan(wanted=config.cluster.roles, shapes=config.shapes))
        groups = groups_of(config)
        self._workers = groups[0].name  # of those whose number is replanned there is one
        self._replanning: Replanning | None = None
        if grounds is not None and config.replan.mode != "off":
            replanner = replanner_of(config, grounds)
            fleet = ServeFleet({group.shape: group.name for group in groups}, APP_NAME)
            self._replanning = Replanning(replanner, config.replan.mode, self._membership, self._scale, fleet)
            await self._replanning.start()

    async def admit(
        self, worker_id: str, layout: KVLayout, node: str, able: tuple[Role, ...], shape: WorkerShape
    ) -> Role:
        return self._membership.admit(worker_id, layout, time.monotonic(), node, able, shape)

    async def announce(self, member: Member) -> Orders:
        return self._membership.announce(member, time.monotonic())

    async def leave(self, worker_id: str) -> None:
        self._membership.leave(worker_id)

    async def report(self, report: Report) -> ReplanStatus | None:
        """What a gateway says once a second, if somebody replans."""
        return None if self._replanning is None else self._replanning.report(report, time.monotonic())

    async def members(self) -> list[Member]:
        self._membership.expire(time.monotonic())
        return self._membership.members()

    async def check_health(self) -> None:
        if self._replanning is not None:
            self._replanning.check_health()

    async def __del__(self) -> None:
        if (replanning := getattr(self, "_replanning", None)) is not None:
            await replanning.stop()

    async def _scale(self, workers: int) -> None:
        await scale_deployment(self._workers, APP_NAME, workers)


class Worker:
    """One group of devices with one model on it. With more than one device, the replica leads a process for each."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, group: Group, folder: str, threads: int, controller: DeploymentHandle
    ) -> None:
        # Torch is not needed to deploy, nor in the other replicas.
        from cluster.attendance import Attendance
        from cluster.worker import load_runner, make_node

        began = time.monotonic()
        self._config = config = group.config
        self._controller = controller
        worker_id = f"worker-{os.getpid()}-{uuid.uuid4().hex[:8]}"  # the process, for who looks at a metric's label
        path = await asyncio.to_thread(at_hand, config, folder)
        runner = await asyncio.to_thread(load_runner, path, config.engine, threads, config.speculation.settings)
        _trace(config, "slipstream-worker", worker_id)
        node = ray.get_runtime_context().get_node_id()
        role = await controller.admit.remote(worker_id, runner.layout, node, group.roles, group.shape)
        self._node = make_node(worker_id, role, runner, config, path)
        address = await self._node.start(_host(config))
        member = Member(
            worker_id=worker_id,
            address=address,
            role=role,
            layout=runner.layout,
            node=node,
            roles=group.roles,
            shape=group.shape,
            startup_s=time.monotonic() - began,
        )
        self._attendance = Attendance(self._node, member, config.engine, self._announce)
        await self._attendance.start()

    async def _announce(self, member: Member) -> Orders:
        with _controller_answers():
            orders: Orders = await self._controller.announce.remote(member)
        return orders

    async def _leave(self, worker_id: str) -> None:
        """When everything ends, the controller may have gone before."""
        try:
            with _controller_answers():
                async with asyncio.timeout(LEAVE_TIMEOUT_S):
                    await self._controller.leave.remote(worker_id)
        except (Unavailable, TimeoutError):
            logger.info("the controller will notice later that %s has left", worker_id)

    async def check_health(self) -> None:
        self._node.check_health()
        self._attendance.check_health()

    async def __del__(self) -> None:
        """Serve wants fewer workers, or none: this one ends what it has before it goes."""
        if (attendance := getattr(self, "_attendance", None)) is not None:
            await attendance.leave()
            drain = self._node.drain(self._config.gateway.drain_timeout_s)
            await asyncio.gather(self._leave(attendance.member.worker_id), drain)
        if (node := getattr(self, "_node", None)) is not None:
            await node.stop()


class Gateway:
    """The HTTP API on a port of its own, and the sessions to the workers."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, config: SlipstreamConfig, folder: str, controller: DeploymentHandle, *_workers: DeploymentHandle
    ) -> None:
        from cluster.front import Front

        async def list_members() -> list[Member]:
            try:
                with _controller_answers():
                    members: list[Member] = await controller.members.remote()
            except Unavailable as error:
                logger.warning("keeping the workers known: %s", error.message)
                return []
            return members

        log = None if config.gateway.traffic_log is None else TrafficLog(config.gateway.traffic_log)

        async def report(report: Report) -> ReplanStatus | None:
            status: ReplanStatus | None = None
            if config.replan.mode != "off":
                with _controller_answers():
                    status = await controller.report.remote(report)
            if log is not None:  # once: what the controller has not taken is reported again
                log.append(report.served)
            return status

        backend = ClusterBackend(
            list_members,
            routes=Routes.of(config),
            expected_workers=config.cluster.num_workers,
            report=report if config.replan.mode != "off" or log is not None else None,
        )
        _trace(config, "slipstream-gateway", f"gateway-{os.getpid()}")
        self._backend = backend
        self._front = Front(config, await asyncio.to_thread(at_hand, config, folder), backend, _host(config))
        await self._front.start()

    async def __call__(self, _request: Request) -> JSONResponse:
        """For who comes by way of Serve's proxies, where somebody has them run."""
        return JSONResponse({"error": {"message": f"the API is at {self._front.url}", "type": "misdirected"}}, 421)

    async def address(self) -> str:
        return self._front.url

    async def ready(self) -> tuple[bool, str]:
        """Whether a request would be served, and if not, why."""
        return self._front.ready()

    async def decided(self) -> list[Decided]:
        """What replanning decided lately."""
        status = self._backend.status().replanning
        return [] if status is None else status.decisions

    async def drain(self) -> None:
        """Refuse new requests and wait for the running ones, drain_timeout_s at most."""
        await self._front.drain()

    async def check_health(self) -> None:
        self._front.check_health()

    async def __del__(self) -> None:
        if (front := getattr(self, "_front", None)) is not None:
            await front.stop()


@contextmanager
def _controller_answers() -> Iterator[None]:
    """What Ray raises becomes Unavailable."""
    try:
        yield
    except (RayError, RayServeException) as error:
        raise Unavailable(f"the controller does not answer: {error}") from error


def _trace(config: SlipstreamConfig, service: str, instance: str) -> None:
    """Send the spans of this process to the collector, if there is one."""
    if config.cluster.otlp_traces_endpoint is not None:
        export_spans(config.cluster.otlp_traces_endpoint, service, instance)


def _host(config: SlipstreamConfig) -> str:
    """Where workers listen: on a cluster of our own nobody else has business there."""
    return ray.util.get_node_ip_address() if config.cluster.ray_address else "127.0.0.1"


def build(
    config: SlipstreamConfig, folder: str, shares: Sequence[Share], *, gateway_on: dict[str, Any]
) -> serve.Application:
    """The application for a model that is in `folder`, or is fetched by nodes that don't have it. `shares` is what each
    worker gets, by group; `gateway_on` the options of an actor that name the gateway's node (cluster.ray_nodes): left
    to Serve it would be on any, and nobody would know where to find its port."""
    config = on_device(config, "cuda" if shares[0].gpus else "cpu")
    groups = groups_of(config)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    common: dict[str, Any] = {**HEALTH, "logging_config": quiet, "graceful_shutdown_wait_loop_s": 0.1}
    drained: dict[str, Any] = {
        "max_constructor_retry_count": 2,
        "graceful_shutdown_timeout_s": config.gateway.drain_timeout_s + SHUTDOWN_SLACK_S,
        **common,
    }
    controller = serve.deployment(
        Controller, name="controller", num_replicas=1, ray_actor_options={"num_cpus": 0}, **common
    ).bind(config, grounds_of(config, _threads(groups[0], shares[0])))
    workers = [
        none_at_first(serve.deployment(Worker, **_placed(group, share), **drained), group.workers).bind(
            group, folder, _threads(group, share), controller
        )
        for group, share in zip(groups, shares, strict=True)
    ]
    gateway = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, **gateway_on},
        **drained,
    )
    return gateway.bind(config, folder, controller, *workers)


def _placed(group: Group, share: Share) -> dict[str, Any]:
    """How many workers of the group there are, each in a placement group of its own."""
    labels = group.config.cluster.node_labels
    return {
        "name": group.name,
        "num_replicas": max(1, group.workers),
        "ray_actor_options": {
            "num_cpus": share.cpus,
            "num_gpus": share.gpus,
            "runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(_threads(group, share))}},
        },
        "placement_group_bundles": [share.bundle],
        "placement_group_strategy": "STRICT_PACK",
        "placement_group_bundle_label_selector": [labels] if labels else None,
    }


def _threads(group: Group, share: Share) -> int:
    """Of each process of a worker."""
    return max(1, int(share.cpus / group.config.engine.ranks))
