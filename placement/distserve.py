"""DistServe's placement search (arXiv:2401.09670): every way to split a model over a prefill and a decode pipeline, and
for each the highest rate per device at which a percentile of TTFT and one of TPOT, each on its own, are in target.

Algorithm 1, for nodes with high affinity, may put the two phases anywhere. Algorithm 2, for low affinity, keeps a
segment of both in one node, so that KV moves inside nodes only, and repeats it over `pp_cross` nodes as further stages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from core.errors import ConfigError
from placement.latency import DistServeLatency
from placement.native import simulate
from placement.outcome import Outcome, Targets
from placement.pipeline import Pipelines
from placement.workload import Workload


@dataclass(frozen=True)
class Cluster:
    nodes: int
    devices_per_node: int

    @property
    def devices(self) -> int:
        return self.nodes * self.devices_per_node


class Split(NamedTuple):
    """What is enumerated: sizes per phase, and over how many nodes the stages of both are repeated."""

    pp_cross: int
    tp_prefill: int
    pp_prefill: int
    tp_decode: int
    pp_decode: int

    @property
    def segment(self) -> int:
        return self.tp_prefill * self.pp_prefill + self.tp_decode * self.pp_decode

    @property
    def devices(self) -> int:
        return self.pp_cross * self.segment


class SharedSplit(NamedTuple):
    """One pipeline for both phases, as vLLM has it."""

    tp: int
    pp: int

    @property
    def devices(self) -> int:
        return self.tp * self.pp


AnySplit = Split | SharedSplit


@dataclass(frozen=True)
class DistServeModel:
    """`latency` by tensor parallel size, where it was profiled; `prefill_caps`: most prompt tokens in a batch by tensor
    and pipeline parallel size, where the model fits."""

    layers: int
    heads: int
    latency: Mapping[int, DistServeLatency]
    prefill_caps: Mapping[tuple[int, int], int]

    def pipelines(self, split: AnySplit) -> Pipelines:
        """Raises ConfigError where the model wasn't profiled or doesn't fit."""
        if isinstance(split, SharedSplit):
            latency, cap = self._profiled(split.tp), self._cap(split.tp, split.pp)
            return Pipelines(latency, split.pp, cap, latency, split.pp, colocated=True)
        prefill, decode = self._profiled(split.tp_prefill), self._profiled(split.tp_decode)
        prefill_stages, decode_stages = split.pp_cross * split.pp_prefill, split.pp_cross * split.pp_decode
        return Pipelines(prefill, prefill_stages, self._cap(split.tp_prefill, prefill_stages), decode, decode_stages)

    def _profiled(self, tp: int) -> DistServeLatency:
        if tp not in self.latency:
            raise ConfigError(f"no profile for TP {tp}; there is one for TP {_listed(self.latency)}")
        return self.latency[tp]

    def _cap(self, tp: int, pp: int) -> int:
        if (tp, pp) not in self.prefill_caps:
            raise ConfigError(
                f"no room for prompts is known with TP {tp} and PP {pp}: the model doesn't fit, or no one said"
            )
        return self.prefill_caps[tp, pp]


def _listed(numbers: Mapping[int, object]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


Strategy = Callable[[DistServeModel, Cluster], Iterator[AnySplit]]


def algorithm_1(model: DistServeModel, cluster: Cluster) -> Iterator[Split]:
    """High node affinity: pipelines of any size that the devices allow."""
    most = cluster.devices
    for split in _splits(model, most, pp_cross=1):
        if split.devices <= most:
            yield split


def algorithm_2(model: DistServeModel, cluster: Cluster) -> Iterator[Split]:
    """Low node affinity: segments of prefill and decode that fit a node, on one node or several."""
    for split in _splits(model, cluster.devices_per_node, pp_cross=cluster.nodes):
        if split.segment <= cluster.devices_per_node and split.devices <= cluster.devices:
            yield split


def colocated(model: DistServeModel, cluster: Cluster) -> Iterator[SharedSplit]:
    """One pipeline for both phases: tensor parallel inside a node, stages anywhere."""
    for tp in _divisors(model.heads, cluster.devices_per_node):
        for pp in _divisors(model.layers, cluster.devices // tp):
            yield SharedSplit(tp, pp)


STRATEGIES: dict[str, Strategy] = {
    "distserve-high-affinity": algorithm_1,
    "distserve-low-affinity": algorithm_2,
    "colocated": colocated,
}


def _splits(model: DistServeModel, most: int, *, pp_cross: int) -> Iterator[Split]:
    """In the order of DistServe's enumeration, which decides between equals."""
    tp, pp = _divisors(model.heads, most), _divisors(model.layers, most)
    for sizes in product(range(1, pp_cross + 1), tp, pp, tp, pp):
        split = Split(*sizes)
        stages = split.pp_cross * split.pp_prefill, split.pp_cross * split.pp_decode
        if model.layers % stages[0] == 0 and model.layers % stages[1] == 0:
            yield split


def _divisors(number: int, most: int) -> list[int]:
    return [size for size in range(1, most + 1) if number % size == 0]


@dataclass(frozen=True)
class Criterion:
    """A rate passes if the quantile `ttft_quantile` of TTFT and `tpot_quantile` of TPOT are each below target."""

    targets: Targets
    ttft_quantile: float = 0.9
    tpot_quantile: float = 0.9

    def passes(self, outcome: Outcome) -> bool:
        return bool(
            np.quantile(outcome.ttft_ms, self.ttft_quantile) < self.targets.ttft_ms
            and np.quantile(outcome.tpot_ms, self.tpot_quantile) < self.targets.tpot_ms
        )


@dataclass(frozen=True)
class Bisection:
    """Rates per device from 0 to `highest`, until what is left is no wider than `width`, or has no further number."""

    highest: float
    width: float

    def best(self, passes: Callable[[float], bool]) -> float:
        """The last rate tried that passes; 0 if none did."""
        low, high = 0.0, self.highest
        while high - low > self.width and low < (middle := (low + high) / 2) < high:
            if passes(middle):
                low = middle
            else:
                high = middle
        return low


@dataclass(frozen=True)
class Found:
    """Goodput per device (requests/s) of every split evaluated, best first; why the others were not."""

    goodput: dict[AnySplit, float]
    refused: dict[AnySplit, str]

    @property
    def best(self) -> AnySplit | None:
        return next(iter(self.goodput), None)


def search(
    strategy: Strategy,
    model: DistServeModel,
    cluster: Cluster,
    workload: Workload,
    criterion: Criterion,
    rates: Bisection,
) -> Found:
    """Evaluate every split. Of equals the one with fewer devices is better, then the one enumerated first."""
    goodput: dict[AnySplit, float] = {}
    refused: dict[AnySplit, str] = {}
    for split in strategy(model, cluster):
        try:
            goodput[split] = _goodput(model.pipelines(split), split.devices, workload, criterion, rates)
        except ConfigError as error:
            refused[split] = error.message
    ranked = sorted(goodput, key=lambda split: (-goodput[split], split.devices))
    return Found({split: goodput[split] for split in ranked}, refused)


def _goodput(pipelines: Pipelines, devices: int, workload: Workload, criterion: Criterion, rates: Bisection) -> float:
    return rates.best(lambda rate: criterion.passes(simulate(pipelines, workload, rate * devices)))
