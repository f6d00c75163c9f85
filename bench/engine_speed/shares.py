"""Where a decode step goes: by torch.profiler, in a run of its own.

Unlike hooks around our classes it sees the same operators whether a layer is eager, compiled or an extension, and
kernels on a GPU too. On a CPU it distorts little, about a third of a microsecond for each operator, and what it costs
is measured and taken off: of a part for the events inside it, of the step for all. A part is the time between the start
and the end of its operators, attention's from query, key and value to their mix. Scheduling and batching are timed by
the clock. The rest is norms, rotary embedding, activations, embeddings, what attention prepares once per step, and the
Python and dispatch around operators. So the parts add up to the step.

On a GPU a part is the time of its kernels, which recording does not prolong, by the operator that launched them or, in
a captured graph, by name. They are put beside the step as it is without a profiler; the rest includes the time in which
the GPU waits.

An extension takes part by recording ranges that _PARTS knows by name (RECORD_FUNCTION in C++).
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import engine.runner
from engine.attention import PagedAttention

_T = TypeVar("_T")

_REPORTED = ("linears", "attention", "sampling")
_PARTS = {  # looked through in this order
    "sampling": re.compile(r"slipstream::.*sampl"),
    "attention": re.compile(r"attention|attn|fmha|flash|paged", re.IGNORECASE),
    "linears": re.compile(r"linear|matmul|gemm|gemv|nvjet|cutlass|(^|[:_])(add|badd|b)?mm($|_)", re.IGNORECASE),
}


_CALIBRATION_STEPS = 1000


@dataclass(frozen=True, slots=True)
class Part:
    seconds: float
    events: int
    """Recorded inside, each of which took the profiler some time."""


def shares(run: Callable[[], tuple[float, float]], device: torch.device, plain_s: float) -> dict[str, float]:
    """Fractions that add up to 1. `run` runs the steps, and returns the seconds that they took and, of these, those in
    scheduling and batching. `plain_s`: what the same steps take without a profiler; asked for on a GPU only."""
    (steps_s, scheduling_s), events = _profiled(run, device)
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    if device.type == "cuda":
        per_event, whole, found = 0.0, plain_s, _device_parts(events)
    else:
        per_event = _profiler_s_per_event()
        whole, found = steps_s - per_event * len(on_host), _host_parts(on_host)
    parts = {name: max(0.0, found[name].seconds - found[name].events * per_event) for name in _REPORTED}
    parts["scheduling"] = scheduling_s
    whole = max(whole, sum(parts.values()))  # both are measured, and rounding or noise must not make the rest negative
    return {name: seconds / whole for name, seconds in parts.items()} | {"rest": 1 - sum(parts.values()) / whole}


def _profiled(run: Callable[[], _T], device: torch.device) -> tuple[_T, list[FunctionEvent]]:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with _named_ranges(), profile(activities=activities, acc_events=True) as profiler:
        result = run()
    return result, [event for event in profiler.events() or () if not event.is_async]


def _profiler_s_per_event() -> float:
    """How much longer an operator takes when it is recorded."""
    value = torch.zeros(1)

    def run() -> float:
        started = time.perf_counter()
        for _ in range(_CALIBRATION_STEPS):
            value.neg_()
        return (time.perf_counter() - started) / _CALIBRATION_STEPS

    def fastest() -> float:
        return min(run() for _ in range(5))

    plain = fastest()
    recorded, _ = _profiled(fastest, value.device)
    return max(0.0, recorded - plain)


# --- what the profiler saw -----------------------------------------------------------------------------------------


def part_of(name: str) -> str | None:
    """The part that an operator, a range or a kernel belongs to, by its name."""
    return next((part for part, pattern in _PARTS.items() if pattern.search(name)), None)


def _outermost(events: Iterable[FunctionEvent]) -> Iterator[tuple[str, FunctionEvent]]:
    """The events that belong to a part and are not inside another such event."""
    left = [event for event in events if event.cpu_parent is None]
    while left:
        event = left.pop()
        part = part_of(event.name)
        if part is None:
            left.extend(event.cpu_children)
        else:
            yield part, event


def _host_parts(events: list[FunctionEvent]) -> dict[str, Part]:
    seconds: dict[str, float] = defaultdict(float)
    inside: dict[str, int] = defaultdict(int)
    for part, event in _outermost(events):
        seconds[part] += _seconds(event)
        inside[part] += _num_inside(event)
    return {part: Part(seconds[part], inside[part]) for part in _REPORTED}


def _seconds(event: FunctionEvent) -> float:
    return float(event.time_range.end - event.time_range.start) / 1e6


def _num_inside(event: FunctionEvent) -> int:
    return sum(1 + _num_inside(child) for child in event.cpu_children)


def _device_parts(events: list[FunctionEvent]) -> dict[str, Part]:
    """What its operators launched, or what kernels bear its name, whichever is more: some have names that say nothing,
    and the operators don't know what a captured graph launches."""
    launched: dict[str, float] = defaultdict(float)
    named: dict[str, float] = defaultdict(float)
    for part, event in _outermost(event for event in events if event.device_type == DeviceType.CPU):
        launched[part] += event.device_time_total / 1e6
    for event in events:
        kernel = event.device_type != DeviceType.CPU and not event.is_user_annotation
        name = part_of(event.name) if kernel else None
        if name is not None:
            named[name] += _seconds(event)
    return {part: Part(max(launched[part], named[part]), 0) for part in _REPORTED}


@contextmanager
def _named_ranges() -> Iterator[None]:
    """While open, what is made of operators with general names can be told from other uses of them."""
    attention = _range_around(PagedAttention, "__call__", "slipstream::attention")
    with attention, _range_around(engine.runner, "sample", "slipstream::sampling"):
        yield


@contextmanager
def _range_around(owner: type | ModuleType, name: str, label: str) -> Iterator[None]:
    function = getattr(owner, name)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    setattr(owner, name, recorded)
    try:
        yield
    finally:
        setattr(owner, name, function)
