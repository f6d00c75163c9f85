"""What a Serve configuration names to have Slipstream deployed by others, such as KubeRay:

    applications:
      - {name: slipstream, import_path: "cluster.serve_app:application", args: {model: demo, …}}

`args` is the tree of the YAML file of `slipstream serve --config`.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import serve

from cluster.app import build
from cluster.checks import check_kv_transport
from cluster.config.loading import overlaid
from cluster.config.tree import SlipstreamConfig
from cluster.groups import groups_of
from cluster.ray_nodes import ON_HEAD, nodes_of
from cluster.resources import Share, share_on
from core.errors import ConfigError


def application(args: dict[str, Any]) -> serve.Application:
    """The gateway runs on the head node, where its port can be found. With `cpus_per_worker` and `device` given,
    Serve waits for nodes that are still to come; else what workers get is shared out among those that are there. Raises
    ConfigError, ModelError."""
    from engine.checkpoints import Silent, resolve
    from engine.model_config import ModelConfig

    if (args.get("cluster") or {}).get("ray_address"):
        raise ConfigError(
            "cluster.ray_address has no meaning in a Serve configuration: it is the cluster that reads it"
        )
    config = overlaid(args, {"ray_address": "auto"})
    check_kv_transport(config)
    folder = resolve(config.model, revision=config.revision, progress=Silent(), check_config=ModelConfig.from_dict)
    return build(config, str(folder), _shares(config), gateway_on=ON_HEAD)


def _shares(config: SlipstreamConfig) -> list[Share]:
    if config.cluster.cpus_per_worker is None or config.engine.device == "auto":
        return share_on(config, nodes_of(ray.nodes()))
    found = [group.config for group in groups_of(config)]
    on_gpu = config.engine.device == "cuda"
    return [Share(own.cluster.cpus_per_worker or 0.0, own.engine.ranks if on_gpu else 0) for own in found]
