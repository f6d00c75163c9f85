"""Targets as they are written on a command line: `ttft=200,tpot=50`, in milliseconds; with `e2e=10000` for all of a
request, and with `ttft=200@p95` for the share of requests that are to meet one by itself."""

from __future__ import annotations

import math

from core.errors import ConfigError
from placement.outcome import METRICS, Targets

_EXAMPLE = "write --slo ttft=200,tpot=50, in milliseconds, and if you like e2e=10000, and @p95 behind a target"


def parse_slo(text: str) -> Targets:
    """Raises ConfigError unless there is one target for ttft, one for tpot and at most one for e2e, all above 0, with
    percentiles above 0 and below 100."""
    found: dict[str, float] = {}
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, target = part.strip().partition("=")
        value, at, percentile = target.partition("@")
        if name not in METRICS or name in found:
            raise _wrong(f"{part.strip()!r} is not one target for ttft, one for tpot, or one for e2e")
        found[name] = _milliseconds(name, value)
        if at:
            shares[name] = _share(name, percentile)
    if missing := [name for name in ("ttft", "tpot") if name not in found]:
        raise _wrong(f"{text!r} has no {missing[0]}")
    own = tuple((name, shares[name]) for name in METRICS if name in shares)
    return Targets(found["ttft"], found["tpot"], found.get("e2e", math.inf), own)


def of_all_together(targets: Targets, flag: str = "--slo") -> Targets:
    """For replanning, which goes by the requests that meet all targets. Raises ConfigError for percentiles."""
    for name, share in targets.shares:
        raise ConfigError(
            f"{flag}: {name} has @p{100 * share:g}: replanning has one share, of requests that meet all targets; leave "
            "percentiles out",
            param="slo",
        )
    return targets


def shown(value: float) -> str:
    """To three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _milliseconds(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError as error:
        raise _wrong(f"{name} is {value!r}") from error
    if not 0 < found < math.inf:
        raise _wrong(f"{name} is {value}, not above 0")
    return found


def _share(name: str, text: str) -> float:
    """ "p95" -> 0.95."""
    try:
        found = float(text.removeprefix("p")) if text.startswith("p") else math.nan
    except ValueError:
        found = math.nan
    if not 0 < found < 100:
        raise _wrong(f"{name} has the percentile {text!r}: write {name}=…@p95, above p0 and below p100")
    return round(found / 100, 12)


def _wrong(what: str) -> ConfigError:
    return ConfigError(f"--slo: {what}: {_EXAMPLE}", param="slo")
