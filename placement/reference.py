"""Files of reference results: what was simulated and searched, with which profile, and what came out.

The format is that of a JSON object with `profile_coefficients`, `max_num_tokens`, `model_layers_heads`, `workloads`,
`unit_gaps`, `simulations` and `searches`; times in ms, rates in requests/s. What cannot be read is a ConfigError that
names the place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
import numpy as np

from core.errors import ConfigError
from placement.arrivals import fixed_gaps
from placement.distserve import DistServeModel
from placement.latency import Coefficients, DistServeLatency
from placement.outcome import Targets
from placement.workload import Workload

Backend = Literal["distserve", "vllm"]
Arrival = Literal["poisson", "gamma", "fixed"]
T = TypeVar("T")
Positive = Annotated[float, msgspec.Meta(gt=0)]
Percentile = Annotated[float, msgspec.Meta(ge=0, le=100)]
Size = Annotated[int, msgspec.Meta(ge=1)]


class Profile(msgspec.Struct):
    """Of one tensor parallel size."""

    prefill: tuple[float, float, float]
    decoding_smallbs: tuple[float, float, float]
    decoding_largebs: tuple[float, float, float]
    decoding_large_small_bs_threshold: int


class PrefillCap(msgspec.Struct):
    model: str
    tp: int
    pp: int
    max_num_tokens: int


class Case(msgspec.Struct, kw_only=True):
    """What simulations and searches have in common. `out` is the expected result."""

    id: str
    backend: Backend
    model: str
    workload: str
    arrival: Arrival = "poisson"
    cv: Annotated[float, msgspec.Meta(gt=0, le=100)] = 1.0
    slo_ttft_ms: Positive
    slo_tpot_ms: Positive
    out: dict[str, Any]

    @property
    def targets(self) -> Targets:
        return Targets(self.slo_ttft_ms, self.slo_tpot_ms)


class SimulationCase(Case, kw_only=True):
    rate_rps: Positive
    tp_prefill: Size
    pp_prefill: Size
    tp_decode: Size | None = None
    pp_decode: Size | None = None


class SearchCase(Case, kw_only=True):
    num_node: Size
    ngpu_per_node: Size
    is_high_affinity: bool = False
    ttft_percentile: Percentile = 90
    tpot_percentile: Percentile = 90
    max_per_gpu_rate: Positive
    esp: Positive

    @property
    def strategy(self) -> str:
        """A name of distserve.STRATEGIES."""
        if self.backend == "vllm":
            return "colocated"
        return "distserve-high-affinity" if self.is_high_affinity else "distserve-low-affinity"


class Reference(msgspec.Struct):
    profile_coefficients: dict[str, dict[str, dict[int, Profile]]]
    max_num_tokens: list[PrefillCap]
    model_layers_heads: dict[str, tuple[int, int]]
    workloads: dict[str, list[tuple[int, int]]]
    unit_gaps: dict[str, list[float]]
    simulations: list[SimulationCase] = []
    searches: list[SearchCase] = []

    def model_of(self, case: Case) -> DistServeModel:
        layers, heads = _known(self.model_layers_heads, case.model, case, "model_layers_heads")
        profiles = self.profile_coefficients.get(case.backend, {}).get(case.model, {})
        caps = {(cap.tp, cap.pp): cap.max_num_tokens for cap in self.max_num_tokens if cap.model == case.model}
        return DistServeModel(layers, heads, {tp: _latency(profile) for tp, profile in profiles.items()}, caps)

    def workload_of(self, case: Case) -> Workload:
        """Gaps drawn for a coefficient of variation cv have the mean 1/cv², so they are multiplied by cv²."""
        lengths = np.array(_known(self.workloads, case.workload, case, "workloads"), np.int32).reshape(-1, 2)
        if case.arrival == "fixed":
            gaps = fixed_gaps(len(lengths))
        else:
            drawn = _known(self.unit_gaps, f"cv{case.cv:g}", case, "unit_gaps")
            gaps = np.array(drawn[: len(lengths)]) * case.cv**2
        return Workload(lengths[:, 0], lengths[:, 1], gaps)


def read_reference(path: Path) -> Reference:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Reference, strict=True)
    except OSError as error:
        raise ConfigError(f"{path} can't be read: {error.strerror}", param="--reference") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no file of reference results: {error}", param="--reference") from error


def _known(table: dict[str, T], key: str, case: Case, name: str) -> T:
    if key not in table:
        raise ConfigError(f"{case.id}: {name} has no {key!r}; it has {', '.join(map(repr, table)) or 'nothing'}")
    return table[key]


def _latency(profile: Profile) -> DistServeLatency:
    prefill, small, large = profile.prefill, profile.decoding_smallbs, profile.decoding_largebs
    threshold = profile.decoding_large_small_bs_threshold
    return DistServeLatency(Coefficients(*prefill), Coefficients(*small), Coefficients(*large), threshold)
