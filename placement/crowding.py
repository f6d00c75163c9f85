"""Workers that share the cores of a machine: what of that was never measured."""

from __future__ import annotations

from collections.abc import Sequence

from placement.arranged import Simulated
from placement.profile import Profile
from placement.shaped import Shaped
from placement.topology import Topology


def crowded_cluster(profile: Profile, topology: Topology, cluster: Simulated, workers: int) -> str | None:
    """What is taken for true of a cluster that comes to have so many workers."""
    return crowded(profile, cluster.on_a_node(workers), topology.most_in_a_node(profile.setting.device))


def crowded_shapes(profiles: Sequence[Profile], topology: Topology, cluster: Shaped, devices: int) -> str | None:
    """The same where shapes change on so many devices: what is taken for true of the most and smallest workers."""
    shape = min(cluster.of, key=lambda one: (one.devices, one))
    profile = next(one for one in profiles if one.setting.tp == shape.tp)
    return crowded_cluster(profile, topology, cluster.of[shape], devices // shape.devices)


def crowded(profile: Profile, workers: int, cores: int) -> str | None:
    """What is taken for true of so many workers on one machine with so many cores; None if they were measured beside
    each other, and of devices that nobody shares."""
    threads = workers * profile.setting.devices
    if profile.setting.device != "cpu" or threads <= cores:
        return not_measured_together(profile, workers)
    return (
        f"{workers} workers on one machine are extrapolated: they compute with {threads} threads on {cores} cores, and "
        f"are taken to get turns there, so that each takes {threads / cores:.3g} times as long while all compute"
    )


def not_measured_together(profile: Profile, workers: int) -> str | None:
    """The same where each has cores of its own."""
    measured = profile.setting.beside + 1
    if profile.setting.device != "cpu" or workers <= measured:
        return None
    cost = "as much as the first" if measured > 1 else "nothing"
    return (
        f"{workers} workers on one machine are extrapolated: no more than {measured} were measured at a time, and a "
        f"further one is taken to cost {cost}; profile with --beside {workers - 1}"
    )
