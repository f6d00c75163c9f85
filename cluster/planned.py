"""From the layout that a plan chose to the configuration that `slipstream serve` takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from cluster.config.loading import validated
from core.errors import ConfigError
from placement.candidates import Candidate
from placement.packing import packed
from placement.shapes import Limits, Shape
from placement.topology import Topology


class _Planned(msgspec.Struct):
    serve: dict[str, Any] | None
    replan: dict[str, Any] | None = None


def why_not(candidate: Candidate, shapes: dict[str, Shape], topology: Topology) -> str | None:
    """Why `slipstream serve` can't run the layout; None if it can: each worker is on one node, and if prefill and
    decode workers have unlike shapes, it does not matter on which one of several."""
    if candidate.prefill is not None:
        prefill, decode = shapes[candidate.prefill.name], shapes[candidate.decode.name]
        unlike = f"{prefill.name} for prefill and {decode.name} for decode"
        if prefill.profile.setting.device != decode.profile.setting.device:
            return f"serve gives all workers one kind of device, not {unlike}"
        if _split(prefill) != _split(decode) and candidate.near and several(topology):
            return f"serve keeps only workers of one shape together on each of several nodes, not {unlike}"
    try:
        packed(candidate, topology)
    except ConfigError as error:
        return f"serve runs a worker on one node: {error.message}"
    return None


def on_devices_alike(one: Shape, other: Shape) -> bool:
    """Whether workers of the one can take the devices of the other in service: on a CPU these have as many cores."""
    ours, theirs = one.profile.setting, other.profile.setting
    return (ours.device, ours.threads) == (theirs.device, theirs.threads)


def _split(shape: Shape) -> dict[str, Any]:
    """What makes the shape of a worker, as settings."""
    setting = shape.profile.setting
    split: dict[str, Any] = {"tensor_parallel_size": setting.tp, "pipeline_parallel_size": shape.stages}
    return split | ({"cpus_per_worker": float(setting.devices * shape.stages)} if setting.device == "cpu" else {})


def several(topology: Topology) -> bool:
    return sum(node.count for node in topology.nodes) > 1


def config_of(
    candidate: Candidate,
    shapes: dict[str, Shape],
    limits: Limits,
    topology: Topology,
    drafter: str | None,
    weights: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The tree of the YAML file, without what has its default. `weights` are those of drafters, by name. Raises
    ConfigError for a layout that can't be run."""
    if (why := why_not(candidate, shapes, topology)) is not None:
        raise ConfigError(why)
    shape = shapes[candidate.decode.name]
    profile, split = shape.profile, _split(shape)
    engine: dict[str, Any] = {
        "dtype": profile.model.dtype,
        "device": "cpu" if profile.setting.device == "cpu" else "cuda",
        "tensor_parallel_size": split["tensor_parallel_size"],
        "pipeline_parallel_size": split["pipeline_parallel_size"],
        "max_num_seqs": limits.max_sequences,
        "max_num_batched_tokens": candidate.chunk_tokens,
    }
    if profile.model.quantization is not None:
        engine["quantization"] = profile.model.quantization
    if limits.kv_cache_bytes is not None:
        engine["kv_cache_memory"] = str(limits.kv_cache_bytes)
    tree: dict[str, Any] = {
        "model": profile.model.name,
        "engine": engine,
        "cluster": _cluster(candidate, shapes, limits, several(topology)),
    }
    if shape.speculation is not None:
        budget = shape.speculation.rows - 1
        if limits.speculation is None and limits.drafter is not None:  # rows are then those that there were on average
            budget = profile.drafting_of(limits.drafter).budget
        tree["speculation"] = {"drafter": drafter, "budget": budget} | ({"weights": dict(weights)} if weights else {})
    validated(tree)
    return tree


def _cluster(candidate: Candidate, shapes: dict[str, Shape], limits: Limits, several_nodes: bool) -> dict[str, Any]:
    split = _split(shapes[candidate.decode.name])
    if candidate.prefill is None:
        cluster: dict[str, Any] = {"colocated": True, "decode_replicas": candidate.decodes}
    else:
        prefills, decodes = candidate.totals
        cluster = {
            "prefill_replicas": prefills,
            "decode_replicas": decodes,
            "handoff_min_tokens": limits.handoff_min_tokens,
        }
        if candidate.near and several_nodes:
            cluster |= {"workers_per_node": candidate.prefills + candidate.decodes, "handoff_within_node": True}
        own = _split(shapes[candidate.prefill.name])
        cluster |= {f"prefill_{name}": value for name, value in own.items() if value != split[name]}
    if "cpus_per_worker" in split:
        cluster["cpus_per_worker"] = split["cpus_per_worker"]
    return cluster


def planned_tree(path: Path, *, replanning: bool) -> dict[str, Any]:
    """The configuration in a file that `slipstream plan --json` printed; with `replanning` what that goes by too, if
    the plan knew. Raises ConfigError."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Planned)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="plan") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(
            f"{path} is no plan: {error}; make one with slipstream plan --json; what --out wrote is for serve --config",
            param="plan",
        ) from error
    if found.serve is None:
        raise ConfigError(f"{path}: none of the plan's layouts can be served; its warnings say why", param="plan")
    return found.serve | ({"replan": found.replan} if replanning and found.replan else {})
