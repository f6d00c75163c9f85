"""Finding a part by its name: file NAME.py of the package whose registry has the name."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from types import ModuleType

from core.errors import ConfigError


def check_name(kind: str, name: str, known: Iterable[str]) -> None:
    """Raises ConfigError, with the nearest known name, unless there is a `kind` of that name."""
    known = sorted(known)
    if name in known:
        return
    near = get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known) or 'none'}"
    raise ConfigError(f"no {kind} is called {name!r}: {hint}", param=kind)


def module_of(kind: str, name: str) -> ModuleType:
    """`kind` is drafter, rule or controller."""
    return import_module(f"speculation.{kind}s.{name}")
