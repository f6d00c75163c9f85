"""Small layouts of our own system, and strategies that draw them."""

from __future__ import annotations

import math

from hypothesis import strategies as st

from placement.latency import Coefficients, Contention, Speculation, StepLatency
from placement.layout import Group, Layout, Link, Outage, Role

STEP = StepLatency(
    Coefficients(14.7, 0.0686, 4e-6), Coefficients(13.3, 0.00034, 0.03), Coefficients(10.6, 0.00031, 0.06), 6, 13.0
)
PLAIN = StepLatency(Coefficients(10.0, 0.1, 0.0), Coefficients(5.0, 0.0, 1.0), Coefficients(50.0, 0.0, 1.0), 100)
"""Steps to reckon with by hand: 10 ms and 0.1 per token of prompts, 5 ms and 1 per sequence that decodes."""


def group(role: Role, **changes: object) -> Group:
    return Group(**({"role": role, "latency": PLAIN, "kv_tokens": 10_000} | changes))  # type: ignore[arg-type]


def apart(prefill: int = 1, decode: int = 1, link: Link | None = None, **changes: object) -> Layout:
    """Prefill groups and decode groups, all pairs over one link if there is one."""
    groups = (group(Role.PREFILL),) * prefill + (group(Role.DECODE),) * decode
    pairs = [(p, prefill + d) for p in range(prefill) for d in range(decode)] if link else []
    options = {"groups": groups, "links": (link,) if link else (), "paths": dict.fromkeys(pairs, 0)} | changes
    return Layout(**options)  # type: ignore[arg-type]


def _irregular(low: float, high: float) -> st.SearchStrategy[float]:
    """No two sums of these are equal but by design, so that rounding decides nothing."""
    return st.integers(1, 10**6).map(lambda n: low + (high - low) * ((n * 0.6180339887498949) % 1.0))


_coefficients = st.builds(Coefficients, _irregular(1.0, 30.0), _irregular(1e-4, 0.1), _irregular(1e-6, 1e-2))
_speculation = st.none() | st.builds(
    Speculation, _irregular(1.0, 4.0), st.integers(4, 6), _irregular(0.0, 3.0), _irregular(0.0, 0.2)
)
_contention = st.just(Contention()) | st.builds(
    Contention, *[st.tuples(_irregular(1.0, 2.0), _irregular(1.0, 2.0))] * 2
)


@st.composite
def _groups(draw: st.DrawFn, role: Role) -> Group:
    prompt, decode, large_decode = (draw(_coefficients) for _ in range(3))
    latency = StepLatency(
        prompt,
        decode,
        large_decode,
        large_rows=draw(st.integers(1, 8)),
        shared_ms=draw(_irregular(0.1, 20.0)),
        shared_rows=draw(st.just(math.inf) | _irregular(1.0, 20.0)),
        large_prompt=draw(st.none() | _coefficients),
        large_tokens=draw(st.integers(1, 300)),
    )
    stages = draw(st.integers(1, 2))
    return Group(
        role,
        latency,
        kv_tokens=draw(st.integers(1000, 4000)) * stages,
        chunk_tokens=draw(st.integers(80, 600)),
        max_sequences=draw(st.integers(1, 12)),
        stages=stages,
        hop_ms=0.25,
        speculation=draw(_speculation),
        island=draw(st.sampled_from([0, 0, 0, 1])),
        host=draw(st.integers(0, 1)),
        contention=draw(_contention),
        cores=draw(st.just(0.0) | _irregular(0.2, 1.0)),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    roles = draw(
        st.sampled_from(
            [
                *([Role.BOTH], [Role.BOTH] * 2, [Role.PREFILL, Role.DECODE], [Role.PREFILL, Role.PREFILL, Role.DECODE]),
                *([Role.PREFILL, Role.DECODE, Role.DECODE], [Role.PREFILL, Role.DECODE, Role.BOTH]),
            ]
        )
    )
    links = tuple(Link(draw(_irregular(0.001, 0.3)), draw(_irregular(0.0, 5.0))) for _ in range(2))
    pairs = [(p, d) for p in range(len(roles)) for d in range(len(roles)) if roles[p] is Role.PREFILL is not roles[d]]
    outage = st.builds(Outage, st.integers(0, len(roles) - 1), _irregular(0.0, 3000.0), _irregular(0.0, 2000.0))
    return Layout(
        tuple(draw(_groups(role)) for role in roles),
        links,
        {pair: draw(st.integers(0, 1)) for pair in pairs},
        handoff_min_tokens=draw(st.sampled_from([0, 0, 100])),
        outages=tuple(draw(st.lists(outage, max_size=2))),
        report_ms=draw(st.sampled_from([0.0, 250.0, 250.0]) | _irregular(10.0, 1000.0)),
    )
