"""What is simulated of our own system: groups of devices with their roles, links between them, and what fails."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum
from functools import cached_property
from typing import NamedTuple

from core.errors import ConfigError
from core.wire import STATUS_PERIOD_S
from placement.latency import Contention, Speculation, StepLatency
from placement.workload import Workload


class Role(IntEnum):
    PREFILL = 0
    DECODE = 1
    BOTH = 2


ALONE = Contention()


@dataclass(frozen=True)
class Group:
    """One model on one group of devices.

    A pipeline of `stages` has as many steps in flight, of disjoint sequences, each as long as a step through the whole
    model and `hop_ms` for every stage after the first. It is simulated as that many lanes with equal parts of the
    memory and the seats. KV is handed over within an island only. Groups of one `host` compute on one machine, and slow
    each other down by `contention`; `cores` is the share of its cores that a group computes on, which matters where
    those that compute at the same time want more than there are.
    """

    role: Role
    latency: StepLatency
    kv_tokens: int
    chunk_tokens: int = 2048
    max_sequences: int = 256
    stages: int = 1
    hop_ms: float = 0.0
    speculation: Speculation | None = None
    island: int = 0
    host: int = 0
    contention: Contention = ALONE
    cores: float = 0.0

    def in_role(self, role: Role, prefill: StepLatency | None, decode: Contention | None) -> Group:
        """Where it prefills only its steps are those of `prefill`, and where it decodes only others slow it down as by
        `decode`, if these are another than its own."""
        return replace(
            self,
            role=role,
            latency=(prefill if role is Role.PREFILL else None) or self.latency,
            contention=(decode if role is Role.DECODE else None) or self.contention,
        )


class Lane(NamedTuple):
    """Where one step runs at a time. `every_step_ms` is added to each. Its reports come `report_phase` of the time
    between two of them earlier than if it had begun with one."""

    group: int
    role: Role
    latency: StepLatency
    kv_tokens: int
    chunk_tokens: int
    max_sequences: int
    every_step_ms: float
    speculation: Speculation
    island: int
    host: int
    contention: Contention
    cores: float
    report_phase: float


@dataclass(frozen=True)
class Link:
    """What KV moves over, one transfer after the other. All that use a link share it."""

    ms_per_token: float
    latency_ms: float = 0.0


@dataclass(frozen=True)
class Outage:
    """A group is gone from `at_ms` on and is back, empty, `for_ms` later."""

    group: int
    at_ms: float
    for_ms: float


@dataclass(frozen=True)
class Layout:
    """`paths` names the link between a prefill and a decode group, by their places in `groups`; KV between groups
    without one moves in no time. Prompts with fewer than `handoff_min_tokens` to compute are prefilled where they are
    decoded, as by the router of a cluster. `overhead_ms` is what a request takes before and after the groups: gateway,
    routing, the way back. Every `report_ms` a group tells the router what it has to do; 0: the router always knows."""

    groups: tuple[Group, ...]
    links: tuple[Link, ...] = ()
    paths: Mapping[tuple[int, int], int] = field(default_factory=dict)
    handoff_min_tokens: int = 0
    outages: tuple[Outage, ...] = ()
    overhead_ms: float = 0.0
    report_ms: float = STATUS_PERIOD_S * 1000.0

    def __post_init__(self) -> None:
        roles = {group.role for group in self.groups}
        if not roles - {Role.PREFILL}:
            raise ConfigError("the layout has no group that decodes", param="groups")
        for number, group in enumerate(self.groups):
            if number == 0 or group is not self.groups[number - 1]:
                _check_group(number, group)
        for number, link in enumerate(self.links):
            _check_times(f"link {number}: ", link, "ms_per_token", "latency_ms")
        for pair, place in self.paths.items():
            if not 0 <= place < len(self.links):
                raise ConfigError(f"the path {pair} is over link {place}, but there are {len(self.links)} links")
        _check_times("", self, "overhead_ms", "report_ms")
        for number, outage in enumerate(self.outages):
            if not 0 <= outage.group < len(self.groups):
                raise ConfigError(f"outage {number}: there is no group {outage.group}, but {len(self.groups)} groups")
            _check_times(f"outage {number}: ", outage, "at_ms", "for_ms")

    @cached_property
    def lanes(self) -> tuple[Lane, ...]:
        """Groups report by turns, as they would if they had started whenever."""
        apart, found, before = 1 / len(self.groups), list[Lane](), None
        for number, group in enumerate(self.groups):
            alike = found[-1] if group is before else _lane(number, group)
            found += [alike._replace(group=number, report_phase=number * apart)] * group.stages
            before = group
        return tuple(found)

    @property
    def cache_tokens(self) -> int:
        """What its groups that compute prompts can keep of them, if nothing else is in their memory."""
        apart = any(group.role is Role.PREFILL for group in self.groups)
        return sum(group.kv_tokens for group in self.groups if not apart or group.role is not Role.DECODE)

    def check(self, workload: Workload) -> None:
        """Raise ConfigError for a request that some group could never hold. Prefill groups see output tokens only of
        requests that another group lost."""
        longest_prompt = int(workload.prompt_tokens.max())
        longest = int((workload.prompt_tokens.astype(int) + workload.output_tokens).max())
        for lane in self.lanes:
            held = longest_prompt if lane.role is Role.PREFILL and not self.outages else longest
            needed = held + lane.speculation.acceptance_length
            if needed > lane.kv_tokens:
                raise ConfigError(
                    f"group {lane.group} has room for {lane.kv_tokens} tokens of KV in a stage's step, and a request "
                    f"needs {needed:g}: give it more memory, or leave such requests out",
                    param="kv_tokens",
                )


NO_SPECULATION = Speculation(acceptance_length=1.0, rows=1)


def _lane(number: int, group: Group) -> Lane:
    return Lane(
        group=number,
        role=group.role,
        latency=group.latency,
        kv_tokens=group.kv_tokens // group.stages,
        chunk_tokens=group.chunk_tokens,
        max_sequences=max(1, group.max_sequences // group.stages),
        every_step_ms=group.hop_ms * (group.stages - 1),
        speculation=group.speculation or NO_SPECULATION,
        island=group.island,
        host=group.host,
        contention=group.contention,
        cores=group.cores / group.stages,
        report_phase=0.0,
    )


def _check_times(of: str, what: object, *names: str) -> None:
    for name in names:
        value = getattr(what, name)
        if not 0 <= value < math.inf:
            raise ConfigError(f"{of}{name} is {value:g}: times are 0 or more, and finite", param=name)


def _check_group(number: int, group: Group) -> None:
    speculation = group.speculation or NO_SPECULATION
    for name in ("stages", "max_sequences", "chunk_tokens", "kv_tokens"):
        if getattr(group, name) < 1:
            raise ConfigError(f"group {number}: {name} is {getattr(group, name)}, not 1 or more", param=name)
    latency = group.latency
    for name in ("prompt", "large_prompt", "decode", "large_decode"):
        if not all(0 <= coefficient < math.inf for coefficient in getattr(latency, name) or ()):
            raise ConfigError(
                f"group {number}: {name} is {getattr(latency, name)}: fit it with coefficients of 0 or more"
            )
    _check_times(f"group {number}: ", group, "hop_ms")
    _check_times(f"group {number}: ", speculation, "draft_ms", "draft_sequence_ms")
    if not (0 <= latency.shared_ms < math.inf and latency.shared_rows > 0):
        saved = f"shared_ms is {latency.shared_ms} and shared_rows {latency.shared_rows}"
        raise ConfigError(f"group {number}: {saved}: steps save 0 or more, of more rows than none", param="shared_ms")
    if not all(1 <= times < math.inf for times in group.contention.prompt + group.contention.decode):
        raise ConfigError(f"group {number}: {group.contention}: beside others a step takes 1 or more times as long")
    if not 0 <= group.cores <= group.stages:
        raise ConfigError(f"group {number}: cores is {group.cores:g}; a stage computes on all of a host at the most")
    if not 1 <= speculation.acceptance_length <= speculation.rows:
        raise ConfigError(
            f"group {number}: an acceptance length of {speculation.acceptance_length:g} with {speculation.rows} rows; "
            "it is at least 1 and at most the rows",
            param="acceptance_length",
        )
    most = _lane(number, replace(group, speculation=speculation)).max_sequences * speculation.rows
    if group.role is not Role.PREFILL and group.chunk_tokens <= most:
        raise ConfigError(
            f"group {number}: steps of {group.chunk_tokens} tokens leave no room for prompts beside {most} rows that "
            "decode: raise chunk_tokens, or lower max_sequences",
            param="chunk_tokens",
        )
