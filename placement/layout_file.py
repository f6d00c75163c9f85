"""A layout in YAML, for `slipstream simulate`; docs/simulate.md has an example.

Every pair of a `from` and a `to` group shares the link. A group without links moves its KV in no time. Unknown keys are
refused, and everything that Layout refuses.
"""

from __future__ import annotations

import math
from pathlib import Path

import msgspec
from msgspec.structs import asdict

from core.errors import ConfigError
from core.wire import STATUS_PERIOD_S
from placement.bounded import Few, Many
from placement.latency import Coefficients, Contention, Speculation, StepLatency
from placement.layout import Group, Layout, Link, Outage, Role


class _Strict(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    pass


class _Latency(_Strict):
    prompt: Coefficients
    decode: Coefficients
    large_decode: Coefficients
    large_rows: Many
    shared_ms: float = 0.0
    shared_rows: float = math.inf
    large_prompt: Coefficients | None = None
    large_tokens: Many = 1


class _Speculation(_Strict):
    acceptance_length: float
    rows: Many
    draft_ms: float = 0.0
    draft_sequence_ms: float = 0.0


class _Contention(_Strict):
    prompt: tuple[float, float] = (1.0, 1.0)
    decode: tuple[float, float] = (1.0, 1.0)


class _Group(_Strict):
    name: str
    role: str
    latency: _Latency
    kv_tokens: Many
    count: Few = 1
    chunk_tokens: Many = 2048
    max_sequences: Many = 256
    stages: Few = 1
    hop_ms: float = 0.0
    speculation: _Speculation | None = None
    island: Many = 0
    host: Many = 0
    contention: _Contention = msgspec.field(default_factory=_Contention)
    cores: float = 0.0


class _Link(_Strict, rename={"giver": "from", "taker": "to"}):
    giver: str
    taker: str
    ms_per_token: float
    latency_ms: float = 0.0


class _Outage(_Strict):
    group: str
    at_ms: float
    for_ms: float


class _File(_Strict):
    groups: list[_Group]
    links: list[_Link] = []
    outages: list[_Outage] = []
    handoff_min_tokens: Many = 0
    overhead_ms: float = 0.0
    report_ms: float = STATUS_PERIOD_S * 1000.0


def read_layout(path: Path) -> Layout:
    """Raises ConfigError that names the file, and the field at fault."""
    try:
        found = msgspec.yaml.decode(path.read_bytes(), type=_File)
        return _layout(found)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="layout") from error
    except (msgspec.MsgspecError, ConfigError) as error:
        raise ConfigError(f"{path}: {error}", param="layout") from error


def _layout(found: _File) -> Layout:
    groups: list[Group] = []
    places: dict[str, range] = {}
    for kind in found.groups:
        if kind.name in places:
            raise ConfigError(f"two groups are named {kind.name}; use count for several alike")
        places[kind.name] = range(len(groups), len(groups) + kind.count)
        groups += [_group(kind)] * kind.count
    pairs = [(_place(places, link.giver), _place(places, link.taker)) for link in found.links]
    paths = {(giver, taker): n for n, (givers, takers) in enumerate(pairs) for giver in givers for taker in takers}
    outages = [Outage(n, gone.at_ms, gone.for_ms) for gone in found.outages for n in _place(places, gone.group)]
    links = tuple(Link(link.ms_per_token, link.latency_ms) for link in found.links)
    times = {"overhead_ms": found.overhead_ms, "report_ms": found.report_ms}
    return Layout(tuple(groups), links, paths, found.handoff_min_tokens, tuple(outages), **times)


def _group(kind: _Group) -> Group:
    roles = {role.name.lower(): role for role in Role}
    if kind.role not in roles:
        raise ConfigError(f"group {kind.name}: role is {kind.role!r}, not one of {', '.join(roles)}")
    if kind.count < 1:
        raise ConfigError(f"group {kind.name}: count is {kind.count}, not 1 or more")
    return Group(
        role=roles[kind.role],
        latency=StepLatency(**asdict(kind.latency)),
        kv_tokens=kind.kv_tokens,
        chunk_tokens=kind.chunk_tokens,
        max_sequences=kind.max_sequences,
        stages=kind.stages,
        hop_ms=kind.hop_ms,
        speculation=Speculation(**asdict(kind.speculation)) if kind.speculation else None,
        island=kind.island,
        host=kind.host,
        contention=Contention(kind.contention.prompt, kind.contention.decode),
        cores=kind.cores,
    )


def _place(places: dict[str, range], name: str) -> range:
    if name not in places:
        raise ConfigError(f"there is no group {name!r}; there are {', '.join(places)}")
    return places[name]
