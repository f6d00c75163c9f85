"""From a YAML file and flags to the tree. Unknown keys are refused with the nearest known name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from cluster.config.cluster import HANDOFF
from cluster.config.engine import EngineSection
from cluster.config.tree import SECTIONS, SlipstreamConfig, leaves
from core.errors import ConfigError


def load(path: Path | None, overrides: Mapping[str, Any]) -> SlipstreamConfig:
    """The file's settings with `overrides` (Leaf.name -> value) on top. Raises ConfigError, one line."""
    return overlaid(read_tree(path) if path is not None else {}, overrides, path)


def overlaid(tree: dict[str, Any], overrides: Mapping[str, Any], path: Path | None = None) -> SlipstreamConfig:
    """As load, with the tree that was read from `path`."""
    return _checked(merged(tree, overrides), overrides, path)


def _checked(tree: Mapping[str, Any], overrides: Mapping[str, Any], path: Path | None) -> SlipstreamConfig:
    """What a file keeps for replanning may wait until that is on. Who names it now means it now."""
    named = sorted(leaf.field for leaf in leaves() if leaf.section == "replan" and leaf.name in overrides)
    if _waits(tree) and (others := [name for name in named if name != "mode"]):
        raise ConfigError(f"replan: {others[0]} has no meaning while replan is off; use advise or on, or leave it out")
    return validated(tree, path)


def _waits(tree: Mapping[str, Any]) -> bool:
    """Whether it says that replanning is off."""
    replan = tree.get("replan")
    return isinstance(replan, dict) and replan.get("mode", True) in (False, "off")


def merged(tree: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with `overrides` on top."""
    where = {leaf.name: (leaf.section, leaf.field) for leaf in leaves()} | {"model": (None, "model")}
    found = {name: dict(value) if isinstance(value, dict) else value for name, value in tree.items()}
    for name, value in overrides.items():
        section, field = where[name]
        (found if section is None else found.setdefault(section, {}))[field] = value
    return found


def of_plan(
    tree: dict[str, Any], overrides: Mapping[str, Any], path: Path | None = None
) -> tuple[SlipstreamConfig, list[str]]:
    """As overlaid, with a tree whose layout a plan has chosen. Settings that mean nothing in that are left out, and
    returned by name."""
    found = merged(tree, overrides)
    cluster, replan = found.get("cluster", {}), found.get("replan", {})
    idle = []
    if cluster.get("colocated") and "colocated" not in overrides and replan.get("mode") in (None, False, "off"):
        idle = [name for name in HANDOFF if name in cluster]
        found["cluster"] = {name: value for name, value in cluster.items() if name not in idle}
    return _checked(found, overrides, path), idle


def said_of_plan(
    tree: dict[str, Any], overrides: Mapping[str, Any], path: Path | None, say: Callable[[str], None]
) -> SlipstreamConfig:
    """As of_plan, which says what it leaves out."""
    config, idle = of_plan(tree, overrides, path)
    if idle:
        say(f"nothing is handed over in this layout, so {', '.join(idle)} will do nothing")
    return config


def validated(tree: Mapping[str, Any], path: Path | None = None) -> SlipstreamConfig:
    """The settings of a tree that was read from `path`, or made. What stands beside `replan: {mode: off}` waits: it is
    checked, and left out. Raises ConfigError, one line."""
    try:
        if _waits(tree):
            if len(tree["replan"]) > 1:
                SlipstreamConfig.model_validate({**tree, "replan": tree["replan"] | {"mode": "advise"}})
            tree = {name: value for name, value in tree.items() if name != "replan"}
        return SlipstreamConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error, path)) from error


def on_device(config: SlipstreamConfig, device: Literal["cpu", "cuda"]) -> SlipstreamConfig:
    """With device auto settled. Raises ConfigError for a setting that has no meaning there."""
    if config.engine.device != "auto":
        return config
    given = config.engine.model_dump(exclude_unset=True)
    try:
        engine = EngineSection.model_validate(given | {"device": device})
    except ValidationError as error:
        raise ConfigError(_explain(error, None)) from error
    return config.model_copy(update={"engine": engine})


def read_tree(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        ) from error
    except ValueError as error:  # a date or a number that YAML has the form of and Python has not
        raise ConfigError(f"{path} holds a value that cannot be read: {error}") from error
    if tree is None:
        return {}
    if isinstance(tree, dict):
        tree = {name: {} if value is None and name in SECTIONS else value for name, value in tree.items()}
    if not isinstance(tree, dict) or not all(isinstance(tree.get(s, {}), dict) for s in SECTIONS):
        raise ConfigError(
            f"{path}: the file and its sections {', '.join(SECTIONS)} must be mappings of names to values"
        )
    return tree


def _explain(error: ValidationError, path: Path | None) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    origin = f"{path}: " if path is not None else ""
    if first["type"] == "extra_forbidden":
        outside = len(first["loc"]) == 1
        known = [*SlipstreamConfig.model_fields, *(leaf.name if outside else leaf.field for leaf in leaves())]
        near = difflib.get_close_matches(str(first["loc"][-1]), known, n=1)
        return f"{origin}unknown setting {name}" + (f"; did you mean {near[0]}?" if near else "")
    message = first["msg"].removeprefix("Value error, ")
    return f"{origin}{name}: {message}" if name else f"{origin}{message}"
