"""What replanning goes by that follows a plan: profiles that this was made of, and the shapes of workers that they are
of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.planned import on_devices_alike, several
from placement.candidates import Candidate
from placement.layout import Role
from placement.profile import Profile
from placement.shapes import Limits, Shape, shapes, space_of
from placement.topology import Topology
from placement.worker_shape import WorkerShape


@dataclass(frozen=True)
class Stored:
    """`path`: None for one that was reckoned just now."""

    profile: Profile
    path: Path | None


def replan_section(
    layout: Candidate, named: Mapping[str, Shape], stored: Sequence[Stored], limits: Limits, topology: Topology
) -> dict[str, Any]:
    """Of the configuration, but for the targets: the profile of the layout's workers, and if others could take their
    devices the shapes to choose from, its own first, with their profiles. `named` are the shapes that the layout is of,
    `stored` maybe of further ones. Empty if the profiles are in no files."""
    own = [named[option.name] for option in (layout.decode, layout.prefill) if option is not None]
    fitting = _fitting([one.profile for one in stored], limits, topology)
    alike = [shape for shape in (*own, *fitting) if on_devices_alike(shape, own[0])]
    files = {shape.profile.setting.tp: _path_of(shape.profile, stored) for shape in alike}
    if None in files.values():
        return {}
    first, *further = map(str, files.values())
    found = dict.fromkeys(str(worker_shape(shape)) for shape in alike)
    kept_together = layout.near and several(topology)
    if len(found) == 1 or kept_together:
        return {"profile": first}
    return {"profile": first, "shapes": [*found]} | ({"further_profiles": further} if further else {})


def worker_shape(shape: Shape) -> WorkerShape:
    return WorkerShape(shape.profile.setting.tp, shape.stages)


def _fitting(profiles: Sequence[Profile], limits: Limits, topology: Topology) -> Iterator[Shape]:
    """Shapes for which a node is large enough."""
    found = shapes(profiles, limits)
    space = space_of(topology, found, limits, frozenset(Role))
    able = {option.name for option in space.options if space.why_not(option) is None}
    return (shape for shape in found if shape.name in able)


def _path_of(profile: Profile, stored: Sequence[Stored]) -> Path | None:
    return next(one.path for one in stored if one.profile is profile)
