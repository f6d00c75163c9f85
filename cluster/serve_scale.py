"""The number of a deployment's replicas, changed while it serves.

Serve's interface for scalers outside of it: the application is run with `external_scaler_enabled`, and its controller
takes a number. What runs is not touched, and a replica that is too many gets its graceful shutdown.
"""

from __future__ import annotations

import ray
from ray.exceptions import RayError
from ray.serve._private.common import DeploymentID
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

from core.errors import Unavailable


async def scale_deployment(name: str, app_name: str, replicas: int) -> None:
    """Raises Unavailable."""
    try:
        controller = ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        await controller.update_deployment_replicas.remote(DeploymentID(name=name, app_name=app_name), replicas)
    except (RayError, ValueError) as error:  # ValueError: there is no controller
        raise Unavailable(f"Ray Serve does not scale {name} to {replicas}: {error}") from error
