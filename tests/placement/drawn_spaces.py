"""Small clusters, workloads and targets at random, to search for layouts of them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from placement.candidates import Objective, Option, Space
from placement.goodput import UNLOADED, Goal
from placement.latency import Coefficients, Contention, Speculation, StepLatency
from placement.layout import Group, Layout, Link, Role
from placement.lengths import parse_lengths
from placement.native import serve
from placement.outcome import METRICS, Targets
from placement.workload import Workload
from tests.placement.pipelines import azure_like
from tests.placement.spaces import alike

_SHAPES = (1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 3)
_APART = frozenset({Role.PREFILL, Role.DECODE})


@dataclass(frozen=True)
class Drawn:
    """What is asked of a search."""

    space: Space
    workload: Workload
    goal: Goal
    objective: Objective


def drawn(seed: int, devices: int = 8) -> Drawn:
    """Of 1 to so many devices, in one pool or two, and 1 to 3 options."""
    rng = np.random.default_rng(seed)
    nodes = _nodes(rng, 1 + int((devices - 1) * rng.random() ** 0.5 + 0.5))
    options = _options(rng, nodes)
    workload = _workload(rng)
    ways = [frozenset(Role)] * 6 + [_APART, frozenset({Role.BOTH})]
    chunks = rng.choice([512, 2048, 2**14], int(rng.integers(1, 3)), replace=False)
    inside, across = Link(rng.uniform(0.001, 0.01), 0.1), Link(10 ** rng.uniform(-2, -0.5), 0.5)
    space = Space(
        options,
        nodes,
        alike(inside, across, tuple(nodes)),
        tuple(sorted(int(chunk) for chunk in chunks)),
        handoff_min_tokens=int(rng.choice([0, 0, 200])),
        overhead_ms=float(rng.choice([0.0, 8.0])),
        roles=ways[rng.integers(len(ways))],
    )
    objective: Objective = "per-dollar" if rng.random() < 0.4 else "per-device"
    return Drawn(space, workload, _goal(rng, options, workload), objective)


def _nodes(rng: np.random.Generator, devices: int) -> dict[str, tuple[int, ...]]:
    if devices > 1 and rng.random() < 0.35:
        slow = int(rng.integers(1, devices))
        return {"default": _shared(rng, devices - slow), "slow": _shared(rng, slow)}
    return {"default": _shared(rng, devices)}


def _shared(rng: np.random.Generator, devices: int) -> tuple[int, ...]:
    """Over nodes that have as many each, but for the last."""
    each = int(rng.integers(1, devices + 1)) if rng.random() < 0.5 else devices
    whole, rest = divmod(devices, each)
    return (each,) * whole + ((rest,) if rest else ())


def _options(rng: np.random.Generator, nodes: dict[str, tuple[int, ...]]) -> tuple[Option, ...]:
    """One for each pool at least, none of which needs more than it has. Twice the devices are a little less than twice
    as fast."""
    prompt = Coefficients(rng.uniform(1, 15), 10 ** rng.uniform(-2.3, -0.9), 10 ** rng.uniform(-7, -5))
    decode = Coefficients(rng.uniform(4, 20), 10 ** rng.uniform(-5, -3), 10 ** rng.uniform(-2.5, -0.5))
    large = Coefficients(0.7 * decode.a, decode.b, 1.7 * decode.c)
    room, seats = int(10 ** rng.uniform(4.8, 6.5)), int(rng.choice([16, 64, 256, 4096]))
    contention = Contention((1.1, 1.2), (1.05, 1.3)) if rng.random() < 0.25 else Contention()
    pools, wanted, found = [*nodes], int(rng.choice([1, 2, 2, 3, 3, 3])), dict[str, Option]()
    for number in range(wanted + 3):  # some are drawn twice, or have no room
        pool = pools[number % len(pools)]
        tp, stages = _SHAPES[rng.integers(len(_SHAPES))]
        if tp > max(nodes[pool]) or tp * stages > sum(nodes[pool]):
            tp, stages = 1, 1
        drafts = Speculation(rng.uniform(1.3, 3.0), 4, 1.0, 0.02) if rng.random() < 0.3 else None
        name = f"{pool} TP{tp} PP{stages}" + (" with drafts" if drafts else "")
        times = (1.8 if pool == "slow" else 1.0) / tp ** rng.uniform(0.6, 0.95)
        latency = StepLatency(prompt.times(times), decode.times(times), large.times(times), 95, 0.8 * times)
        kv_tokens = room * (2 * tp * stages - 1)
        group = Group(Role.BOTH, latency, kv_tokens, 2048, seats, stages, 0.5, drafts, contention=contention)
        dollars = tp * stages * (1.0 if pool == "slow" else float(rng.uniform(1.2, 4.0)))
        handoff_ms = float(rng.choice([0.0, 5.0]))
        if len(found) < wanted:
            found.setdefault(name, Option(name, tp, group, dollars, pool, handoff_ms=handoff_ms))
    return (*found.values(),)


def _workload(rng: np.random.Generator) -> Workload:
    if rng.random() < 0.2:
        return azure_like(2000, int(rng.integers(1000)))
    prompt, output = 10 ** rng.uniform(2, 3.4), 10 ** rng.uniform(0.5, 2.7)
    cv, cached = rng.choice([0.0, 0.3, 0.6, 1.0]), rng.choice([0.0, 0.0, 0.5, 0.9])
    text = f"prompt={prompt:.0f},output={output:.0f},cv={cv},cached={cached}"
    return parse_lengths(text, int(rng.integers(1000)), burstiness=float(rng.choice([0.3, 1.0, 1.0, 2.0])))


def _goal(rng: np.random.Generator, options: tuple[Option, ...], workload: Workload) -> Goal:
    """From what the edge of reach is to what hides a queue for long."""
    share = float(rng.choice([0.5, 0.9, 0.9, 0.9, 0.99]))
    unloaded = serve(
        Layout((replace(options[0].group, chunk_tokens=2**20),)), workload.of_length(300), UNLOADED
    ).outcome
    edge = {name: float(np.quantile(unloaded.of(name), share)) for name in METRICS}
    ttft, tpot = (
        (edge["ttft"] + 10.0) * 10 ** rng.uniform(0.03, 1.3),
        max(1.0, edge["tpot"]) * 10 ** rng.uniform(0.05, 0.7),
    )
    targets = Targets(round(ttft, 1), round(tpot, 2))
    if (more := rng.random()) < 0.1:
        targets = replace(targets, e2e_ms=round(edge["e2e"] * 10 ** rng.uniform(0.1, 0.6), 1))
    elif more < 0.2:
        targets = replace(targets, shares=(("ttft", 0.95),))
    return Goal(targets, share)
