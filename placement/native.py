"""The simulators in C++ (csrc/): the same results as in Python, and much sooner.

Compiled once for a machine, in seconds; where that can't be done the definitions in Python run, and the log says why.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from core import compiler
from placement import pipeline, serving
from placement.layout import Lane, Layout
from placement.outcome import METRICS, Outcome, Targets
from placement.pipeline import Pipelines
from placement.serving import Served
from placement.workload import Lengths, Workload

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O2", "-std=c++20", "-shared", "-fPIC", "-ffp-contract=off")  # no fused sums: Python has none

_doubles = np.ctypeslib.ndpointer(np.float64, ndim=1, flags="C_CONTIGUOUS")
_ints = np.ctypeslib.ndpointer(np.int32, ndim=1, flags="C_CONTIGUOUS")


def simulate(pipelines: Pipelines, workload: Workload, rate: float) -> Outcome:
    """As `pipeline.simulate_plainly`."""
    library = load()
    if library is None:
        return pipeline.simulate_plainly(pipelines, workload, rate)
    pipelines.check(workload)
    arrivals = workload.arrivals_ms(rate)
    first, last = np.zeros(len(workload)), np.zeros(len(workload))
    prompts, outputs = _contiguous(workload.prompt_tokens), _contiguous(workload.output_tokens)
    library.simulate_pipelines(_packed(pipelines), len(workload), arrivals, prompts, outputs, first, last)
    return pipeline.to_outcome(workload, arrivals, first, last)


def serve(layout: Layout, workload: Workload, rate: float) -> Served:
    """As `serving.serve_plainly`."""
    served = serve_unless_missed(layout, workload, rate, NO_LIMITS)
    assert served is not None, "nothing limits the run"
    return served


class Window(NamedTuple):
    """No more than `allowed` of the requests from the place `start` on may miss a target of these metrics."""

    metrics: tuple[str, ...]
    start: int
    allowed: int


@dataclass(frozen=True)
class Limits:
    targets: Targets
    windows: tuple[Window, ...]

    def kept(self, outcome: Outcome) -> bool:
        missed = {one.metrics: ~outcome.attained(self.targets.only(one.metrics)) for one in self.windows}
        return all(int(missed[one.metrics][one.start :].sum()) <= one.allowed for one in self.windows)


NO_LIMITS = Limits(Targets(math.inf, math.inf), ())


def serve_unless_missed(layout: Layout, workload: Workload, rate: float, limits: Limits) -> Served | None:
    """As `serving.serve_plainly`, or None, much sooner, if the limits are not kept."""
    library = load()
    if library is None:
        served = serving.serve_plainly(layout, workload, rate)
        return served if limits.kept(served.outcome) else None
    layout.check(workload)
    packed = _packed_layout(layout)
    arrivals = workload.arrivals_ms(rate)
    first, last, busy = np.zeros(len(workload)), np.zeros(len(workload)), np.zeros(len(layout.lanes))
    preemptions = library.simulate_serving(
        *(packed.lanes, len(layout.lanes)),
        *(packed.links, len(layout.links), packed.paths, layout.handoff_min_tokens, layout.report_ms),
        *_limits(limits, layout.overhead_ms),
        *packed.outages,
        *(len(workload), arrivals, _contiguous(workload.prompt_tokens), _contiguous(workload.output_tokens)),
        *(_contiguous(workload.cached_tokens), first, last, busy),
    )
    if preemptions < 0:
        return None
    outcome = serving.to_outcome(workload, arrivals - layout.overhead_ms, first, last)
    return Served(outcome, preemptions, busy, float(last.max()))


@cache
def load() -> ctypes.CDLL | None:
    """The library, compiled first if this machine has not done so yet; None, and the reason in the log, if that can't
    be done. Asked once per process."""
    library = compiler.load("simulators", _SOURCES, _FLAGS)
    if library is not None:
        _declare(library)
    return library


class _Pipelines(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double * 3) for name in ("prefill", "decode", "large_decode")),
        *((name, ctypes.c_int64) for name in ("large_batch", "prefill_stages", "prefill_cap")),
        *((name, ctypes.c_int64) for name in ("decode_stages", "colocated")),
    )


class _LaneSpec(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_double * 3) for name in ("prompt", "large_prompt", "decode", "large_decode")),
        *((name, ctypes.c_double) for name in ("large_tokens", "large_rows", "shared_ms", "shared_rows")),
        *((name, ctypes.c_double) for name in ("every_step_ms", "draft_ms")),
        *((name, ctypes.c_double) for name in ("draft_sequence_ms", "tokens_per_step", "rows", "kv_tokens")),
        *((name, ctypes.c_double * 2) for name in ("prompt_contention", "decode_contention")),
        *((name, ctypes.c_double) for name in ("cores", "report_phase")),
        *((name, ctypes.c_int64) for name in ("role", "chunk_tokens", "max_sequences", "island", "host")),
    )


class _Link(ctypes.Structure):
    _fields_ = (("ms_per_token", ctypes.c_double), ("latency_ms", ctypes.c_double))


class _Targets(ctypes.Structure):
    _fields_ = (("ttft_ms", ctypes.c_double), ("tpot_ms", ctypes.c_double), ("e2e_ms", ctypes.c_double))


class _Window(ctypes.Structure):
    _fields_ = (("metrics", ctypes.c_int64), ("start", ctypes.c_int64), ("allowed", ctypes.c_int64))


class _Outage(ctypes.Structure):
    _fields_ = (("at_ms", ctypes.c_double), ("until_ms", ctypes.c_double), ("lane", ctypes.c_int64))


def _declare(library: ctypes.CDLL) -> None:
    library.simulate_pipelines.restype = None
    library.simulate_pipelines.argtypes = (
        *(ctypes.POINTER(_Pipelines), ctypes.c_int64, _doubles),
        *(_ints, _ints, _doubles, _doubles),
    )
    library.simulate_serving.restype = ctypes.c_int64
    library.simulate_serving.argtypes = (
        *(ctypes.POINTER(_LaneSpec), ctypes.c_int64, ctypes.POINTER(_Link), ctypes.c_int64, _ints),
        *(ctypes.c_int64, ctypes.c_double),
        *(
            ctypes.POINTER(_Targets),
            ctypes.POINTER(_Window),
            ctypes.c_int64,
            ctypes.POINTER(_Outage),
            ctypes.c_int64,
            ctypes.c_int64,
            _doubles,
            _ints,
            _ints,
            _ints,
        ),
        *(_doubles, _doubles, _doubles),
    )


def _packed(pipelines: Pipelines) -> _Pipelines:
    prefill, decode = pipelines.prefill, pipelines.decode
    return _Pipelines(
        *(_triple(prefill.prefill), _triple(decode.decode), _triple(decode.large_decode), decode.large_batch),
        *(pipelines.prefill_stages, pipelines.prefill_cap, pipelines.decode_stages, pipelines.colocated),
    )


class _PackedLayout(NamedTuple):
    """Read only."""

    of: Layout
    lanes: ctypes.Array[_LaneSpec]
    links: ctypes.Array[_Link]
    paths: Lengths
    outages: tuple[ctypes.Array[_Outage], int]


_last_packed: _PackedLayout | None = None
"""A layout is mostly simulated several times in a row."""


def _packed_layout(layout: Layout) -> _PackedLayout:
    global _last_packed
    packed = _last_packed
    if packed is None or packed.of is not layout:
        lanes = layout.lanes
        links = (_Link * len(layout.links))(*(_Link(link.ms_per_token, link.latency_ms) for link in layout.links))
        packed = _PackedLayout(layout, _lane_specs(layout), links, _paths(layout, lanes), _outages(layout, lanes))
        _last_packed = packed
    return packed


def _lane_specs(layout: Layout) -> ctypes.Array[_LaneSpec]:
    """A lane of a group like the one before it is a copy of that, but for its place and when it reports."""
    specs, before = (_LaneSpec * len(layout.lanes))(), None
    for number, lane in enumerate(layout.lanes):
        alike, before = layout.groups[lane.group] is before, layout.groups[lane.group]
        specs[number] = specs[number - 1] if alike else _lane_spec(lane)
        specs[number].island, specs[number].host = lane.island, lane.host
        specs[number].report_phase = lane.report_phase
    return specs


def _lane_spec(lane: Lane) -> _LaneSpec:
    latency, speculation = lane.latency, lane.speculation
    return _LaneSpec(
        *(_triple(latency.prompt), _triple(latency.large_prompt or latency.prompt)),
        *(_triple(latency.decode), _triple(latency.large_decode), latency.large_tokens, latency.large_rows),
        *(latency.shared_ms, latency.shared_rows, lane.every_step_ms, speculation.draft_ms),
        *(speculation.draft_sequence_ms, speculation.acceptance_length, speculation.rows, lane.kv_tokens),
        *((ctypes.c_double * 2)(*pair) for pair in (lane.contention.prompt, lane.contention.decode)),
        *(lane.cores, lane.report_phase),
        *(lane.role, lane.chunk_tokens, lane.max_sequences, lane.island, lane.host),
    )


def _paths(layout: Layout, lanes: Sequence[Lane]) -> Lengths:
    """The link from each lane to each, or -1. # [lanes * lanes]"""
    links = np.full((len(layout.groups),) * 2, -1, np.int32)
    if layout.paths:
        links[tuple(np.array([*layout.paths]).T)] = [*layout.paths.values()]
    groups = [lane.group for lane in lanes]
    return links[np.ix_(groups, groups)].ravel()


def _limits(limits: Limits, overhead_ms: float) -> tuple[_Targets, ctypes.Array[_Window], int]:
    """A window's metrics are bits, in the order of METRICS."""
    targets = limits.targets
    found = [
        _Window(sum(1 << METRICS.index(metric) for metric in metrics), start, allowed)
        for metrics, start, allowed in limits.windows
    ]
    shown = _Targets(targets.ttft_ms - overhead_ms, targets.tpot_ms, targets.e2e_ms - overhead_ms)
    return shown, (_Window * len(found))(*found), len(found)


def _outages(layout: Layout, lanes: Sequence[Lane]) -> tuple[ctypes.Array[_Outage], int]:
    found = [
        _Outage(outage.at_ms, outage.at_ms + outage.for_ms, number)
        for outage in layout.outages
        for number, lane in enumerate(lanes)
        if lane.group == outage.group
    ]
    return (_Outage * len(found))(*found), len(found)


def _contiguous(lengths: Lengths) -> Lengths:
    return np.ascontiguousarray(lengths, np.int32)


def _triple(coefficients: tuple[float, float, float]) -> ctypes.Array[ctypes.c_double]:
    return (ctypes.c_double * 3)(*coefficients)
