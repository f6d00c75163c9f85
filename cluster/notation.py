"""How sizes, counts and adapters may be written, in files and flags. `auto` leaves a setting to be worked out."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict

from core.errors import ConfigError
from placement.worker_shape import parse_shapes

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{letter}b": 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)}
_UNITS |= {f"{letter}ib": 2 ** (10 * power) for power, letter in enumerate("kmgt", start=1)}
_LETTERS = {letter: 10 ** (3 * power) for power, letter in enumerate("kmgt", start=1)}
_LETTERS |= {letter: 2 ** (10 * power) for power, letter in enumerate("KMGT", start=1)}
"""As vLLM reads a number with a letter: k is 1000, K is 1024."""
_MAX = 2**63


def parse_bytes(text: str) -> int:
    """ "512MiB" and "512M" -> 536870912. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = None if match is None else _LETTERS.get(match[2], _UNITS.get(match[2].lower()))
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write bytes or a number with KiB, MiB, GiB or TiB, such as 512MiB")
    size = float(match[1]) * unit
    if size >= _MAX:
        raise ValueError("more than any machine has; write a number with KiB, MiB, GiB or TiB, such as 512MiB")
    return int(size)


def parse_count(text: str) -> int:
    """ "8192" and "8K" -> 8192, "8k" -> 8000. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)\s*", text)
    count = -1.0 if match is None else float(match[1]) * _LETTERS.get(match[2], 1)
    if not (0 <= count < _MAX and count.is_integer()):
        raise ValueError(f"{text!r} is not a count; write a number such as 8192, 8K (8192) or 8k (8000), or auto")
    return int(count)


def _check_bytes(text: str) -> str:
    if parse_bytes(text) == 0:
        raise ValueError(f"{text!r} is room for nothing; write a size such as 512MiB")
    return text


def _count_or_auto(value: object) -> object:
    """-1 is vLLM's other way to write auto."""
    if value in ("auto", "-1", -1):
        return None
    return parse_count(value) if isinstance(value, str) else value


def _size_or_auto(value: object) -> object:
    if isinstance(value, str):
        return None if value == "auto" else _check_bytes(value)
    return _check_bytes(str(value)) if type(value) is int else value


def _full_name(dtype: str) -> str:
    return {"half": "float16", "float": "float32"}.get(dtype, dtype)


Size = Annotated[str, AfterValidator(_check_bytes)]
SizeOrAuto = Annotated[str | None, BeforeValidator(_size_or_auto)]
CountOrAuto = Annotated[int | None, BeforeValidator(_count_or_auto)]
DtypeName = Annotated[Literal["auto", "bfloat16", "float16", "float32", "half", "float"], AfterValidator(_full_name)]
"""half and float are vLLM's short names, and become the long ones."""


class LoraModule(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    base_model_name: str | None = None
    """The model that the API lists it under; None is the served one."""


def _modules(value: object, each: str = "adapter", example: str = "sql=adapters/sql") -> object:
    """A list of modules, as flags have it, as the mapping that it stands for. Raises ValueError."""
    if isinstance(value, dict):
        return {name: {"path": item} if isinstance(item, str) else item for name, item in value.items()}
    if not isinstance(value, (list, tuple)):
        return value
    found: dict[str, Any] = {}
    for item in value:
        name, module = _module(item, example)
        if name in found:
            raise ValueError(f"{name} is there twice; give each {each} once")
        found[name] = module
    return found


def _module(item: object, example: str) -> tuple[str, dict[str, Any]]:
    """name=path, or vLLM's object with name, path and base_model_name, which a flag has as JSON."""
    if isinstance(item, str) and item.lstrip().startswith("{"):
        try:
            item = json.loads(item)
        except json.JSONDecodeError as error:
            raise ValueError(f"{item!r} is not JSON: {error}") from error
    if isinstance(item, dict):
        rest = dict(item)
        name = rest.pop("name", None)
        if not (isinstance(name, str) and name and rest.get("path")):
            raise ValueError(
                f'{item!r} lacks a name or a path; write such as {{"name": "sql", "path": "adapters/sql"}}'
            )
        return name, rest
    name, equals, path = item.partition("=") if isinstance(item, str) else ("", "", "")
    if not (name and equals and path):
        raise ValueError(f"{item!r} is not name=path; write such as {example}")
    return name, {"path": path}


def _absolute(modules: dict[str, LoraModule]) -> dict[str, LoraModule]:
    """Workers start in a folder of their own. Raises ValueError."""
    for name, module in modules.items():
        if not (name and module.path):
            missing = "path" if name else "name"
            raise ValueError(f"{name!r}: {module.path!r} has no {missing}; give each adapter both")
    return {n: m.model_copy(update={"path": str(_expanded(m.path).absolute())}) for n, m in modules.items()}


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user here; write the path in full") from error


def _names(value: object) -> object:
    """ "a,b" -> ("a", "b"), and a list of names; none is no name. Raises ValueError."""
    names = value.split(",") if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{value!r} is neither a name nor a list of names")
    names = [name.strip() for name in names]
    if names == ["none"]:
        return ()
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise ValueError(f"{twice} is there twice; leave one out")
    return tuple(names)


def _folders(value: object) -> object:
    """name=path items, as flags have them, as the mapping that they stand for; paths absolute. Raises ValueError."""
    modules = _modules(value, "drafter", "draft_model=drafts/small")
    if not isinstance(modules, dict) or not all(isinstance(m, dict) and m.keys() == {"path"} for m in modules.values()):
        raise ValueError(f"{value!r} is not names with a path each; write such as small=drafts/small")
    return {name: str(_expanded(str(module["path"])).absolute()) for name, module in modules.items()}


def _labels(value: object) -> object:
    """name=value items, as flags have them, as the mapping that they stand for. Raises ValueError."""
    if not isinstance(value, (list, tuple)):
        return value
    parts = [str(item).partition("=") for item in value]
    if not all(name and equals and label for name, equals, label in parts):
        raise ValueError(f"{', '.join(map(str, value))} is not name=value; write such as pool=fast")
    return {name: label for name, _, label in parts}


def _sizes(value: object) -> object:
    """ "256,512" -> (256, 512), and a list of counts, ascending. Raises ValueError."""
    parts = value.split(",") if isinstance(value, str) else value
    parts = [parts] if isinstance(parts, int) else parts
    if not isinstance(parts, (list, tuple)) or not parts:
        raise ValueError(f"{value!r} is not a list of counts; write such as 256,512")
    sizes = {parse_count(part) if isinstance(part, str) else part for part in parts}
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise ValueError(f"{value!r} is not a list of counts above 0; write such as 256,512")
    return tuple(sorted(sizes))


def _worker_shapes(value: object) -> object:
    """ "1x1,2x1" -> ("1x1", "2x1"), and a list of them. Raises ValueError."""
    text = ",".join(value) if isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value) else value
    if not isinstance(text, str):
        raise ValueError(f"{value!r} is not a list of TP and PP; write such as 1x1,2x1")
    try:
        return tuple(map(str, parse_shapes(text))) if text else ()
    except ConfigError as error:
        raise ValueError(error.message) from error


def _listed_paths(value: object) -> object:
    """ "a.json,b.json", and a list of paths, absolute. Raises ValueError."""
    parts = value.split(",") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(part, (str, Path)) and str(part) for part in parts):
        raise ValueError(f"{value!r} is not a list of files; write such as tp1.json,tp2.json")
    return tuple(_expanded(str(part)).absolute() for part in parts)


def _absolute_path(path: Path) -> Path:
    return _expanded(str(path)).absolute()


AbsolutePath = Annotated[Path, AfterValidator(_absolute_path)]
"""Workers and gateways start in folders of their own."""
NodeLabels = Annotated[dict[str, str], BeforeValidator(_labels)]
AbsolutePaths = Annotated[tuple[Path, ...], BeforeValidator(_listed_paths)]
WorkerShapes = Annotated[tuple[str, ...], BeforeValidator(_worker_shapes)]
StepSizes = Annotated[tuple[int, ...], BeforeValidator(_sizes)]
DrafterNames = Annotated[tuple[str, ...], BeforeValidator(_names)]
DrafterWeights = Annotated[dict[str, str], BeforeValidator(_folders)]
LoraModules = Annotated[dict[str, LoraModule], BeforeValidator(_modules), AfterValidator(_absolute)]
