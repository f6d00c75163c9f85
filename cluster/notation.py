"""How sizes, counts and named paths may be written, in files and flags. `auto` leaves a setting to be worked out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator

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
    parse_bytes(text)
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


def _named_paths(value: object) -> object:
    """A list of name=path, as flags have it, as the mapping that it stands for. Raises ValueError."""
    if not isinstance(value, (list, tuple)):
        return value
    found: dict[str, str] = {}
    for item in value:
        name, equals, path = item.partition("=") if isinstance(item, str) else ("", "", "")
        if not (name and equals and path):
            raise ValueError(f"{item!r} is not name=path; write such as sql=adapters/sql")
        if name in found:
            raise ValueError(f"{name} is there twice; give each adapter a name of its own")
        found[name] = path
    return found


def _absolute(paths: dict[str, str]) -> dict[str, str]:
    """Workers start in a folder of their own. Raises ValueError."""
    for name, path in paths.items():
        if not (name and path):
            raise ValueError(f"{name!r}: {path!r} has no {'path' if name else 'name'}; give each adapter both")
    return {name: str(_expanded(path).absolute()) for name, path in paths.items()}


def _expanded(path: str) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user here; write the path in full") from error


NamedPaths = Annotated[dict[str, str], BeforeValidator(_named_paths), AfterValidator(_absolute)]
