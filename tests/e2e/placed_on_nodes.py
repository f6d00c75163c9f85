"""Deploys workers on a Ray cluster of several nodes, all on this machine, and prints as JSON where they are: the names
of the nodes of placement groups and of the gateway, the roles of workers by node, and the topology with measured links.

    python -m tests.e2e.placed_on_nodes FOLDER
"""

from __future__ import annotations

import json
import logging
import sys
import time

import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.util import placement_group_table

from cluster.app import APP_NAME, build
from cluster.config.loading import load
from cluster.ray_nodes import nodes_of, on_node
from cluster.ray_topology import between, inside, topology_of
from cluster.resources import share_on
from placement.topology import to_yaml

SETTINGS = {
    "dtype": "float32",
    "device": "cpu",
    "kv_cache_memory": "16MiB",
    "prefill_replicas": 2,
    "decode_replicas": 2,
    "cpus_per_worker": 1.0,
    "workers_per_node": 2,
    "handoff_within_node": True,
    "node_labels": {"pool": "fast"},
    "port": 0,
    "ray_address": "auto",
}
START_S = 120.0


def actors() -> list[tuple[str, str]]:
    """Name and node of each. Ray's public list of them needs its dashboard."""
    listed = ray._private.state.actors().values()
    return [(actor["Name"], actor["Address"]["NodeID"]) for actor in listed if actor["State"] == "ALIVE"]


def main(folder: str) -> None:
    cluster = Cluster()
    for name, pool in (("c", "slow"), ("a", "fast"), ("b", "fast")):  # the first is the head
        cluster.add_node(
            wait=False,
            num_cpus=4,
            labels={"pool": pool, "name": name},
            object_store_memory=80 * 2**20,
            include_dashboard=False,
        )
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, namespace="slipstream", log_to_driver=False, logging_level=logging.ERROR)
    serve.start(proxy_location="Disabled")
    config = load(None, SETTINGS | {"model": folder})
    shares = share_on(config, nodes_of(ray.nodes()))
    names = {node.node_id: node.labels["name"] for node in nodes_of(ray.nodes())}
    (b,) = (node for node, name in names.items() if name == "b")
    serve.run(build(config, folder, shares, gateway_on=on_node(b)), name=APP_NAME, route_prefix=None)
    controller = serve.get_deployment_handle("controller", APP_NAME)
    deadline = time.monotonic() + START_S
    while len(members := controller.members.remote().result()) < config.cluster.num_workers:
        assert time.monotonic() < deadline, "the workers did not come"
        time.sleep(0.2)
    groups = [group for group in placement_group_table().values() if group["state"] == "CREATED"]
    found = {
        "groups": sorted(names[place] for group in groups for place in group["bundles_to_node_id"].values()),
        "gateway": [names[place] for name, place in actors() if "#gateway#" in name],
        "strategies": sorted({group["strategy"] for group in groups}),
        "roles": sorted([names[member.node], member.role.value] for member in members),
        "topology": to_yaml(topology_of(nodes_of(ray.nodes()), inside, between)),
    }
    print(json.dumps(found), flush=True)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
