"""From the layout that a plan chose to the configuration that `slipstream serve` takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from cluster.config import validated
from core.errors import ConfigError
from placement.candidates import Candidate
from placement.shapes import Limits, Shape


class _Planned(msgspec.Struct):
    serve: dict[str, Any] | None


def why_not(candidate: Candidate, shapes: dict[str, Shape]) -> str | None:
    """Why `slipstream serve` can't run the layout; None if it can: all its workers have one shape."""
    if candidate.prefill is None:
        return None
    prefill, decode = shapes[candidate.prefill.name], shapes[candidate.decode.name]
    if (prefill.profile.setting, prefill.stages) == (decode.profile.setting, decode.stages):
        return None
    return f"serve runs one shape of worker, not {prefill.name} for prefill and {decode.name} for decode"


def config_of(candidate: Candidate, shapes: dict[str, Shape], limits: Limits, drafter: str | None) -> dict[str, Any]:
    """The tree of the YAML file, without what has its default. Raises ConfigError for a layout that can't be run."""
    if (why := why_not(candidate, shapes)) is not None:
        raise ConfigError(why)
    shape = shapes[candidate.decode.name]
    profile, setting = shape.profile, shape.profile.setting
    engine: dict[str, Any] = {
        "dtype": profile.model.dtype,
        "device": "cpu" if setting.device == "cpu" else "cuda",
        "tensor_parallel_size": setting.tp,
        "pipeline_parallel_size": shape.stages,
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
        "cluster": _cluster(candidate, shape, limits),
    }
    if shape.speculation is not None:
        tree["speculation"] = {"drafter": drafter, "budget": shape.speculation.rows - 1}
    validated(tree)
    return tree


def _cluster(candidate: Candidate, shape: Shape, limits: Limits) -> dict[str, Any]:
    if candidate.prefill is None:
        cluster: dict[str, Any] = {"colocated": True, "decode_replicas": candidate.decodes}
    else:
        cluster = {
            "prefill_replicas": candidate.prefills * candidate.nodes,
            "decode_replicas": candidate.decodes * candidate.nodes,
            "handoff_min_tokens": limits.handoff_min_tokens,
        }
    setting = shape.profile.setting
    if setting.device == "cpu":
        cluster["cpus_per_worker"] = float(setting.devices * shape.stages)
    return cluster


def planned_tree(path: Path) -> dict[str, Any]:
    """The configuration in a file that `slipstream plan --json` printed. Raises ConfigError."""
    try:
        tree = msgspec.json.decode(path.read_bytes(), type=_Planned).serve
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="plan") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"{path} is no plan: {error}; make one with slipstream plan --json", param="plan") from error
    if tree is None:
        raise ConfigError(
            f"{path}: none of the plan's layouts can be served: their workers differ in shape", param="plan"
        )
    return tree


def write_config(tree: dict[str, Any], path: Path) -> None:
    """Raises ConfigError if it can't be written."""
    try:
        path.write_text(yaml.safe_dump(tree, sort_keys=False), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {error.strerror}", param="out") from error
