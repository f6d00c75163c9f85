"""What is taken for true of the workers of a cluster without having been measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from placement.arranged import Simulated
from placement.crowding import crowded_cluster, crowded_shapes
from placement.layout import Role
from placement.profile import Profile
from placement.shaped import Shaped
from placement.topology import Topology
from placement.workload import Workload


def doubts(
    profiles: Sequence[Profile],
    topology: Topology,
    cluster: Simulated | Shaped,
    most: int,
    chunk_tokens: int,
    workload: Workload | None = None,
) -> list[str]:
    """A sentence each, of workers with steps of up to `chunk_tokens` tokens, `most` at a time, or where their shapes
    may change on so many devices. `workload`: None if any may come."""
    found = [doubt for profile in profiles if (doubt := profile.doubt()) is not None]
    if isinstance(cluster, Simulated):
        found += _extrapolated("workers are", profiles[0], cluster, chunk_tokens, workload)
        crowd = crowded_cluster(profiles[0], topology, cluster, most)
    else:
        of_tp = {profile.setting.tp: profile for profile in profiles}
        for shape, worker in cluster.of.items():
            found += _extrapolated(f"workers of {shape} are", of_tp[shape.tp], worker, chunk_tokens, workload)
        crowd = crowded_shapes(profiles, topology, cluster, most)
    return [*found, *([crowd] if crowd else [])]


def _extrapolated(
    who: str, profile: Profile, worker: Simulated, chunk_tokens: int, workload: Workload | None
) -> Iterator[str]:
    """Any worker may come to both compute prompts and decode."""
    group = worker.worker(Role.BOTH, chunk_tokens, 0, crowded=False)
    for what in profile.beyond(group, workload):
        yield f"{who} extrapolated: they may have {what}"
    if profile.source == "roofline":
        yield f"{who} foretold by a roofline, not measured: expect errors of tens of percent"
