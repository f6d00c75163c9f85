"""The numbers of deployments' replicas, changed while they serve.

Serve's interface for scalers outside of it: the application is run with `external_scaler_enabled`, and its controller
takes a number. What runs is not touched, and a replica that is too many gets its graceful shutdown.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve import Deployment
from ray.serve._private.common import DeploymentID, ReplicaState
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _get_global_client

from core.errors import Unavailable
from placement.moving import Held
from placement.worker_shape import WorkerShape


async def scale_deployment(name: str, app_name: str, replicas: int) -> None:
    """Raises Unavailable."""
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        await controller.update_deployment_replicas.remote(DeploymentID(name=name, app_name=app_name), replicas)
    except (RayError, ValueError) as error:  # ValueError: there is no controller
        raise Unavailable(f"Ray Serve does not scale {name} to {replicas}: {error}") from error


def applications() -> dict[str, Any]:
    """What runs on Serve, by name, in the form of its ServeInstanceDetails. Serve's own `status` is this too, but it
    refuses a deployment without replicas. Raises what Ray raises."""
    client = _get_global_client(raise_if_no_controller_running=False)
    found: dict[str, Any] = {} if client is None else client.get_serve_details()["applications"]
    return found


def none_at_first(deployment: Deployment, replicas: int) -> Deployment:
    """With that many, which may be none: Serve takes 0 of its scaler, and of nobody who deploys."""
    if not replicas:
        deployment._deployment_config.num_replicas = 0
    return deployment


class ServeFleet:
    """A cluster.moving.Fleet: a deployment for each shape, by `names`. A replica that stops holds its devices until
    Serve has seen its end."""

    def __init__(self, names: Mapping[WorkerShape, str], app_name: str) -> None:
        self._names, self._app_name = names, app_name
        self._asked: dict[WorkerShape, int] = {}

    async def held(self) -> Mapping[WorkerShape, Held]:
        """Raises Unavailable."""
        try:
            controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
            details = await controller.get_serve_instance_details.remote()
            deployments = details["applications"][self._app_name]["deployments"]
            replicas = {shape: deployments[name]["replicas"] for shape, name in self._names.items()}
        except (RayError, ValueError, KeyError) as error:  # KeyError: nothing is known of the application yet
            raise Unavailable(f"Ray Serve does not tell of its replicas: {error!r}") from error
        return {shape: _held(Counter(ReplicaState(one["state"]) for one in of)) for shape, of in replicas.items()}

    async def ask(self, counts: Mapping[WorkerShape, int]) -> None:
        """Raises Unavailable."""
        for shape, count in counts.items():
            if self._asked.get(shape) != count:
                await scale_deployment(self._names[shape], self._app_name, count)
                self._asked[shape] = count


def _held(states: Counter[ReplicaState]) -> Held:
    serving, leaving = states[ReplicaState.RUNNING], states[ReplicaState.STOPPING]
    others = states.total() - serving - leaving - states[ReplicaState.STOPPED]
    return Held(serving=serving, leaving=leaving, starting=others)
