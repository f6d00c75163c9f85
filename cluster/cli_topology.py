"""`slipstream topology`: what `slipstream plan --topology` reads, of this machine or of a Ray cluster."""

from __future__ import annotations

from pathlib import Path

import click

from cluster.hardware import topology_here
from core.errors import ConfigError
from core.files import check_writable, write_text
from placement.topology import Topology, to_yaml


@click.command()
@click.option("--ray-address", help="Of a running Ray cluster, such as auto or HOST:6379. Default: this machine.")
@click.option("--measure", is_flag=True, help="With --ray-address: time copies within nodes, and TCP between them.")
@click.option("--out", type=click.Path(path_type=Path), help="Write a file instead of printing.")
def topology(ray_address: str | None, measure: bool, out: Path | None) -> None:
    """Describe nodes, devices and links for slipstream plan --topology."""
    if measure and ray_address is None:
        raise ConfigError("--measure has no meaning without --ray-address; leave it out", param="measure")
    check_writable(out, "out")
    text = to_yaml(topology_here() if ray_address is None else of_cluster(ray_address, measure))
    if out is None:
        click.echo(text, nl=False)
        return
    write_text(out, text, "out")


def of_cluster(address: str, measure: bool) -> Topology:
    """Of the Ray cluster there, which is left as it is. Raises ConfigError if it does not answer."""
    import logging

    import ray
    from ray.exceptions import RayError

    from cluster.ray_nodes import check_there, nodes_of
    from cluster.ray_topology import between, inside, topology_of

    check_there(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise ConfigError(f"--ray-address {address}: {str(error).splitlines()[0]}", param="ray_address") from error
    try:
        nodes = nodes_of(ray.nodes())
        return topology_of(nodes, inside, between) if measure else topology_of(nodes)
    except RayError as error:
        raise ConfigError(f"the Ray cluster could not be measured: {str(error).splitlines()[-1]}") from error
    finally:
        ray.shutdown()
