"""Targets as they are written on a command line: `ttft=200,tpot=50`, in milliseconds."""

from __future__ import annotations

from core.errors import ConfigError
from placement.outcome import Targets

_EXAMPLE = "write --slo ttft=200,tpot=50, in milliseconds"


def parse_slo(text: str) -> Targets:
    """Raises ConfigError unless both targets are there, once, and above 0."""
    found: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        if name not in ("ttft", "tpot") or name in found:
            raise ConfigError(
                f"--slo: {part.strip()!r} is not one target for ttft and one for tpot: {_EXAMPLE}", param="slo"
            )
        found[name] = _milliseconds(name, value)
    if len(found) < 2:
        raise ConfigError(f"--slo: {text!r} has no {'tpot' if 'ttft' in found else 'ttft'}: {_EXAMPLE}", param="slo")
    return Targets(found["ttft"], found["tpot"])


def shown_ms(value: float) -> str:
    """To three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError as error:
        raise ConfigError(f"--slo: {name} is {value!r}: {_EXAMPLE}", param="slo") from error
    if not 0 < found < float("inf"):
        raise ConfigError(f"--slo: {name} is {value}, not above 0: {_EXAMPLE}", param="slo")
    return found
